"""How configs and flags check themselves: types, then ranges, each error one line."""

import dataclasses
import math
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

from ldm_jax.types import InputError, choices

T = TypeVar("T")

DtypeName = Literal["float32", "bfloat16"]

UNIONS = (types.UnionType, typing.Union)
"""Of `int | None`, and of `Literal[...] | None`."""


def require(
    config: object, field: str, holds: bool, wanted: str, try_: str | None = None
) -> None:
    """Raise `InputError`, "FIELD: got GOT, wanted WANTED; try TRY", unless `holds`."""
    if not holds:
        hint = "" if try_ is None else f"; try {try_}"
        got = getattr(config, field)
        raise InputError(f"{field}: got {got!r}, wanted {wanted}{hint}")


def require_at_least(config: object, low: float, *fields: str) -> None:
    """Raise `InputError` for a field below `low`; one that is None passes."""
    for field in fields:
        value = getattr(config, field)
        require(config, field, value is None or value >= low, f"at least {low}")


def require_widths(config: Any) -> None:
    """Check the channels, levels, groups, batch and steps of a network's config."""
    multipliers = config.channel_multipliers
    require_at_least(config, 1, "channels", "num_res_blocks", "batch_size", "steps")
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
    """Return `value` as the field's type, or raise; an int may stand for a float."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return as_type(field, args[0], value)
    if origin in UNIONS:
        none_given = value is None and type(None) in args
        return None if none_given else as_type(field, args[0], value)
    if origin is Literal:
        holds = value in args
        if isinstance(value, str) and not holds:
            raise InputError(f"{field}: {choices(value, map(str, args))}")
    elif origin is tuple:
        if isinstance(value, list | tuple) and len(value) == (
            len(value) if ... in args else len(args)
        ):
            return tuple(as_type(field, args[0], item) for item in value)
        holds = False
    elif annotation in (int, float):
        number = int if annotation is int else int | float
        holds = isinstance(value, number) and not isinstance(value, bool)
        holds = holds and -math.inf < value < math.inf
        value = annotation(value) if holds else value
    else:
        holds = isinstance(value, annotation)
    if not holds:
        raise InputError(f"{field}: got {value!r}, wanted {in_words(annotation)}")
    return value


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
