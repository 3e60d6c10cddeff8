"""Latents on disk: what the first stage made of each example, as `array_record`.

A folder holds the shards and `cache.json`, which says what they were made of and names
them once all of them stand. A record is the bytes of its arrays, one after the other,
and then its caption. `array_record` keeps a hash of every block, so that a flipped bit
is found where it is read.
"""

import dataclasses
import hashlib
import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import Float

from ldm_jax.data.pipeline import INDEX_MODULUS
from ldm_jax.types import InputError

NOTE_FILE = "cache.json"
NULL_FILE = "null_state.npy"
FORMAT = 1
MAKER = "ldm cache-latents"
AGAIN = f"give the same command of {MAKER} again"


class Field(NamedTuple):
    """An array that every record has."""

    name: str
    """`moments`, `states`, `label`, `tokens`, `embedding` or `segmentation`."""
    dtype: str
    """As NumPy writes it with the order of the bytes, such as `<f4`."""
    shape: tuple[int, ...]
    """Its shape."""

    @property
    def numbers(self) -> int:
        """How many are in it."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes of it."""
        return self.numbers * np.dtype(self.dtype).itemsize


class Shard(NamedTuple):
    """What is known of a file of records that is whole."""

    size: int
    """Its bytes."""
    sha256: str
    """Of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheNote:
    """What a cache was made of, and its files."""

    made_of: dict[str, Any]
    """Fields of the config that its numbers depend on, by name."""
    first_stage: str
    """Digest of the first stage's parameters."""
    text_encoder: str | None
    """Digest of the frozen text encoder; None if there are no text states."""
    null_state: str | None
    """sha256 of the file of what it says of the empty prompt; likewise."""
    num_examples: int
    """Of the split."""
    num_classes: int
    """Of the data set."""
    fields: tuple[Field, ...]
    """Arrays of a record, in their order."""
    has_captions: bool
    """Whether each record ends with a caption."""
    num_shards: int
    """Files of records."""
    shards: tuple[Shard, ...] = ()
    """What is known of each; () until all of them stand."""

    @property
    def record_size(self) -> int:
        """Bytes of the arrays of a record."""
        return sum(field.size for field in self.fields)


def shard_name(shard: int, num_shards: int) -> str:
    """Return the name of a file of records."""
    return f"latents-{shard:05d}-of-{num_shards:05d}.array_record"


def shard_range(shard: int, note: CacheNote) -> range:
    """Return the examples of a file of records, in the order of the split."""
    total, num = note.num_examples, note.num_shards
    return range(total * shard // num, total * (shard + 1) // num)


def to_json(note: CacheNote) -> dict[str, Any]:
    """Write a note as what JSON can hold."""
    return {
        "format": FORMAT,
        **dataclasses.asdict(note),
        "fields": [field._asdict() for field in note.fields],
        "shards": [shard._asdict() for shard in note.shards],
    }


def read_note(folder: Path) -> CacheNote:
    """Read what a cache was made of.

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
        tree = json.loads(path.read_text())
        version = tree.pop("format")
        fields = [(x["name"], x["dtype"], tuple(x["shape"])) for x in tree["fields"]]
        tree["fields"] = tuple(Field(*field) for field in fields)
        tree["shards"] = tuple(Shard(**shard) for shard in tree["shards"])
        note = CacheNote(**tree)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"data.latents: {path} is damaged or of another version of ldm_jax "
            f"({type(error).__name__}: {error}); make the cache anew in another folder"
        ) from None
    if version != FORMAT:
        raise InputError(
            f"data.latents: {path} has the format {version}, wanted {FORMAT}; make the "
            "cache anew in another folder"
        )
    return note


def check_files(folder: Path, note: CacheNote) -> None:
    """Check that a cache is finished and each of its files there, by its size.

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


def read_null_state(folder: Path, note: CacheNote) -> Float[np.ndarray, "n d"] | None:
    """Read what the text encoder says of the empty prompt; None without text states.

    Raises:
      InputError: If it is damaged.
    """
    if note.null_state is None:
        return None
    path = folder / NULL_FILE
    data = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(data).hexdigest() != note.null_state:
        raise InputError(
            f"data.latents: {path} is missing or damaged; make the cache anew in "
            "another folder"
        )
    return np.load(io.BytesIO(data), allow_pickle=False)


def pack(example: Mapping[str, Any], note: CacheNote, *, where: str) -> bytes:
    """Write an example as a record.

    Args:
      example: Arrays of the note's fields; a `caption`, text or bytes, where there
        are captions.
      where: What to call the example.

    Raises:
      InputError: If an array has not the shape of the first example's.
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
    """Read a record.

    Raises:
      ValueError: If it has another length than its arrays.
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

    Each has `moments` and what else the data set had; the image is left out. Text
    states, where they are read, are its `embedding`.
    """

    def __init__(self, folder: Path, note: CacheNote, *, states: bool) -> None:
        """Open every file of records.

        Args:
          note: Read from it.
          states: Whether the text states are read.

        Raises:
          InputError: If the cache is not finished, or a file is missing or damaged.
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
    """Take of a cached example what a batch holds, under the names of the stream."""
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
