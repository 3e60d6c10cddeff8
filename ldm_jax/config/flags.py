"""Command lines: every field of a dataclass is a flag, every mistake one line.

Nothing here imports JAX, so that help and errors come at once.
"""

import contextlib
import dataclasses
import difflib
import inspect
import io
import itertools
import re
import sys
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeVar

import tyro

from ldm_jax.config.load_config import load_config
from ldm_jax.config.validation import MAY_BE_EMPTY, UNIONS, Text, in_words, shown
from ldm_jax.types import InputError, choices

T = TypeVar("T")

Inline = tyro.conf.arg(name="")
"""Marks a field whose own fields are flags without its name before them."""
Positional = tyro.conf.Positional
IS_POSITIONAL = typing.get_args(Positional[str])[1]
MAX_NUMBERS = 10_000_000


def parse_flags(
    cls: type[T], args: list[str], *, prog: str, default: T | None = None
) -> T:
    """Parse flags into a dataclass by `tyro`, its boxed errors folded to one line.

    Args:
      cls: A dataclass; every leaf is a flag, described by the string behind it.
      prog: Name of the program, for the help.
      default: Values of the flags that are not given; those of `cls` by default.

    Raises:
      InputError: If a flag is unknown, missing, or its value is wrong.
      SystemExit: After printing the help.
    """
    known = dict(_flags(cls))
    given = [arg.split("=", 1)[0] for arg in args if arg.startswith("--")]
    for flag in given:
        _check_known(flag, known)
    _check_filled(args, known, cls)
    wants_help = asks_help(args)
    for flag in _required(cls) if default is None and not wants_help else ():
        if flag not in map(_dashed, given):
            raise InputError(f"{flag}: not given, and it has no default; see --help")
    if wants_help:  # by ourselves: `tyro` would join the lines of the examples
        sys.stdout.write(f"{inspect.cleandoc(cls.__doc__ or '')}\n\n")
    boxed = io.StringIO()
    kwargs: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(boxed):
            parsed, stray = tyro.cli(
                cls,
                args=args,
                prog=prog,
                description="",
                return_unknown_args=True,
                **kwargs,
            )
    except InputError as error:  # of an `Inline` part
        raise InputError(_named_as_typed("", str(error), cls)) from None
    except SystemExit as stop:
        if not stop.code:
            raise
        text = _unbox(boxed.getvalue())
        raise InputError(_explain(stop, text, args, cls)) from None
    if stray:
        raise InputError(
            f"{stray[0]}: not the value of any flag; wanted --name value pairs"
        )
    return parsed


def parse_flags_with_config(cls: type[T], args: list[str], *, prog: str) -> T:
    """Parse flags of a command that takes a config and every field of it.

    Args:
      cls: A dataclass with defaults, with the fields `config_name`, whose flag is
        --config, and `config`, which is `Inline`.
      prog: Name of the program, for the help.

    Raises:
      InputError: If a flag is unknown or a value is wrong, or the config file is.
      SystemExit: After printing the help.
    """
    named = ""
    for arg, after in itertools.pairwise([*args, ""]):
        flag, equals, value = arg.partition("=")
        if flag == "--config":
            named = value if equals else after
    if not named or asks_help(args):
        return parse_flags(cls, args, prog=prog)
    kwargs: dict[str, Any] = {"config": load_config(named)}
    return parse_flags(cls, args, prog=prog, default=cls(**kwargs))


def asks_help(args: list[str]) -> bool:
    """Return whether a command line asks for the help, whatever else it says."""
    return not {"-h", "--help"}.isdisjoint(args)


def as_flag(error: InputError) -> InputError:
    """Name the flag in the place of the field that an error begins with."""
    field, colon, details = str(error).partition(":")
    return InputError(f"--{_dashed(field)}{colon}{details}")


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
        if len(ends) > 2 or not all(re.fullmatch("[0-9]{1,18}", end) for end in ends):
            raise InputError(f"{name}: got {shown(text)}, wanted {form}")
        first, last = int(ends[0]), int(ends[-1])
        if first > last:
            raise InputError(
                f"{name}: got the range {part.strip()!r}, wanted the smaller number "
                f"first; try {last}-{first}"
            )
        outside = [end for end in (first, last) if not low <= end <= high]
        if outside:
            raise InputError(f"{name}: got {outside[0]}, wanted {low} to {high}")
        if len(numbers) + last - first >= MAX_NUMBERS:
            raise InputError(
                f"{name}: got {part.strip()}, wanted at most {MAX_NUMBERS} numbers"
            )
        numbers.extend(range(first, last + 1))
    return numbers


def _flags(cls: type[Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each flag of a dataclass, as tyro names it, with its annotation."""
    for field in dataclasses.fields(cls):
        name, annotation = field.name, field.type
        for mark in _marks(annotation):
            if (other := getattr(mark, "name", None)) is not None:
                name = other
        plain = annotation
        while typing.get_origin(plain) is Annotated and plain is not Text:
            plain = typing.get_args(plain)[0]
        path = f"{prefix}.{name}".strip(".")
        if dataclasses.is_dataclass(plain):
            yield from _flags(typing.cast(type[Any], plain), path)
        elif IS_POSITIONAL not in _marks(annotation):
            yield f"--{_dashed(path)}", plain


def _required(cls: type[Any]) -> list[str]:
    none = dataclasses.MISSING
    fields = [f for f in dataclasses.fields(cls) if f.default is f.default_factory]
    names = [f"--{_dashed(f.name)}" for f in fields if f.default is none]
    return [name for name in names if name in dict(_flags(cls))]


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _check_known(arg: str, known: dict[str, Any]) -> None:
    flag = _dashed(arg)
    switch = re.sub(r"(^--|\.)no-", r"\1", flag)
    if flag in known or flag == "--help" or known.get(switch) is bool:
        return
    near = difflib.get_close_matches(flag, known, 1, 0.4)
    hint = f"did you mean {near[0]}?" if near else "see --help"
    raise InputError(f"{arg}: no such flag; {hint}")


def _check_filled(args: list[str], known: dict[str, Any], cls: type[Any]) -> None:
    """Refuse an empty value, such as a variable of the shell that is not set.

    A path that is empty would be the present folder.
    """
    flag, num_values = "", 0
    for arg in args:
        value = arg
        if arg.startswith("--"):
            flag, equals, value = arg.partition("=")
            flag, num_values = _dashed(flag), 0
            if not equals:
                continue
        kind = known.get(flag, bool)
        num_values += 1
        if kind is bool or (num_values > 1 and not _is_sequence(kind)):
            kind, flag = str, _positional(cls)
        if not value.strip() and not _may_be_empty(kind):
            raise InputError(
                f"{flag}: got {value!r}, which is empty, wanted {in_words(kind)}; is a "
                "variable of the shell not set?"
            )


def _may_be_empty(kind: Any) -> bool:
    parts = typing.get_args(kind)
    return MAY_BE_EMPTY in parts or any(map(_may_be_empty, parts))


def _is_sequence(kind: Any) -> bool:
    parts = typing.get_args(kind)
    return typing.get_origin(kind) is tuple or any(map(_is_sequence, parts))


def _positional(cls: type[Any]) -> str:
    fields = dataclasses.fields(cls)
    marked = (f.name for f in fields if IS_POSITIONAL in _marks(f.type))
    return next(marked, "value").upper()


def _marks(annotation: Any) -> tuple[Any, ...]:
    return getattr(annotation, "__metadata__", ())


def _explain(stop: BaseException, text: str, args: list[str], cls: type[Any]) -> str:
    """Say in one line, under the flag's name, what tyro says in a box."""
    known = dict(_flags(cls))
    error: BaseException | None = stop
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__ or error.__context__
    if error is not None:
        found = re.search(r"Error parsing ([\w.-]+):", text)
        where = found[1] if found else ""
        if where in known:  # a value of this one flag
            return f"{where}: {error}"
        return _named_as_typed(where, str(error), cls)
    if (found := re.search(r"--[a-z][\w.-]*", text)) is None:
        missing = re.search(r"argument '(\w+)'|Missing from [^:]*: (\w+)", text)
        name = missing and (missing[1] or missing[2]).upper()
        return f"{name}: not given; see --help" if name else text
    flag = found[0].rstrip(".")
    values = _values(flag, args)
    if not values:
        return f"{flag}: got no value, wanted {in_words(known[flag])}"
    kind = known[flag]
    while typing.get_origin(kind) in (*UNIONS, tuple):
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) is Literal:
        names = tuple(map(str, typing.get_args(kind)))
        wrong = [value for value in values if value not in names]
        return f"{flag}: {choices(wrong[0], names)}" if wrong else text
    return f"{flag}: got {shown(' '.join(values))}, wanted {in_words(known[flag])}"


def _named_as_typed(path: str, message: str, cls: type[Any]) -> str:
    """Put a flag in the place of the field that a message begins with."""
    known = dict(_flags(cls))
    field, colon, details = message.partition(":")
    parts = [*path.split("."), *field.split(".")]
    for i in range(len(parts)):
        if (flag := f"--{_dashed('.'.join(parts[i:]))}") in known:
            return f"{flag}{colon}{details}"
    if field.upper() == _positional(cls):
        return f"{field.upper()}{colon}{details}"
    return message


def _values(flag: str, args: list[str]) -> list[str]:
    values: list[str] = []
    reading = False
    for arg in args:
        if arg.startswith("--"):
            name, equals, value = arg.partition("=")
            reading = _dashed(name) == flag
            values = ([value] if equals else []) if reading else values
        elif reading:
            values.append(arg)
    return values


def _unbox(text: str) -> str:
    """Take the message out of tyro's box, which is drawn with letters or without."""
    words = re.sub(r"[│╭╮╰╯─]|-{3,}", " ", text).split()
    return " ".join(words).partition(" For full helptext")[0]
