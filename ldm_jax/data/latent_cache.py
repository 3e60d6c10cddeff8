"""The files of a latent cache: the first stage's output for every example.

A folder holds the shards, in the `array_record` format, and `cache.json`, which states
what they were made of and, once they are complete, lists them. A record is the bytes of
its arrays, one after the other, and then its caption. `array_record` stores a hash of
every block, so that a damaged one is found when it is read.
"""

import dataclasses
import hashlib
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import Float

from ldm_jax.data.pipeline import INDEX_MODULUS
from ldm_jax.files import json_digest, read_json, write_json
from ldm_jax.types import InputError

NOTE_FILE = "cache.json"
NULL_FILE = "null_state.npy"
FORMATS = (1, 2)
"""Of `cache.json`, the newest last; the first one carries no digest of itself."""
MAKER = "ldm cache-latents"
AGAIN = f"give the same command of {MAKER} again"


class Field(NamedTuple):
    """An array of every record."""

    name: str
    """`moments`, `states`, `label`, `tokens`, `embedding` or `segmentation`."""
    dtype: str
    """NumPy's dtype string with the byte order, such as `<f4`."""
    shape: tuple[int, ...]
    """Shape of the array."""

    @property
    def numbers(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes of the array."""
        return self.numbers * np.dtype(self.dtype).itemsize


class Shard(NamedTuple):
    """A complete shard."""

    size: int
    """Bytes of the file."""
    sha256: str
    """Digest of the file."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheNote:
    """The content of `cache.json`."""

    made_of: dict[str, Any]
    """Config fields that the cached numbers depend on, by name."""
    first_stage: str
    """Digest of the first stage's parameters."""
    text_encoder: str | None
    """Digest of the frozen text encoder; None without text embeddings."""
    null_state: str | None
    """sha256 of the file of the empty prompt's embedding; None without."""
    num_examples: int
    """Examples of the split."""
    num_classes: int
    """Classes of the data set."""
    fields: tuple[Field, ...]
    """Arrays of a record, in order."""
    has_captions: bool
    """Whether each record ends with a caption."""
    num_shards: int
    """Number of shards."""
    shards: tuple[Shard, ...] = ()
    """The shards; () until all are complete."""

    @property
    def record_size(self) -> int:
        """Bytes of the arrays of a record."""
        return sum(field.size for field in self.fields)


def shard_name(shard: int, num_shards: int) -> str:
    """Return the file name of a shard."""
    return f"latents-{shard:05d}-of-{num_shards:05d}.array_record"


def shard_range(shard: int, note: CacheNote) -> range:
    """Return the examples of a shard, in the order of the split."""
    total, num = note.num_examples, note.num_shards
    return range(total * shard // num, total * (shard + 1) // num)


def to_json(note: CacheNote) -> dict[str, Any]:
    """Convert a note to JSON-compatible values."""
    return {
        "format": FORMATS[-1],
        **dataclasses.asdict(note),
        "fields": [field._asdict() for field in note.fields],
        "shards": [shard._asdict() for shard in note.shards],
    }


def write_note(folder: Path, note: CacheNote) -> None:
    """Write `cache.json`, with the digest of its content.

    Raises:
      OSError: If it cannot be written.
    """
    tree = to_json(note)
    write_json(folder / NOTE_FILE, {**tree, "sha256": json_digest(tree)})


def read_note(folder: Path) -> CacheNote:
    """Read `cache.json`.

    Raises:
      InputError: If the folder is no cache, or one of another version.
    """
    path = folder / NOTE_FILE
    if not path.is_file():
        raise InputError(
            f"data.latents: {folder} is no cache of latents (no {NOTE_FILE}); make one "
            f"with {MAKER}"
        )
    try:
        tree = read_json(path, remedy="make the cache anew in another folder")
    except InputError as error:
        raise InputError(f"data.latents: {error}") from None
    try:
        saved = tree.pop("sha256", None)
        version = tree["format"]
        if version in FORMATS and saved != (json_digest(tree) if version > 1 else None):
            raise ValueError("its digest is another one")
        del tree["format"]
        fields = [(x["name"], x["dtype"], tuple(x["shape"])) for x in tree["fields"]]
        tree["fields"] = tuple(Field(*field) for field in fields)
        tree["shards"] = tuple(Shard(**shard) for shard in tree["shards"])
        note = CacheNote(**tree)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"data.latents: {path} is damaged or of another version of ldm_jax "
            f"({type(error).__name__}: {error}); make the cache anew in another folder"
        ) from None
    if version not in FORMATS:
        raise InputError(
            f"data.latents: {path} has the format {version}, wanted one of {FORMATS}; "
            "make the cache anew in another folder"
        )
    return note


def check_files(folder: Path, note: CacheNote) -> None:
    """Check that a cache is finished: the size of each shard, and the null state.

    Raises:
      InputError: If not.
    """
    if len(note.shards) != note.num_shards:
        raise InputError(f"data.latents: {folder} is not finished; {AGAIN} to go on")
    for number, shard in enumerate(note.shards):
        path = folder / shard_name(number, note.num_shards)
        size = path.stat().st_size if path.is_file() else None
        if size != shard.size:
            got = "is missing" if size is None else f"has {size} bytes"
            raise InputError(
                f"data.latents: {path} {got}, wanted {shard.size} bytes; {AGAIN} to "
                "make it anew"
            )
    read_null_state(folder, note)


def read_null_state(folder: Path, note: CacheNote) -> Float[np.ndarray, "n d"] | None:
    """Read the text embedding of the empty prompt; None without text embeddings.

    Raises:
      InputError: If it is damaged.
    """
    if note.null_state is None:
        return None
    path = folder / NULL_FILE
    data = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(data).hexdigest() != note.null_state:
        raise InputError(
            f"data.latents: {path} is missing or damaged; {AGAIN} to make it anew"
        )
    return np.load(io.BytesIO(data), allow_pickle=False)


def pack(example: Mapping[str, Any], note: CacheNote, *, where: str) -> bytes:
    """Convert an example to a record.

    Args:
      example: Arrays of the note's fields, and a `caption` (text or bytes) if the note
        has captions.
      where: Name of the example in an error.

    Raises:
      InputError: If an array has another shape than in the first example.
    """
    parts = []
    for field in note.fields:
        array = np.asarray(example[field.name], np.dtype(field.dtype))
        if array.shape != field.shape:
            raise InputError(
                f"data.source: {field.name!r} of {where} has the shape {array.shape}, "
                f"wanted {field.shape}, that of the first example's"
            )
        parts.append(array.tobytes())
    if note.has_captions:
        caption = example["caption"]
        parts.append(caption.encode() if isinstance(caption, str) else bytes(caption))
    return b"".join(parts)


def unpack(record: bytes, note: CacheNote) -> dict[str, Any]:
    """Convert a record to an example.

    Raises:
      ValueError: If its length is wrong.
    """
    rest = len(record) - note.record_size
    if rest < 0 or (rest and not note.has_captions):
        raise ValueError(f"a record of {len(record)} bytes, not {note.record_size}")
    example: dict[str, Any] = {}
    start = 0
    for field in note.fields:
        flat = np.frombuffer(record, field.dtype, field.numbers, start)
        example[field.name] = flat.reshape(field.shape)
        start += field.size
    if note.has_captions:
        example["caption"] = record[start:]
    return example


class LatentExamples:
    """Random access to the examples of a finished cache.

    An example has `moments` instead of an `image`, and the other arrays of the data
    set. Text embeddings, if they are read, are its `embedding`.
    """

    def __init__(self, folder: Path, note: CacheNote, *, states: bool) -> None:
        """Open every shard.

        Args:
          note: Content of the folder's `cache.json`.
          states: Whether to read the text embeddings.

        Raises:
          InputError: If the cache is not finished, or a shard is missing or damaged.
        """
        check_files(folder, note)
        self._folder, self._note, self._states = folder, note, states
        names = [shard_name(i, note.num_shards) for i in range(note.num_shards)]
        try:
            paths = [str(folder / name) for name in names]
            self._records: Any = grain.sources.ArrayRecordDataSource(paths)
        except RuntimeError as error:
            raise self._damaged(error) from None
        if len(self._records) != note.num_examples:
            raise self._damaged(f"{len(self._records)} records")

    def __len__(self) -> int:
        """Return the number of examples."""
        return self._note.num_examples

    def __getitem__(self, record: int, /) -> Mapping[str, Any]:
        """Return one example.

        Raises:
          InputError: If it is damaged.
        """
        try:
            example = unpack(self._records[record], self._note)
        except (RuntimeError, ValueError) as error:
            raise self._damaged(error, record) from None
        states = example.pop("states", None)
        return {**example, "embedding": states} if self._states else example

    def _damaged(self, reason: object, record: int | None = None) -> InputError:
        where = "" if record is None else f", example {record}"
        details = " ".join(str(reason).split())[:160]
        return InputError(
            f"data.latents: {self._folder}{where} is damaged ({details}); {AGAIN} to "
            "make what is damaged anew"
        )


def prepare_latents(example: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Convert a cached example to the arrays of a stream's element."""
    prepared = {
        "moments": np.asarray(example["moments"], np.float32),
        "label": np.asarray(example.get("label", 0), np.int32),
        "index": np.asarray(example["index"] % INDEX_MODULUS, np.uint32),
    }
    for name, dtype in (
        ("tokens", np.int32),
        ("embedding", np.float32),
        ("segmentation", np.int32),
    ):
        if name in example:
            prepared[name] = np.asarray(example[name], dtype)
    return prepared
