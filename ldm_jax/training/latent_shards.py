"""Shards of a latent cache: written atomically, found again by size and digest."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

from ldm_jax.data.latent_cache import CacheNote, Shard, shard_name, to_json
from ldm_jax.files import file_sha256, json_digest, read_json, sync_folder, write_json
from ldm_jax.types import InputError, RunError


def find_shards(out: Path, note: CacheNote, wanted: Iterable[int]) -> dict[int, Shard]:
    """Find the intact shards of a cache among `wanted`; reads every byte."""
    found = {}
    for shard in wanted:
        path = out / shard_name(shard, note.num_shards)
        try:
            details = read_json(_proof(path))
            here = file_digest(path)
        except (OSError, InputError):
            continue
        if details == {**here._asdict(), "of": _key(note)}:
            found[shard] = here
    return found


def make_shard(
    out: Path, shard: int, note: CacheNote, records: Iterable[bytes]
) -> Shard:
    """Write a shard, and beside it the file that proves it intact.

    Raises:
      RunError: If it cannot be written.
    """
    path = out / shard_name(shard, note.num_shards)
    write_records(path, records)
    made = file_digest(path)
    write_json(_proof(path), {**made._asdict(), "of": _key(note)})
    return made


def _proof(path: Path) -> Path:
    return path.with_suffix(".json")


def _key(note: CacheNote) -> str:
    """Return a digest of a note that does not depend on which shards exist."""
    return json_digest({**to_json(dataclasses.replace(note, shards=())), "format": 1})


def write_records(path: Path, records: Iterable[bytes]) -> None:
    """Write a file of records atomically; equal records give equal bytes.

    Raises:
      RunError: If it cannot be written.
    """
    part = path.with_name(path.name + ".part")
    writer = array_record_module.ArrayRecordWriter(str(part), "group_size:1")
    try:
        for record in records:
            _writing(part, lambda record=record: writer.write(record))
        _writing(part, writer.close)
    finally:
        if writer.is_open():
            with contextlib.suppress(RuntimeError):
                writer.close()
    with part.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(part, path)
    sync_folder(path.parent)


def _writing(path: Path, write: Callable[[], None]) -> None:
    try:
        write()
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:160]
        raise RunError(
            f"{path}: cannot be written ({reason}); make room there, or make it "
            "writable, and give the same command"
        ) from None


def file_digest(path: Path) -> Shard:
    """Return the size and the sha256 of a file."""
    return Shard(path.stat().st_size, file_sha256(path))
