"""Files written atomically: a reader sees the whole file or none."""

import contextlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ldm_jax.types import InputError

DTYPE_BY_CODE: Mapping[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
"""NumPy dtypes by safetensors' names of element types."""


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the path to an `OSError` that does not name a file, as those of `write`."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def write_text(path: Path, text: str) -> None:
    """Write text atomically.

    Raises:
      OSError: If it cannot be written.
    """
    part = path.with_name(path.name + ".part")
    with naming(part):
        part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically.

    Raises:
      OSError: If it cannot be written.
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


_CODE_BY_DTYPE = {dtype.name: code for code, dtype in DTYPE_BY_CODE.items()}


def write_safetensors(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file atomically; equal input gives equal bytes.

    The safetensors library does not: it orders metadata at random, and writes arrays
    that are not contiguous wrongly.

    Args:
      path: File; replaced if it exists.
      tensors: Arrays by key.
      metadata: Metadata of the file.

    Raises:
      InputError: If an array has an unknown dtype or the key `__metadata__`, or the
        file cannot be written.

    Source:
      The format, https://huggingface.co/docs/safetensors.
    """
    arrays = {key: np.asarray(tensors[key]) for key in sorted(tensors)}
    codes = {key: dtype_code(key, array) for key, array in arrays.items()}
    # Wide elements first, so that every tensor is aligned to its element size.
    order = sorted(arrays, key=lambda key: (-arrays[key].itemsize, key))
    spans, end = {}, 0
    for key in order:
        spans[key] = (end, end + arrays[key].nbytes)
        end += arrays[key].nbytes
    header: dict[str, Any] = {
        key: {"dtype": codes[key], "shape": a.shape, "data_offsets": spans[key]}
        for key, a in arrays.items()
    }
    if metadata:
        header["__metadata__"] = dict(metadata)
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for key in order:
                array = np.ascontiguousarray(arrays[key], DTYPE_BY_CODE[codes[key]])
                file.write(array.reshape(-1).view(np.uint8).data)
        os.replace(part, path)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror or error}); try a folder that "
            "is there and that you may write to"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def dtype_code(key: str, array: np.ndarray) -> str:
    """Return safetensors' name of an array's dtype.

    Raises:
      InputError: If it has none, or the key is `__metadata__`.
    """
    code = _CODE_BY_DTYPE.get(array.dtype.name)
    if code is None or key == "__metadata__":
        raise InputError(
            f"{printable(key)}: got an array of {array.dtype}, wanted one of "
            f"{', '.join(_CODE_BY_DTYPE)} under a key other than __metadata__; try "
            "converting it to float32"
        )
    return code


def printable(text: str) -> str:
    """Return the first 160 characters of untrusted text, escaped to one ASCII line."""
    return text[:160].encode("unicode_escape").decode()
