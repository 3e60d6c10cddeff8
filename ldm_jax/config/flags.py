"""Command lines: every field a flag, every mistake one line.

Nothing here imports JAX, so that help and errors come at once.
"""

import argparse
import contextlib
import dataclasses
import difflib
import errno
import importlib.util
import io
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import tyro

from ldm_jax.config import Config, flatten, from_json
from ldm_jax.config.launch import Launch, add_flags, check_launch, check_local
from ldm_jax.types import InputError, Preempted, RunError, choices

T = TypeVar("T")

BAD_INPUT_EXIT_CODE = 2
FAILED_RUN_EXIT_CODE = 1
INTERRUPTED_EXIT_CODE = 130
PREEMPTED_EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: nothing is wrong, and the same command goes on."""
MAX_NUMBERS = 10_000_000
SECONDS_TO_END = 5
UNKNOWN_CHOICE = re.compile(
    r"invalid choice '(.*)' for argument '(.*)'. Expected one of \((.*)\)"
)
"""How `tyro` reports it."""
REMEDIES = {
    errno.ENOSPC: "make room there and give the same command",
    errno.EDQUOT: "make room there and give the same command",
    errno.EFBIG: "raise the limit (ulimit -f) and give the same command",
    errno.EROFS: "make it writable and give the same command, or try another folder",
    errno.EIO: "look after the disk and give the same command",
}
"""What to do where a disk, and no flag, is at fault."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainArguments:
    """What `train.py` was asked."""

    config: Config
    """The config file with the flags applied."""
    workdir: Path | None
    """Folder of the run; None for a dry run, which writes nothing."""
    launch: Launch
    """How the program starts."""
    profile: tuple[int, int] | None
    """Steps of each stage between which a trace is written, or None."""


def parse_train(args: list[str]) -> TrainArguments:
    """Read the command line of `train.py`.

    Returns:
      The checked arguments.

    Raises:
      InputError: If a flag is unknown, a value is wrong, or the config file is.
      SystemExit: After printing the help.
    """
    parser = OneLineParser(
        prog="train.py",
        add_help=False,
        allow_abbrev=False,
        description="Train both stages, or what is left of them, and say finished.",
    )
    parser.add_argument("--config", metavar="FILE.py", help="file with get_config()")
    parser.add_argument("--workdir", metavar="DIR", help="folder of the run")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="build everything by shape only and print one line of JSON",
    )
    parser.add_argument(
        "--profile",
        metavar="START:STOP",
        help="steps between which to write a trace for TensorBoard and Perfetto",
    )
    add_flags(parser)
    own, rest = parser.parse_known_args(args)
    wants_help = not {"-h", "--help"}.isdisjoint(rest)
    if own.config is None and not wants_help:
        raise InputError(
            "--config: not given, wanted a config file; try --config configs/digits.py"
        )
    default = load_config_file(own.config) if own.config else Config()
    if wants_help:
        parser.print_help()
        print("\nand every field of the config:")  # noqa: T201
    config = parse_flags(Config, rest, default=default, prog="train.py", own=parser)
    if own.workdir is None and not own.dry_run:
        raise InputError("--workdir: not given, wanted a folder; try --workdir runs/x")
    workdir = None if own.dry_run else Path(str(own.workdir))
    check_local(workdir, "--workdir")
    launch = check_launch(own, beside=workdir)
    profile = None if own.profile is None else parse_span(own.profile)
    return TrainArguments(
        config=config, workdir=workdir, launch=launch, profile=profile
    )


def parse_span(text: str) -> tuple[int, int]:
    """Read `START:STOP`, the steps of a profile.

    Raises:
      InputError: If it is no such thing.
    """
    start, _, stop = text.partition(":")
    numbers = start.isascii() and start.isdigit() and stop.isascii() and stop.isdigit()
    if not numbers or int(start) >= int(stop):
        raise InputError(
            f"--profile: got {text!r}, wanted START:STOP, the smaller first; try 10:15"
        )
    return int(start), int(stop)


def parse_flags(
    cls: type[T],
    args: list[str],
    *,
    default: T | None,
    prog: str,
    own: argparse.ArgumentParser | None = None,
) -> T:
    """Parse flags into a dataclass by `tyro`, its boxed errors folded to one line.

    Args:
      cls: A dataclass; every leaf is a flag.
      default: Values of the flags that are not given; None where some are required.
      prog: Name of the program, for the help.
      own: A parser that took flags of its own before; its flags are suggested too.

    Returns:
      The dataclass.

    Raises:
      InputError: If a flag is unknown or a value is wrong.
      SystemExit: After printing the help.
    """
    known = sorted(_flags(cls, default))
    if own is not None:
        known += [flag for action in own._actions for flag in action.option_strings]
    for arg in args:
        if arg.startswith("--") and (error := _unknown_flag(arg, known)):
            raise InputError(error)
    wants_help = not {"-h", "--help"}.isdisjoint(args)
    required = _required(cls) if default is None and not wants_help else []
    given = {arg.split("=", 1)[0] for arg in args}
    if missing := [flag for flag in required if flag not in given]:
        raise InputError(f"{missing[0]}: not given, and it has no default; see --help")
    boxed = io.StringIO()
    kwargs: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(boxed):
            parsed, stray = tyro.cli(
                cls, args=args, prog=prog, return_unknown_args=True, **kwargs
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise InputError(_unbox(boxed.getvalue())) from None
    if stray:
        raise InputError(
            f"{stray[0]}: not the value of any flag; wanted --name value pairs"
        )
    return parsed


def parse_list(text: str, *, name: str, low: int, high: int) -> list[int]:
    """Read numbers and ranges: `3`, `0-9`, `1,4,7`, `0-4,9`.

    Args:
      text: The list; order and repeats are kept.
      name: What to call it in an error.
      low: Smallest number allowed.
      high: Largest number allowed.

    Returns:
      The numbers, in order.

    Raises:
      InputError: If the text is no such list, a range runs backwards, or a number
        is out of range.
    """
    form = "numbers and ranges such as 3, 0-9 or 1,4,7"
    numbers: list[int] = []
    for part in text.split(","):
        ends = part.strip().split("-")
        if len(ends) > 2 or not all(end.isascii() and end.isdigit() for end in ends):
            raise InputError(f"{name}: got {text!r}, wanted {form}")
        first, last = int(ends[0]), int(ends[-1])
        if first > last:
            raise InputError(
                f"{name}: got the range {part.strip()!r}, wanted the smaller number "
                f"first; try {last}-{first}"
            )
        outside = [end for end in (first, last) if not low <= end <= high]
        if outside:
            raise InputError(f"{name}: got {outside[0]}, wanted {low} to {high}")
        if last - first >= MAX_NUMBERS:
            raise InputError(
                f"{name}: got {part.strip()}, wanted at most {MAX_NUMBERS} numbers"
            )
        numbers.extend(range(first, last + 1))
    return numbers


def load_config_file(path: str) -> Config:
    """Run a config file and return what its `get_config()` returns; or read JSON.

    Args:
      path: A Python file, or a run's `config.json`.

    Returns:
      The config.

    Raises:
      InputError: If the file is not there, does not run, has no `get_config`, or
        returns something else.
    """
    if not os.path.isfile(path):
        raise InputError(f"--config: no file {path!r}; try configs/digits.py")
    if path.endswith(".json"):
        with open(path, encoding="utf-8", errors="replace") as file:
            text = file.read()
        try:
            return from_json(text)
        except InputError as error:
            raise InputError(f"--config: {path}: {error}") from None
    spec = importlib.util.spec_from_file_location("ldm_jax_config", path)
    if spec is None or spec.loader is None:
        raise InputError(f"--config: got {path!r}, wanted a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        get_config: Callable[[], Any] | None = getattr(module, "get_config", None)
        if not callable(get_config):
            raise InputError(
                f"--config: {path} has no function get_config(); see configs/digits.py"
            )
        config = get_config()
    except InputError as error:
        text = str(error)
        raise InputError(
            text if text.startswith("--config") else f"--config: {path}: {text}"
        ) from None
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1].lineno
        raise InputError(
            f"--config: {path} line {where} raised {type(error).__name__}: "
            f"{_one_line(str(error))}"
        ) from error
    if not isinstance(config, Config):
        raise InputError(
            f"--config: get_config() in {path} returned {type(config).__name__}, "
            "wanted ldm_jax.config.Config"
        )
    return config


def run_main(main: Callable[[list[str]], None], prog: str) -> NoReturn:
    """Run a program; turn what a user can mend into one line and an exit code.

    Args:
      main: Takes the arguments without the program's name.
    """
    code, message = 0, ""
    try:
        main(sys.argv[1:])
    except Preempted as stop:
        sys.stdout.flush()
        sys.stderr.write(f"\n{prog}: preempted: {stop}; the same command goes on\n")
        sys.exit(PREEMPTED_EXIT_CODE)
    except InputError as error:
        code, message = BAD_INPUT_EXIT_CODE, str(error)
    except RunError as error:
        code, message = FAILED_RUN_EXIT_CODE, str(error)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        code, message = BAD_INPUT_EXIT_CODE, f"{where}{error.strerror or error}"
        if remedy := REMEDIES.get(error.errno or 0):
            code, message = FAILED_RUN_EXIT_CODE, f"{message}; {remedy}"
    except KeyboardInterrupt:
        code, message = INTERRUPTED_EXIT_CODE, "interrupted; the same command resumes"
    except SystemExit:
        raise
    except BaseException:
        _end_soon(FAILED_RUN_EXIT_CODE)
        raise
    if code:
        _end_soon(code)
        sys.stdout.flush()
        sys.stderr.write(f"\n{prog}: error: {_one_line(message)}\n")
    sys.exit(code)


def _end_soon(code: int) -> None:
    """End a process that failed alone, though it waits for others that wait for it."""
    jax = sys.modules.get("jax")
    if jax is None or not jax.distributed.is_initialized():
        return
    # Process 0 last: the others would print that they miss it.
    seconds = SECONDS_TO_END + 2 * (jax.process_index() == 0)
    end = threading.Timer(seconds, os._exit, [code])
    end.daemon = True
    end.start()


class OneLineParser(argparse.ArgumentParser):
    """An argparse parser whose errors are `InputError`s."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and exiting."""
        raise InputError(message)


def _flags(cls: type[Any], default: Any) -> list[str]:
    names = (
        [_flag_name(field) for field in dataclasses.fields(cls)]
        if default is None
        else list(flatten(default))
    )
    dashed = [name.replace("_", "-") for name in names]
    negated = [f"{head}{dot}no-{tail}" for head, dot, tail in map(_split, dashed)]
    return [f"--{name}" for name in dashed + negated] + ["--help"]


def _flag_name(field: dataclasses.Field[Any]) -> str:
    """Return the name of a field's flag, which `tyro.conf.arg` may change."""
    notes = getattr(field.type, "__metadata__", ())
    given = [name for note in notes if (name := getattr(note, "name", None))]
    return given[0] if given else field.name


def _required(cls: type[Any]) -> list[str]:
    return [
        f"--{field.name.replace('_', '-')}"
        for field in dataclasses.fields(cls)
        if field.default is dataclasses.MISSING
    ]


def _split(name: str) -> tuple[str, str, str]:
    head, dot, tail = name.rpartition(".")
    return head, dot, tail


def _unknown_flag(arg: str, known: list[str]) -> str | None:
    flag = arg.split("=", 1)[0].replace("_", "-")
    if flag in known:
        return None
    near = difflib.get_close_matches(
        flag, [name for name in known if ".no-" not in name], 1, 0.4
    )
    hint = f"did you mean {near[0]}?" if near else "see --help"
    return f"{arg.split('=', 1)[0]}: no such flag; {hint}"


def _unbox(text: str) -> str:
    """Take the message out of tyro's box, up to its first rule."""
    lines = []
    for line in text.splitlines():
        inner = line.strip().strip("│").strip()
        if line.startswith("╭"):
            continue
        if not inner or set(inner) <= set("─╰╯"):
            break
        lines.append(inner)
    message = " ".join(lines).removeprefix("Error parsing ")
    if found := UNKNOWN_CHOICE.match(message):
        names = [name.strip("' ") for name in found[3].split(",")]
        wanted = sorted(name for name in names if name != "None")
        return f"{found[2]}: {choices(found[1], wanted)}"
    return message or _one_line(text)


def _one_line(text: str) -> str:
    return " ".join(text.split())
