"""Standard streams that are closed, or whose reader goes away: the work goes on."""

import contextlib
import io
import os
import sys
from typing import Any, TextIO

from ldm_jax.types import InputError


class _Pipe(io.FileIO):
    """A file whose reader may go, as `| head` does: what follows is not written."""

    def write(self, data: Any) -> int:
        """Write some of the bytes; all of them count as written if nobody reads."""
        try:
            return super().write(data)
        except BrokenPipeError:
            return memoryview(data).nbytes


def open_streams() -> None:
    """Make the standard streams safe to write to.

    A closed one becomes /dev/null, since Python would have none there and the next file
    to be opened would take its number. A pipe without a reader swallows what is
    written. Letters that the terminal cannot show are escaped.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None or stream is getattr(sys, f"__{name}__"):
            setattr(sys, name, _open(descriptor, stream))


def _open(descriptor: int, stream: TextIO | None) -> TextIO:
    pipe = _Pipe(descriptor, "w", closefd=False)
    if stream is None:
        return io.TextIOWrapper(io.BufferedWriter(pipe), encoding="utf-8")
    stream.flush()
    unbuffered = getattr(stream, "write_through", False)  # python -u
    return io.TextIOWrapper(
        pipe if unbuffered else io.BufferedWriter(pipe),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=getattr(stream, "line_buffering", False),
        write_through=unbuffered,
    )


def check_stdout() -> None:
    """Raise `InputError` if an answer that is only printed would reach nobody."""
    if sys.__stdout__ is None:
        raise InputError("stdout: it is closed, and the answer goes there; try > FILE")


def give_up_stdout() -> None:
    """Write what can be written of the output, and drop the rest."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        return
    # Python would try once more at its end, and change the exit code.
    sys.stdout = open(os.devnull, "w")
