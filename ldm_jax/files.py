"""Files: written whole or not at all, read with bounds, and compared with a record.

A run records the SHA-256 of every file that enters its result (`digests.json`); a file
that differs is not read. NumPy is imported where arrays are written, since `--help`
reads configs without it.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from ldm_jax.types import InputError

DTYPE_BY_CODE: Mapping[str, str] = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
"""Names of NumPy's dtypes by safetensors' names of element types; see `dtype_of`."""

LOCK_FILE = ".lock"
DIGESTS_FILE = "digests.json"
"""The record of a run's files, in its folder."""
ANEW = "delete it and give the same ldm train command again: it is made anew"
"""What mends a damaged file of a run."""
LARGEST_JSON = 2**28
"""Bytes of a JSON file; a vocabulary has 2**24."""
CHUNK = 2**20


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the path to an `OSError` that does not name a file, as those of `write`."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL})
"""Of a file system without locks: Lustre without -o flock, some NFS and FUSE."""


@contextlib.contextmanager
def locked(folder: Path, *, busy: str) -> Iterator[None]:
    """Hold the lock of a folder, which is created, against other processes.

    Where the file system has no locks, a warning says so, and the body runs.

    Args:
      folder: Folder; the lock is a file in it.
      busy: Message of the error.

    Raises:
      InputError: If another process holds it.
      OSError: If the folder cannot be created or locked.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_FILE
    with path.open("a") as file:
        try:
            with naming(path):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(busy) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            logging.getLogger(__name__).warning(
                "%s: this file system has no locks (%s): see to it that no other "
                "process writes here, or mount it with locks (Lustre: -o flock)",
                path,
                error.strerror,
            )
        yield


def write_text(path: Path, text: str, *, run: Path | None = None) -> None:
    """Write text atomically.

    Args:
      run: Folder of the run whose record is to name the file; None for no record.

    Raises:
      OSError: If it cannot be written.
    """
    write_file(path, lambda file: file.write(text.encode()), run=run)


def write_json(path: Path, value: Any, *, run: Path | None = None) -> None:
    """Write JSON atomically; `run` as in `write_text`.

    Raises:
      OSError: If it cannot be written.
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n", run=run)


def write_file(
    path: Path, write: Callable[[BinaryIO], object], *, run: Path | None = None
) -> None:
    """Write a file that a loss of power leaves whole: the new one or the old one.

    It is recorded before it gets its name, so a file of a run always has its digest.

    Args:
      write: Writes the content.
      run: As in `write_text`.

    Raises:
      OSError: If it cannot be written.
    """
    part = path.with_name(path.name + ".part")
    with naming(part), part.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    if run is not None:
        record_file(run, path, file_sha256(part))
    os.replace(part, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Write the names of a folder's files to the disk, where the file system can."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(number)


def read_json(
    path: Path, *, remedy: str = "try downloading it again"
) -> dict[str, Any]:
    """Read a file of one JSON object.

    Args:
      remedy: What to try if the file is damaged.

    Raises:
      InputError: If the file cannot be read or holds anything else.
    """
    text = read_text(path, remedy=remedy)
    content = parse_json(text, what=str(path), remedy=remedy)
    if not isinstance(content, dict):
        raise InputError(
            f"{path}: got a JSON {type(content).__name__}, wanted an object; {remedy}"
        )
    return content


def read_text(path: Path, *, remedy: str) -> str:
    """Read a file of text in UTF-8.

    Raises:
      InputError: If it is missing, not a regular file, too large, or not UTF-8.
    """
    wanted = "wanted a file of text"
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: got no regular file, {wanted}; {remedy}")
        if (size := path.stat().st_size) > LARGEST_JSON:
            raise InputError(
                f"{path}: got {size} bytes, wanted at most {LARGEST_JSON}; {remedy}"
            )
        return path.read_bytes().decode()
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"{path}: cannot be read ({reason}), {wanted}; {remedy}"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: got a file that is not UTF-8 ({error.reason} at byte "
            f"{error.start}); {remedy}"
        ) from error


def parse_json(text: str, *, what: str, remedy: str) -> Any:
    """Parse JSON of any origin: the parser of all files.

    Args:
      what: Names the text in errors.
      remedy: What to try if it is damaged.

    Raises:
      InputError: If it is not JSON, nested too deeply, or holds an integer of thousands
        of digits.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{what}: not JSON ({printable(str(error))}); {remedy}"
        ) from error


def json_digest(value: Mapping[str, Any]) -> str:
    """Return the sha256 of a JSON object in a canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            total.update(chunk)
    return total.hexdigest()


def read_record(run: Path) -> dict[str, Any] | None:
    """Read the record of a run: who it is, and the digests of its files and stages.

    Returns:
      `configs`, `data`, `files`, `stages` and, if the run was changed, `changes`: their
      `fields` with the old and the new value, and the `steps` at which they were made;
      None for weights and for the runs of versions that kept no record.

    Raises:
      InputError: If it is damaged.
    """
    path = run / DIGESTS_FILE
    if not path.exists():
        return None
    remedy = (
        "delete it and give the same ldm train command again: the checkpoints hold "
        "a copy"
    )
    record = read_json(path, remedy=remedy)
    kinds = {"configs": list, "files": dict, "stages": dict, "changes": list}
    found = {"changes": [], **record}
    wrong = any(not isinstance(found.get(k), kind) for k, kind in kinds.items())
    wrong = wrong or not all(map(_is_change, found["changes"]))
    if record.pop("sha256", None) != json_digest(record) or wrong:
        raise InputError(f"{path}: got another content than was written; {remedy}")
    return record


def _is_change(value: Any) -> bool:
    """Return whether JSON has the form of a run's change."""
    if not isinstance(value, dict) or value.keys() != {"fields", "steps"}:
        return False
    if not all(isinstance(part, dict) for part in value.values()):
        return False
    pairs = all(isinstance(x, list) and len(x) == 2 for x in value["fields"].values())
    return pairs and all(type(step) is int for step in value["steps"].values())


def read_changes(run: Path) -> list[dict[str, Any]]:
    """Read how a run was changed, from its record; [] without one.

    Raises:
      InputError: If it is damaged.
    """
    return (read_record(run) or {}).get("changes", [])


def write_record(run: Path, record: Mapping[str, Any]) -> None:
    """Write the record of a run.

    Raises:
      OSError: If it cannot be written.
    """
    write_json(run / DIGESTS_FILE, {**record, "sha256": json_digest(record)})


def record_file(run: Path, path: Path, digest: str) -> None:
    """Write the digest of a file into the record of its run, if the run keeps one."""
    record = read_record(run)
    name = path.relative_to(run).as_posix()
    if record is not None and record["files"].get(name) != digest:
        write_record(run, {**record, "files": {**record["files"], name: digest}})


def check_file(run: Path, path: Path, *, remedy: str = ANEW) -> None:
    """Compare a file with the record of its run, if it is there and the run keeps one.

    Raises:
      InputError: If it is not what the run wrote.
    """
    record = read_record(run)
    if record is None or not path.exists():
        return
    wanted = record["files"].get(path.relative_to(run).as_posix())
    got = file_sha256(path) if path.is_file() else "none"
    if got != wanted:
        wanted = str(wanted)[:12].lower()
        raise InputError(
            f"{path}: got a file of the digest {got[:12]}, wanted {wanted}, of the one "
            f"that the run wrote; {remedy}"
        )


def dtype_of(code: str) -> Any:
    """Return the little-endian NumPy dtype of safetensors' name of an element type."""
    import ml_dtypes
    import numpy as np

    if code == "BF16":
        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(DTYPE_BY_CODE[code]).newbyteorder("<")


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
    *,
    run: Path | None = None,
) -> None:
    """Write a safetensors file atomically; equal input gives equal bytes.

    The safetensors library does not: it orders metadata at random, and writes arrays
    that are not contiguous wrongly.

    Args:
      path: File; replaced if it exists.
      tensors: Arrays by key.
      metadata: Metadata of the file.
      run: As in `write_text`.

    Raises:
      InputError: If an array has an unknown dtype or the key `__metadata__`, or the
        file cannot be written.

    Source:
      The format, https://huggingface.co/docs/safetensors.
    """
    import numpy as np

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

    def write(file: BinaryIO) -> None:
        file.write(struct.pack("<Q", len(text)) + text)
        for key in order:
            array = np.ascontiguousarray(arrays[key], dtype_of(codes[key]))
            file.write(array.reshape(-1).view(np.uint8).data)

    try:
        write_file(path, write, run=run)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror or error}); try a folder that "
            "is there and that you may write to"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            path.with_name(path.name + ".part").unlink(missing_ok=True)


def dtype_code(key: str, array: Any) -> str:
    """Return safetensors' name of an array's dtype.

    Raises:
      InputError: If it has none, or the key is `__metadata__`.
    """
    codes = {dtype: code for code, dtype in DTYPE_BY_CODE.items()}
    code = codes.get(array.dtype.name)
    if code is None or key == "__metadata__":
        raise InputError(
            f"{printable(key)}: got an array of {array.dtype}, wanted one of "
            f"{', '.join(codes)} under a key other than __metadata__; try "
            "converting it to float32"
        )
    return code


def printable(text: str) -> str:
    """Return the first 160 characters of untrusted text, escaped to one ASCII line."""
    return text[:160].encode("unicode_escape").decode()
