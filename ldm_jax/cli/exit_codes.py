"""Exit codes of programs; an error that a user can correct is one line."""

import errno
import os
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from typing import NoReturn

from ldm_jax.cli.streams import give_up_stdout, open_streams
from ldm_jax.config.flags import asks_help
from ldm_jax.types import InputError, Preempted, RunError

BAD_INPUT = 2
FAILED_RUN = 1
INTERRUPTED = 130
PREEMPTED = 75
"""EX_TEMPFAIL of sysexits.h: not an error; the same command resumes."""
SECONDS_TO_END = 5
MAX_LINE = 2000
"""Characters of the line that ends a program."""
MAX_DETAILS = 200
"""Characters quoted of another library's error."""
REMEDIES = {
    errno.ENOSPC: "make room there and give the same command",
    errno.EDQUOT: "make room there and give the same command",
    errno.EFBIG: "raise the limit (ulimit -f) and give the same command",
    errno.EROFS: "make it writable and give the same command, or try another folder",
    errno.EIO: "look after the disk and give the same command",
}
"""Advice by error number, for errors of a disk and not of a flag."""


def run_main(
    main: Callable[[list[str]], int | None],
    prog: str,
    args: list[str] | None = None,
) -> NoReturn:
    """Run a program, and exit with its code.

    Args:
      main: Takes the arguments without the program's name; returns the exit code,
        None for 0.
      prog: The program's name, for errors.
      args: The arguments; those of this process by default.
    """
    open_streams()
    code, message = _outcome(main, sys.argv[1:] if args is None else args)
    if message:
        if code != PREEMPTED:
            _end_soon(code)
        give_up_stdout()
        sys.stderr.write(f"\n{prog}: {_one_line(message)}\n")
    sys.exit(code)


def _outcome(
    main: Callable[[list[str]], int | None], args: list[str]
) -> tuple[int, str]:
    """Run a program; return its exit code, and what to say where it is not 0."""
    try:
        try:
            code = main(args) or 0
        except SystemExit as stop:
            _check_own(stop, args)
            code = 0
        sys.stdout.flush()
    except Preempted as stop:
        return PREEMPTED, f"preempted: {stop}; the same command goes on"
    except InputError as error:
        return BAD_INPUT, f"error: {error}"
    except RunError as error:
        return FAILED_RUN, f"error: {error}"
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        line = f"error: {where}{error.strerror or error}"
        if remedy := REMEDIES.get(error.errno or 0):
            return FAILED_RUN, f"{line}; {remedy}"
        return BAD_INPUT, line
    except KeyboardInterrupt:
        return INTERRUPTED, "error: interrupted; the same command resumes"
    except Exception as error:
        return FAILED_RUN, f"error: {_unforeseen(error)}"
    except BaseException:
        _end_soon(FAILED_RUN)
        raise
    return code, ""


def _check_own(stop: SystemExit, args: list[str]) -> None:
    """Raise `RunError` for an exit that is not ours: something is left undone.

    The help alone ends by an exit, with 0. A user's Python file (a data set's builder)
    may call `sys.exit` too.
    """
    if not stop.code and asks_help(args):
        return
    last = traceback.extract_tb(stop.__traceback__)[-1]
    raise RunError(
        f"{last.filename} line {last.lineno} called sys.exit({stop.code!r}), wanted it "
        "to return: nothing was finished"
    ) from None


def _unforeseen(error: Exception) -> str:
    """Say what went wrong that no message was written for, and where to read more."""
    details = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in details:
        return (
            f"out of memory ({details[:MAX_DETAILS]}); try a smaller batch, image or "
            "network, or fewer images at a time"
        )
    lines = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="ldm_", suffix=".txt", delete=False, errors="backslashreplace"
        ) as file:
            file.write(lines)
    except OSError:
        return f"unforeseen {details}"
    return (
        f"unforeseen {details[: MAX_LINE // 2]}; {file.name} says where it was raised"
    )


def _one_line(message: str) -> str:
    """Make one printable line of bounded length."""
    line = " ".join(message.split())
    if len(line) > MAX_LINE:
        line = f"{line[: MAX_LINE // 2]} ... {line[-MAX_LINE // 2 :]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def _end_soon(code: int) -> None:
    """End a failed process soon: it and the others would wait for each other."""
    jax = sys.modules.get("jax")
    if jax is None or not jax.distributed.is_initialized():
        return
    # Process 0 ends last: the others would print that they lost it.
    seconds = SECONDS_TO_END + 2 * (jax.process_index() == 0)
    end = threading.Timer(seconds, os._exit, [code])
    end.daemon = True
    end.start()
