"""How configs and flags check themselves: types, then ranges, each error one line."""

import dataclasses
import math
import re
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from ldm_jax.types import InputError, choices

T = TypeVar("T")

DtypeName = Literal["float32", "bfloat16"]

UNIONS = (types.UnionType, typing.Union)
"""Of `int | None`, and of `Literal[...] | None`."""

MAY_BE_EMPTY = "may be empty"
Text = Annotated[str, MAY_BE_EMPTY]
"""A text that a network reads; any other string is a name, and not empty."""

MAX_WHOLE = 2**63 - 1
"""Largest whole number, of either sign, that arrays hold."""
MAX_SIZE = 2**16
"""Largest width and side: the compiler ends a program by a signal where one array has
more elements than it can count."""
MAX_BATCH = 2**24
MAX_COUNT = 2**31 - 1
"""Largest number of steps and seconds, which are counted in 32 bits."""
MAX_SHOWN = 200
"""Characters of a value in a message."""


def require(
    config: object, field: str, holds: bool, wanted: str, try_: str | None = None
) -> None:
    """Raise `InputError`, "FIELD: got GOT, wanted WANTED; try TRY", unless `holds`."""
    if not holds:
        hint = "" if try_ is None else f"; try {try_}"
        got = getattr(config, field)
        raise InputError(f"{field}: got {shown(got)}, wanted {wanted}{hint}")


def require_at_least(config: object, low: float, *fields: str) -> None:
    """Raise `InputError` for a field below `low`; one that is None passes."""
    for field in fields:
        value = getattr(config, field)
        require(config, field, value is None or value >= low, f"at least {low}")


def require_at_most(config: object, high: float, *fields: str) -> None:
    """Raise `InputError` for a field above `high`; one that is None passes."""
    for field in fields:
        value = getattr(config, field)
        require(config, field, value is None or value <= high, f"at most {high}")


def require_local(name: str, path: str | Path | None) -> None:
    """Raise `InputError` if a path is the address of a bucket; None passes.

    `as_type` asks this of every `Path`; who keeps a path as a text asks by itself.
    """
    if path is not None and re.match(r"[a-z0-9]{2,}:/", str(path)):
        raise InputError(
            f"{name}: got {path}, wanted a folder or file of a mounted file system; "
            "try to mount the bucket (gcsfuse, s3fs) and give the place"
        )


def require_widths(config: Any) -> None:
    """Check the channels, levels, groups, batch and steps of a network's config."""
    multipliers = config.channel_multipliers
    require_at_least(config, 1, "channels", "num_res_blocks", "batch_size", "steps")
    require_at_most(config, MAX_SIZE, "channels", "num_res_blocks")
    require_at_most(config, MAX_BATCH, "batch_size")
    require_at_most(config, MAX_COUNT, "steps")
    wide = config.channels * max(multipliers, default=1) > MAX_SIZE
    wanted = f"at most {MAX_SIZE} channels at every level"
    require(config, "channel_multipliers", not wide, wanted)
    require(config, "channel_multipliers", len(multipliers) >= 1, "at least one level")
    require(config, "channel_multipliers", min(multipliers) >= 1, "each at least 1")
    groups_fit = config.num_groups >= 1 and all(
        config.channels * multiplier % config.num_groups == 0
        for multiplier in (1, *multipliers)
    )
    wanted = f"a divisor of {config.channels} and every width"
    require(config, "num_groups", groups_fit, wanted)


@typing.dataclass_transform(
    frozen_default=True,
    kw_only_default=True,
    field_specifiers=(dataclasses.field,),
)
def checked_dataclass(cls: type[T]) -> type[T]:
    """Make a frozen, keyword-only dataclass whose values are checked at birth.

    Every field must have its annotated type. Then the method `_check`, where the class
    has one, raises `InputError` for a value out of range.
    """

    def __post_init__(self: Any) -> None:
        for field in dataclasses.fields(self):
            value = as_type(field.name, field.type, getattr(self, field.name))
            object.__setattr__(self, field.name, value)
        if hasattr(self, "_check"):
            self._check()

    cls.__post_init__ = __post_init__  # pyright: ignore[reportAttributeAccessIssue]
    checked = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    # A type checker of tests would refuse a list before `as_type` makes a tuple of it.
    typing.no_type_check(checked.__init__)
    return checked


def as_type(field: str, annotation: Any, value: Any) -> Any:
    """Return `value` as the field's type itself, or raise.

    An int may stand for a float, and a string, number or tuple of a type derived from
    theirs (an enum's) for itself. A config of a derived class may not: its other fields
    would be lost.
    """
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        if value == "" and MAY_BE_EMPTY in args:
            return ""
        return as_type(field, args[0], value)
    if origin in UNIONS:
        none_given = value is None and type(None) in args
        return None if none_given else as_type(field, args[0], value)
    if origin is tuple:
        fits = isinstance(value, list | tuple) and len(value) == (
            len(value) if ... in args else len(args)
        )
        if fits:
            return tuple(as_type(field, args[0], item) for item in value)
    elif origin is Literal:
        same = [arg for arg in args if arg == value and isinstance(value, type(arg))]
        if same:
            return same[0]
        if isinstance(value, str):
            raise InputError(f"{field}: {choices(value, map(str, args))}")
    elif annotation in (int, float):
        if _is_number(annotation, value):
            return annotation(value)
    elif annotation is str:
        if isinstance(value, str) and value.strip() and "\0" not in value:
            return str.__str__(value)
    elif dataclasses.is_dataclass(annotation):
        if type(value) is annotation:
            return value
    elif isinstance(value, annotation) and "\0" not in str(value):
        if annotation is Path:
            require_local(field, value)
        return value
    wanted = in_words(annotation)
    if isinstance(value, int) and not isinstance(value, bool) and annotation is int:
        wanted = f"{wanted} of at most {MAX_WHOLE}"
    raise InputError(f"{field}: got {shown(value)}, wanted {wanted}")


def _is_number(kind: type[int] | type[float], value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if isinstance(value, int):
        return -MAX_WHOLE <= value <= MAX_WHOLE
    return kind is float and math.isfinite(value)


def shown(value: Any) -> str:
    """Write a value for a message, in at most `MAX_SHOWN` characters."""
    try:
        text = repr(str(value) if isinstance(value, Path) else value)
    except Exception:  # of an integer with thousands of digits, or of a user's class
        text = f"{type(value).__name__} that cannot be written"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]} ..."


def in_words(annotation: Any, *, many: bool = False) -> str:
    """Say what values an annotation allows."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Annotated, *UNIONS):
        return in_words(args[0], many=many)
    if origin is Literal:
        return f"{'some' if many else 'one'} of {', '.join(map(str, args))}"
    if origin is tuple:
        values = in_words(args[0], many=True)
        return values if ... in args else f"{len(args)} {values}"
    words = {
        int: ("a whole number", "whole numbers"),
        float: ("a finite number", "finite numbers"),
        bool: ("True or False", "switches"),
        str: ("a text", "texts"),
        Path: ("a path", "paths"),
    }
    return words.get(annotation, (annotation.__name__,) * 2)[many]
