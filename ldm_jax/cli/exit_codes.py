"""Exit codes of programs; an error that a user can correct is one line."""

import errno
import os
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

from ldm_jax.types import InputError, Preempted, RunError

BAD_INPUT = 2
FAILED_RUN = 1
INTERRUPTED = 130
PREEMPTED = 75
"""EX_TEMPFAIL of sysexits.h: not an error; the same command resumes."""
SECONDS_TO_END = 5
REMEDIES = {
    errno.ENOSPC: "make room there and give the same command",
    errno.EDQUOT: "make room there and give the same command",
    errno.EFBIG: "raise the limit (ulimit -f) and give the same command",
    errno.EROFS: "make it writable and give the same command, or try another folder",
    errno.EIO: "look after the disk and give the same command",
}
"""Advice by error number, for errors of a disk and not of a flag."""


def run_main(
    main: Callable[[list[str]], None], prog: str, args: list[str] | None = None
) -> NoReturn:
    """Run a program, and exit with its code.

    Args:
      main: Takes the arguments without the program's name.
      prog: The program's name, for errors.
      args: The arguments; those of this process by default.
    """
    code, message = 0, ""
    try:
        main(sys.argv[1:] if args is None else args)
    except Preempted as stop:
        sys.stdout.flush()
        sys.stderr.write(f"\n{prog}: preempted: {stop}; the same command goes on\n")
        sys.exit(PREEMPTED)
    except InputError as error:
        code, message = BAD_INPUT, str(error)
    except RunError as error:
        code, message = FAILED_RUN, str(error)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        code, message = BAD_INPUT, f"{where}{error.strerror or error}"
        if remedy := REMEDIES.get(error.errno or 0):
            code, message = FAILED_RUN, f"{message}; {remedy}"
    except KeyboardInterrupt:
        code, message = INTERRUPTED, "interrupted; the same command resumes"
    except SystemExit:
        raise
    except BaseException:
        _end_soon(FAILED_RUN)
        raise
    if code:
        _end_soon(code)
        sys.stdout.flush()
        sys.stderr.write(f"\n{prog}: error: {' '.join(message.split())}\n")
    sys.exit(code)


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
