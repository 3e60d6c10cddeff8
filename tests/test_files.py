"""Files: written whole and on the disk, read with one error, compared with a record."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from ldm_jax.files import (
    check_file,
    parse_json,
    read_json,
    read_record,
    write_json,
    write_record,
    write_safetensors,
)
from ldm_jax.types import InputError

HOSTILE = {
    "empty": (b"", "not JSON"),
    "binary": (b"\x80\x00\xff" * 99, "not UTF-8"),
    "cut": (b'{"a": 1', "not JSON"),
    "list": (b"[]", "got a JSON list"),
    "null": (b"null", "got a JSON NoneType"),
    "deep list": (b"[" * 10**5, "not JSON"),
    "deep object": (b'{"a":' * 10**5, "not JSON"),
    "closed deep list": (b"[" * 10**5 + b"]" * 10**5, "not JSON"),
    "integer of 5000 digits": (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
    "negative one": (b'{"a": -' + b"9" * 5000 + b"}", "not JSON"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
}
EMPTY = {"configs": [], "data": None, "files": {}, "stages": {}}


@pytest.mark.parametrize("content, words", HOSTILE.values(), ids=HOSTILE)
def test_a_damaged_json_file_is_one_line_with_its_path(tmp_path, content, words):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_json(path, remedy="try another")
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{path}: ") and line.endswith("try another")
    assert words in line and len(line) < 400


def test_what_is_no_regular_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for name, words in [("fifo", "no regular"), (".", "no regular"), ("x", "No such")]:
        with pytest.raises(InputError, match=words):
            read_json(tmp_path / name)


def test_a_json_file_has_a_largest_size(tmp_path):
    path = tmp_path / "x.json"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(InputError, match="at most"):
        read_json(path)


def test_any_json_value_is_parsed():
    for value in ([1, None], "x", 0.5, {"a": {}}):
        assert parse_json(json.dumps(value), what="it", remedy="") == value


@pytest.mark.parametrize("write", ["json", "safetensors"])
def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch, write):
    done = []

    def fsync(number):
        done.append(Path(os.readlink(f"/proc/self/fd/{number}")).name)

    def replace(part, path):
        done.append(f"{Path(part).name} -> {Path(path).name}")
        rename(part, path)

    rename = os.replace
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    if write == "json":
        write_json(tmp_path / "x", {})
    else:
        write_safetensors(tmp_path / "x", {"w": np.zeros(3)})
    assert done == ["x.part", "x.part -> x", tmp_path.name]


def test_a_file_of_a_run_is_compared_with_its_record(tmp_path):
    path = tmp_path / "a/x.json"
    path.parent.mkdir()
    write_json(path, {"a": 1}, run=tmp_path)  # no record: a run of an older version
    check_file(tmp_path, path)
    write_record(tmp_path, EMPTY)
    with pytest.raises(InputError, match="wanted none"):
        check_file(tmp_path, path)
    write_json(path, {"a": 1}, run=tmp_path)
    check_file(tmp_path, path)
    assert list(read_record(tmp_path)["files"]) == ["a/x.json"]
    path.write_text('{"a": 2}')
    with pytest.raises(InputError, match=r"x\.json: got a file of the digest"):
        check_file(tmp_path, path)


def test_every_bit_of_a_record_counts(tmp_path):
    write_record(tmp_path, {**EMPTY, "files": {"x": "ab" * 32}})
    path = tmp_path / "digests.json"
    content = path.read_bytes()
    before = read_record(tmp_path)
    for bit in range(0, 8 * len(content), 5):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        try:
            assert read_record(tmp_path) == before  # a space, or a digit's case
        except InputError:
            continue
