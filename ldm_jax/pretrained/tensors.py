"""Weights as files: named arrays, one read at a time, whoever wrote them."""

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from ldm_jax.files import DTYPE_BY_CODE, _code, printable
from ldm_jax.pretrained.strict_json import contained, read_json
from ldm_jax.pretrained.torch_checkpoint import PICKLE_MAGIC, ZIP_MAGIC, read_checkpoint
from ldm_jax.types import InputError

FLOATING = ("F64", "F32", "F16", "BF16")

NUM_NAMED = 10
"""Keys named in an error, of each kind."""

_INDEX_NAME = re.compile(r"\.safetensors\.index(\.\w+)?\.json$")


if TYPE_CHECKING:
    _NamedArrays = Mapping[str, np.ndarray]
else:  # checkers at run time would read a tensor of each mapping to know its type
    _NamedArrays = Mapping


class Entry(NamedTuple):
    """One tensor that is not read yet."""

    shape: tuple[int, ...]
    """Its shape."""
    dtype: str
    """Its element type in the file, as safetensors names it."""
    read: Callable[[], np.ndarray]
    """Reads it, in the dtype of the file."""


class Tensors(_NamedArrays):
    """Named tensors of a file, each read when it is asked for and not kept.

    Floating tensors come as float32 whatever the file holds, others as they are.

    Attributes:
      entries: What is known of each without reading it, by key.
      metadata: Texts that the file carries.
    """

    def __init__(
        self, entries: Mapping[str, Entry], metadata: Mapping[str, str] | None = None
    ) -> None:
        """Take entries by key."""
        self.entries = dict(entries)
        self.metadata = dict(metadata or {})

    @classmethod
    def from_arrays(
        cls,
        arrays: Mapping[str, np.ndarray],
        metadata: Mapping[str, str] | None = None,
    ) -> "Tensors":
        """Wrap arrays in memory.

        Args:
          arrays: By key.
          metadata: Texts.

        Returns:
          The arrays as if from a file.

        Raises:
          InputError: If an array has a dtype that no weight has.
        """
        return cls(
            {
                key: Entry(array.shape, _code(key, array), array.view)
                for key, array in arrays.items()
            },
            metadata,
        )

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        return self.entries[key].shape

    def dtype(self, key: str) -> str:
        """Return the element type in the file (F32, BF16, I64, ...) without reading."""
        return self.entries[key].dtype

    def under(self, prefix: str) -> "Tensors":
        """Return the tensors whose keys start with a prefix, less the prefix."""
        entries = {
            key.removeprefix(prefix): entry
            for key, entry in self.entries.items()
            if key.startswith(prefix)
        }
        return Tensors(entries, self.metadata)

    def __getitem__(self, key: str) -> np.ndarray:
        """Read one tensor.

        Raises:
          KeyError: If it is not there.
          InputError: If it cannot be read, or does not fit float32.
        """
        entry = self.entries[key]
        if entry.dtype not in DTYPE_BY_CODE:
            raise InputError(
                f"{printable(key)}: got elements of type {entry.dtype}, wanted one of "
                f"{', '.join(DTYPE_BY_CODE)}; try converting it to F32 first"
            )
        array = entry.read()
        if entry.dtype not in FLOATING:
            return array
        try:
            with np.errstate(over="raise"):
                return array.astype(np.float32, copy=False)
        except FloatingPointError as error:
            raise InputError(
                f"{printable(key)}: got {entry.dtype} values beyond float32, wanted "
                "some within; try converting it to F32 first"
            ) from error

    def __contains__(self, key: object) -> bool:
        """Tell whether a tensor is there, without reading it."""
        return key in self.entries

    def __iter__(self) -> Iterator[str]:
        """Go through the keys, in the order of the file."""
        return iter(self.entries)

    def __len__(self) -> int:
        """Return how many tensors there are."""
        return len(self.entries)


def open_tensors(path: Path) -> Tensors:
    """Open a file of weights; what it is, is told by its content.

    Args:
      path: A safetensors file, the `*.safetensors.index.json` of a sharded one, or a
        torch checkpoint, zip or legacy.

    Returns:
      Its tensors, none of them read yet. Of a checkpoint, those of the state dict.

    Raises:
      InputError: If it cannot be read, is damaged, or is none of these.
    """
    try:
        if path.is_dir():
            raise InputError(
                f"{path}: got a folder, wanted a file of weights; try a .safetensors "
                "or .ckpt file inside it"
            )
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: wanted an ordinary file; try copying it to one")
        if _INDEX_NAME.search(path.name):
            return _open_shards(path)
        with path.open("rb") as file:
            head = file.read(9)
        if head and (path.suffix == ".safetensors" or head[8:] == b"{"):
            return _open_safetensors(path)
        if head.startswith((ZIP_MAGIC, PICKLE_MAGIC)):
            return Tensors(
                {key: Entry(*tensor) for key, tensor in read_checkpoint(path).items()}
            )
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror or printable(str(error))}), "
            "wanted a file of weights; try another path"
        ) from error
    got = f"a file that starts with {head!r}" if head else "an empty file"
    raise InputError(
        f"{path}: got {got}, wanted safetensors or a torch checkpoint; try downloading "
        "it again"
    )


def match_keys(
    wanted: Mapping[str, tuple[int, ...]], tensors: Tensors, *, what: str
) -> None:
    """Check that tensors are those of a model: equal keys, equal shapes, floating.

    Args:
      wanted: Shapes by key.
      tensors: Of the file; none is read.
      what: Names both in the error.

    Raises:
      InputError: If they differ, in one line with counts and the first ten of each.
    """
    shared = [key for key in wanted if key in tensors]
    shapes = {k: (tensors.shape(k), tuple(wanted[k])) for k in shared}
    faults = {
        "missing": [printable(key) for key in wanted if key not in tensors],
        "extra": [printable(key) for key in tensors if key not in wanted],
        "of another shape": [
            f"{printable(key)}: got {got}, wanted {want}"
            for key, (got, want) in shapes.items()
            if got != want
        ],
        "not floating": [
            f"{printable(key)}: {tensors.dtype(key)}"
            for key in shared
            if tensors.dtype(key) not in FLOATING
        ],
    }
    details = [_count(names, fault) for fault, names in faults.items() if names]
    if details:
        raise InputError(
            f"{what}: got {', '.join(details)}, wanted exactly the {len(wanted)} "
            "tensors of the model; try a config of the widths and depths of this file, "
            "or the file that belongs to this config"
        )


def _count(names: list[str], fault: str) -> str:
    more = ", ..." if len(names) > NUM_NAMED else ""
    return f"{len(names)} {fault} ({', '.join(names[:NUM_NAMED])}{more})"


def _open_safetensors(path: Path) -> Tensors:
    try:
        file = safe_open(path, framework="numpy")
        slices = {key: file.get_slice(key) for key in file.keys()}
        return Tensors(
            {
                key: Entry(
                    tuple(part.get_shape()),
                    part.get_dtype(),
                    functools.partial(_read_safetensor, path, file, key),
                )
                for key, part in slices.items()
            },
            file.metadata(),
        )
    except SafetensorError as error:
        raise InputError(
            f"{path}: got a damaged safetensors file ({printable(str(error))}), wanted "
            "a whole one; try downloading it again, or name it .ckpt if torch wrote it"
        ) from error


def _read_safetensor(path: Path, file: Any, key: str) -> np.ndarray:
    try:
        return file.get_tensor(key)
    except (SafetensorError, ValueError, OSError) as error:
        raise InputError(
            f"{path}: cannot read {printable(key)} ({printable(str(error))}); try "
            "downloading it again"
        ) from error


def _open_shards(path: Path) -> Tensors:
    index = read_json(path)
    places, notes = index.get("weight_map"), index.get("metadata")
    if not isinstance(places, dict) or not places:
        raise InputError(
            f"{path}: got no weight_map, wanted one from keys to files; try "
            "downloading it again"
        )
    entries: dict[str, Entry] = {}
    for name in sorted(set(map(str, places.values()))):
        if not name.endswith(".safetensors"):
            raise InputError(
                f"{path}: got the shard {printable(name)}, wanted a .safetensors file; "
                "try the safetensors form of the weights"
            )
        place = contained(path.parent, name)
        if not place.is_file():
            raise InputError(
                f"{path}: got no shard {name} next to it, wanted every shard that it "
                "lists; try downloading it again"
            )
        shard = _open_safetensors(place)
        listed = {key for key, file in places.items() if file == name}
        if astray := sorted(listed ^ set(shard)):
            raise InputError(
                f"{path}: {_count([printable(key) for key in astray], 'keys')} are in "
                f"the index or in {name}, wanted them in both; try downloading both "
                "again"
            )
        entries |= shard.entries
    metadata = notes.items() if isinstance(notes, dict) else ()
    return Tensors(entries, {key: str(value) for key, value in metadata})
