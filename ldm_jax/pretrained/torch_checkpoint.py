"""Torch checkpoints: the location of the pickle and of each tensor's bytes."""

import io
import math
import mmap
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import numpy as np

from ldm_jax.files import dtype_of, printable
from ldm_jax.pretrained import torch_pickle as pickles
from ldm_jax.pretrained.tensor_entry import Entry
from ldm_jax.pretrained.torch_pickle import RefusedError, StridedTensor, damaged
from ldm_jax.types import InputError

ZIP_MAGIC = b"PK\x03\x04"
PICKLE_MAGIC = b"\x80"
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
MAX_NESTED = 4
"""Limit of state dicts inside each other."""
MAX_DIRECTORY_BYTES = 16 * 2**20
"""Limit of a zip archive's list of members: some 200,000 of them."""

_MALFORMED = (
    UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    NotImplementedError,
    RecursionError,
    TypeError,
    ValueError,
)
"""Exceptions of the standard library on malformed bytes."""


class _Blob(NamedTuple):
    """A range of bytes in the file, and their checksum if the file has one."""

    start: int
    size: int
    crc: int | None


def read_checkpoint(path: Path) -> dict[str, Entry]:
    """Find the tensors of a torch checkpoint, zip (torch >= 1.6) or legacy.

    No code in the file is run.

    Args:
      path: A file that is not empty.

    Returns:
      The tensors of the state dict: the object itself, or its value `state_dict` or
      `model`. Everything else is ignored.

    Raises:
      InputError: If the file is damaged, or asks for anything but tensors and
        containers.
      OSError: If it cannot be read.
    """
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        read = _read_zip if data[: len(ZIP_MAGIC)] == ZIP_MAGIC else _read_legacy
        content, blobs = read(path, data)
        archive = _Archive(path, data, blobs)
        return {
            name: Entry(
                tensor.shape, tensor.storage.dtype, archive.reader(name, tensor)
            )
            for name, tensor in _state_dict(content).items()
        }
    except RefusedError as error:
        raise InputError(f"{path}: {error}") from error
    except _MALFORMED as error:
        reason = printable(str(error) or type(error).__name__)
        raise InputError(f"{path}: {damaged(reason)}") from error


def _state_dict(content: Any) -> dict[str, StridedTensor]:
    """Return the tensors under `state_dict`, under `model`, or at the top level."""
    chain = [content]
    while isinstance(chain[-1], dict) and len(chain) <= MAX_NESTED:
        chain.append(chain[-1].get("state_dict"))
    places = [*chain[:0:-1], content]
    if isinstance(content, dict):
        places.insert(-1, content.get("model"))
    for place in places:
        if isinstance(place, dict):
            tensors = {
                name: tensor
                for name, tensor in place.items()
                if isinstance(name, str) and isinstance(tensor, StridedTensor)
            }
            if tensors:
                return tensors
    raise RefusedError(
        "got a checkpoint without tensors by name, wanted a state dict at its top or "
        "under state_dict or model; try saving model.state_dict() with torch"
    )


class _Archive:
    """An open checkpoint and the location of each of its storages."""

    def __init__(self, path: Path, data: mmap.mmap, blobs: dict[str, _Blob]) -> None:
        self._path = path
        self._data = data
        self._blobs = blobs
        self._verified: set[str] = set()

    def reader(self, name: str, tensor: StridedTensor) -> Callable[[], np.ndarray]:
        """Return a function that reads a tensor."""
        return lambda: self._read(name, tensor)

    def _read(self, name: str, tensor: StridedTensor) -> np.ndarray:
        storage = tensor.storage
        blob, dtype = self._blobs[storage.key], dtype_of(storage.dtype)
        if storage.key not in self._verified:
            try:
                _verify(self._data, blob, name)
            except RefusedError as error:
                raise InputError(f"{self._path}: {error}") from error
            self._verified.add(storage.key)
        if not math.prod(tensor.shape):
            return np.empty(tensor.shape, dtype)
        view = np.ndarray(
            tensor.shape,
            dtype,
            buffer=self._data,
            offset=blob.start + (storage.start + tensor.offset) * dtype.itemsize,
            strides=tuple(
                by * dtype.itemsize if n > 1 else 0
                for n, by in zip(tensor.shape, tensor.strides, strict=True)
            ),
        )
        return np.array(view, order="C")


def _verify(data: mmap.mmap, blob: _Blob, what: str) -> None:
    if blob.crc is None:
        return
    if zlib.crc32(memoryview(data)[blob.start : blob.start + blob.size]) != blob.crc:
        raise damaged(f"the checksum of {printable(what)} differs")


def _read_zip(path: Path, data: mmap.mmap) -> tuple[Any, dict[str, _Blob]]:
    """Read the form of torch >= 1.6: a pickle and one zip member for each storage."""
    members = _zip_members(path, data)
    order = members.get("byteorder")
    if order and data[order.start : order.start + min(order.size, 8)] != b"little":
        raise _big_endian()
    program = members["data.pkl"]
    if program.size > pickles.MAX_PICKLE_BYTES:
        raise damaged(f"its pickle is longer than {pickles.MAX_PICKLE_BYTES} bytes")
    _verify(data, program, "data.pkl")
    text = data[program.start : program.start + program.size]
    content, storages, _ = pickles.load(text)
    blobs = {}
    for key, storage in storages.items():
        blob = members.get(f"data/{key}")
        itemsize = dtype_of(storage.dtype).itemsize
        if blob is None or blob.size // itemsize != storage.total:
            raise damaged(f"storage {printable(key)} is not there or of another size")
        blobs[key] = blob
    return content, blobs


def _big_endian() -> RefusedError:
    return RefusedError(
        "got a big-endian checkpoint, wanted a little-endian one; try saving it with "
        "torch on a little-endian machine"
    )


class _ShortReads(io.FileIO):
    """A file of which `zipfile` reads no more than the longest list of members."""

    def read(self, size: int | None = -1, /) -> bytes:
        """Read bytes; refuse to read too many at once."""
        if size is not None and size > MAX_DIRECTORY_BYTES:
            raise damaged(f"its list of members is beyond {MAX_DIRECTORY_BYTES} bytes")
        return super().read(size) or b""


def _zip_members(path: Path, data: mmap.mmap) -> dict[str, _Blob]:
    """Locate the members that torch reads, by name inside the archive's folder."""
    with _ShortReads(path) as file, zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
    folders = [
        info.filename.removesuffix("data.pkl")
        for info in infos
        if info.filename.endswith("/data.pkl") and info.filename.count("/") == 1
    ]
    if len(folders) != 1:
        raise RefusedError(
            f"got a zip archive with {len(folders)} members named */data.pkl, wanted "
            "the one of a torch checkpoint; try the file that torch.save wrote"
        )
    members: dict[str, _Blob] = {}
    for info in infos:
        folder, _, name = info.filename.partition("/")
        read = name in ("data.pkl", "byteorder") or name.startswith("data/")
        if folder + "/" == folders[0] and read:
            if name in members:
                raise damaged(f"two members named {printable(name)}")
            members[name] = _zip_member(info, data)
    return members


def _zip_member(info: zipfile.ZipInfo, data: mmap.mmap) -> _Blob:
    packed = info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1
    if packed or info.compress_size != info.file_size:
        raise RefusedError(
            f"got a compressed or encrypted member {printable(info.filename)}, wanted "
            "plain ones as torch.save writes; try saving it with torch again"
        )
    header = data[info.header_offset : info.header_offset + 30]
    name_size, extra_size = struct.unpack("<HH", header[26:30])
    start = info.header_offset + 30 + name_size + extra_size
    if header[:4] != ZIP_MAGIC or start + info.file_size > len(data):
        raise damaged(f"member {printable(info.filename)} lies outside the file")
    return _Blob(start, info.file_size, info.CRC)


def _read_legacy(path: Path, data: mmap.mmap) -> tuple[Any, dict[str, _Blob]]:
    """Read the form of torch < 1.6: five pickles, then every storage's size and bytes.

    The pickles are a magic number, the protocol, the system, the object, and the
    storages' keys in the order of the file.
    """
    magic = pickles.load(data)
    if magic.content != LEGACY_MAGIC:
        raise RefusedError(
            "got a pickle that is not a torch checkpoint, wanted what torch.save "
            "writes; try saving model.state_dict() with torch"
        )
    protocol = pickles.load(data, magic.end)
    system = pickles.load(data, protocol.end)
    if protocol.content != LEGACY_PROTOCOL or not isinstance(system.content, dict):
        raise damaged("an unknown torch protocol")
    if system.content.get("little_endian") is not True:
        raise _big_endian()
    content, storages, end = pickles.load(data, system.end)
    keys, _, start = pickles.load(data, end)
    if not isinstance(keys, list) or set(keys) != set(storages):
        raise damaged("its list of storages is not that of its tensors")
    blobs = {}
    for key in keys:
        storage = storages[key]
        (numel,) = struct.unpack("<q", data[start : start + 8])
        size = numel * dtype_of(storage.dtype).itemsize
        if numel != storage.total or start + 8 + size > len(data):
            raise damaged(f"storage {printable(key)} is cut off or of another size")
        blobs[key] = _Blob(start + 8, size, None)
        start += 8 + size
    return content, blobs
