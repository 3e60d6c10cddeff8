"""Locks of files."""

import errno
import fcntl
import logging
import os

import pytest

from ldm_jax.files import LOCK_FILE, locked
from ldm_jax.types import InputError


def test_a_lock_that_another_holds_is_refused(tmp_path):
    folder = tmp_path / "run"
    with locked(folder, busy="taken"):
        with pytest.raises(InputError, match="taken"), locked(folder, busy="taken"):
            raise AssertionError
    with locked(folder, busy="taken"):
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_warned_of(
    tmp_path, monkeypatch, caplog, number
):
    monkeypatch.setattr(fcntl, "flock", fails_with(number))
    with caplog.at_level(logging.WARNING), locked(tmp_path, busy="taken"):
        (tmp_path / "work").write_text("done")
    (record,) = caplog.records
    assert str(tmp_path / LOCK_FILE) in record.message
    assert os.strerror(number) in record.message and "mount" in record.message


def test_an_error_of_a_lock_names_its_file_and_one_of_the_body_does_not(
    tmp_path, monkeypatch
):
    with pytest.raises(OSError) as found, locked(tmp_path, busy="taken"):
        raise OSError(errno.EIO, "bad disk")
    assert found.value.filename is None
    monkeypatch.setattr(fcntl, "flock", fails_with(errno.EIO))
    with pytest.raises(OSError) as found, locked(tmp_path, busy="taken"):
        raise AssertionError
    assert found.value.filename == str(tmp_path / LOCK_FILE)


def fails_with(number):
    def flock(*args):
        raise OSError(number, os.strerror(number))

    return flock
