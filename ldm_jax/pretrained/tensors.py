"""Tensors of a weights file of any format, by name, each read on access."""

import functools
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open

from ldm_jax.files import DTYPE_BY_CODE, dtype_code, printable, read_json
from ldm_jax.pretrained.contained_path import contained
from ldm_jax.pretrained.tensor_entry import Entry
from ldm_jax.pretrained.torch_checkpoint import PICKLE_MAGIC, ZIP_MAGIC, read_checkpoint
from ldm_jax.types import InputError

FLOATING = ("F64", "F32", "F16", "BF16")

LFS_MAGIC = b"version h"
"""Start of the text that stands for a large file in a clone without git-lfs."""

NUM_NAMED = 10
"""Keys of each fault that an error names."""

INDEX_NAME = re.compile(r"\.(safetensors|bin)(\.[\w-]+)?\.index(\.[\w-]+)?\.json$")
"""End of the name of the index of a sharded file: a variant may stand in two places."""


if TYPE_CHECKING:
    _NamedArrays = Mapping[str, np.ndarray]
else:  # a run-time type checker would read tensors to check the values
    _NamedArrays = Mapping


class Tensors(_NamedArrays):
    """Tensors of a file by name, each read on access and not cached.

    Floating tensors are converted to float32; others keep their dtype.

    Attributes:
      entries: Shape, dtype and reader of each tensor, by key.
      metadata: Metadata of the file.
    """

    def __init__(
        self, entries: Mapping[str, Entry], metadata: Mapping[str, str] | None = None
    ) -> None:
        """Copy entries and metadata."""
        self.entries = dict(entries)
        self.metadata = dict(metadata or {})

    @classmethod
    def from_arrays(
        cls,
        arrays: Mapping[str, np.ndarray],
        metadata: Mapping[str, str] | None = None,
    ) -> "Tensors":
        """Wrap arrays in memory.

        Raises:
          InputError: If a dtype is not one of `DTYPE_BY_CODE`.
        """
        return cls(
            {
                key: Entry(array.shape, dtype_code(key, array), array.view)
                for key, array in arrays.items()
            },
            metadata,
        )

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        return self.entries[key].shape

    def dtype(self, key: str) -> str:
        """Return the element type of a tensor in the file without reading it."""
        return self.entries[key].dtype

    def under(self, prefix: str) -> "Tensors":
        """Return the tensors whose keys start with a prefix, without the prefix."""
        entries = {
            key.removeprefix(prefix): entry
            for key, entry in self.entries.items()
            if key.startswith(prefix)
        }
        return Tensors(entries, self.metadata)

    def __getitem__(self, key: str) -> np.ndarray:
        """Read one tensor.

        Raises:
          KeyError: If there is no such key.
          InputError: If it cannot be read, or a value exceeds float32.
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
        """Return whether there is a tensor of this name, without reading it."""
        return key in self.entries

    def __iter__(self) -> Iterator[str]:
        """Iterate over the keys in the order of the file."""
        return iter(self.entries)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self.entries)


def open_tensors(path: Path) -> Tensors:
    """Open a weights file; its format is detected from its content.

    Args:
      path: A safetensors file, a torch checkpoint, zip or legacy, or the `*.index.json`
        of a sharded one.

    Returns:
      Its tensors, unread; of a checkpoint, those of the state dict.

    Raises:
      InputError: If it cannot be read, is damaged, or has another format.
    """
    try:
        if path.is_dir():
            raise InputError(
                f"{path}: got a folder, wanted a weights file; try a .safetensors "
                "or .ckpt file inside it"
            )
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: wanted an ordinary file; try copying it to one")
        if INDEX_NAME.search(path.name):
            return _open_shards(path)
        with path.open("rb") as file:
            head = file.read(9)
        if head == LFS_MAGIC:
            raise InputError(
                f"{path}: got a pointer of git-lfs, wanted the file itself; "
                "try git lfs pull"
            )
        if head and (path.suffix == ".safetensors" or head[8:] == b"{"):
            return _open_safetensors(path)
        if head.startswith((ZIP_MAGIC, PICKLE_MAGIC)):
            return Tensors(read_checkpoint(path))
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror or printable(str(error))}), "
            "wanted a weights file; try another path"
        ) from error
    got = f"a file that starts with {head!r}" if head else "an empty file"
    raise InputError(
        f"{path}: got {got}, wanted safetensors or a torch checkpoint; try downloading "
        "it again"
    )


def match_keys(
    wanted: Mapping[str, tuple[int, ...]], tensors: Tensors, *, what: str
) -> None:
    """Check that tensors are exactly those of a model: keys, shapes, floating.

    Args:
      wanted: Shape of every key.
      tensors: Tensors of the file; none is read.
      what: Name of the tensors in an error.

    Raises:
      InputError: If they differ, with the count and the first ten keys of each fault.
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
            "tensors of the model; try a config with the widths and depths of this "
            "file, or the file that belongs to this config"
        )


def warn_of_unused(keys: list[str], *, what: str) -> None:
    """Name tensors that are passed over in a warning of one line, if there are any."""
    if keys:
        logging.getLogger(__name__).warning(
            "%s: not read: %s",
            what,
            _count([printable(key) for key in keys], "tensors of no network"),
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
    keys_by_name: dict[str, set[str]] = {}
    for key, name in places.items():
        keys_by_name.setdefault(str(name), set()).add(key)
    entries: dict[str, Entry] = {}
    for name, listed in sorted(keys_by_name.items()):
        if not name.endswith((".safetensors", ".bin")):
            raise InputError(
                f"{path}: got the shard {printable(name)}, wanted a .safetensors or "
                ".bin file; try the safetensors form of the weights"
            )
        place = contained(path.parent, name)
        if not place.is_file():
            raise InputError(
                f"{path}: got no shard {name} next to it, wanted every shard that it "
                "lists; try downloading it again"
            )
        shard = open_tensors(place)
        if astray := sorted(listed ^ set(shard)):
            raise InputError(
                f"{path}: {_count([printable(key) for key in astray], 'keys')} are in "
                f"the index or in {name}, wanted them in both; try downloading both "
                "again"
            )
        entries |= shard.entries
    metadata = notes.items() if isinstance(notes, dict) else ()
    return Tensors(entries, {key: str(value) for key, value in metadata})
