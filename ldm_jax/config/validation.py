"""The base of every config: fields that check their type and range at birth."""

import dataclasses
import types
import typing
from typing import Any, Literal

from ldm_jax.types import InputError

DtypeName = Literal["float32", "bfloat16"]


class Checked:
    """Check the type of every field at birth; a subclass adds ranges in `_check`."""

    def __post_init__(self) -> None:
        """Check types, then ranges."""
        for field in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
            value = _typed(field.name, field.type, getattr(self, field.name))
            object.__setattr__(self, field.name, value)
        self._check()

    def _check(self) -> None:
        """Raise `InputError` for a value out of range."""

    def _want(self, name: str, holds: bool, wanted: str) -> None:
        if not holds:
            raise InputError(f"{name}: got {getattr(self, name)!r}, wanted {wanted}")

    def _want_at_least(self, low: int, *names: str) -> None:
        for name in names:
            self._want(name, getattr(self, name) >= low, f"at least {low}")

    def _check_widths(self) -> None:
        """Check what both networks have: channels, levels, groups, batch and steps."""
        config: Any = self
        multipliers = config.channel_multipliers
        self._want_at_least(1, "channels", "num_res_blocks", "batch_size", "steps")
        self._want("channel_multipliers", len(multipliers) >= 1, "at least one level")
        self._want("channel_multipliers", min(multipliers) >= 1, "each at least 1")
        groups_fit = config.num_groups >= 1 and all(
            config.channels * multiplier % config.num_groups == 0
            for multiplier in (1, *multipliers)
        )
        wanted = f"a divisor of {config.channels} and every width"
        self._want("num_groups", groups_fit, wanted)


def _typed(name: str, annotation: Any, value: Any) -> Any:
    """Return `value` as the field's type, or raise; an int may stand for a float."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    wanted = getattr(annotation, "__name__", str(annotation))
    if origin is Literal:
        if value in args:
            return value
        wanted = "one of " + ", ".join(str(choice) for choice in args)
    elif origin is types.UnionType:
        if value is None and type(None) in args:
            return value
        return _typed(name, args[0], value)
    elif origin is tuple:
        if isinstance(value, list | tuple):
            return tuple(_typed(name, args[0], item) for item in value)
        wanted = "a tuple"
    elif annotation is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = float(value)
            if value == value and abs(value) != float("inf"):
                return value
        wanted = "a finite number"
    elif annotation is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        wanted = "a whole number"
    elif isinstance(value, annotation):
        return value
    raise InputError(f"{name}: got {value!r}, wanted {wanted}")
