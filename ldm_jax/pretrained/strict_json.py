"""JSON objects of other programs, read field by field."""

from collections.abc import Iterable, Mapping
from typing import Any

from ldm_jax.types import InputError

LARGEST_NUMBER = 2.0**63
LARGEST_COUNT = 2**20
"""More than any width, vocabulary or number of steps of a model."""


class Fields:
    """Fields of one JSON object; `done` refuses those that were not read."""

    def __init__(self, values: Mapping[str, Any], *, what: str) -> None:
        """Wrap an object; `what` names it in errors."""
        self._values = values
        self._what = what
        self._read: set[str] = set()

    def number(self, name: str, default: int | float | None = None) -> float:
        """Read a finite number."""
        value = self.value(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(name, value, "a number")
        if not -LARGEST_NUMBER < value < LARGEST_NUMBER:
            raise self.wrong(name, value, "a finite number")
        return float(value)

    def count(self, name: str, default: int | None = None, *, low: int = 1) -> int:
        """Read a whole number from `low` to `LARGEST_COUNT`."""
        value = self.value(name, default)
        if not is_count(value, low=low):
            raise self.wrong(name, value, f"a whole number, {low} to {LARGEST_COUNT}")
        return value

    def value(self, name: str, default: Any = None) -> Any:
        """Read any value; `default` if it is missing or null."""
        self._read.add(name)
        value = self._values.get(name)
        return default if value is None else value

    def counts(self, name: str) -> tuple[int, ...]:
        """Read a list of whole numbers above 0, at least one."""
        value = self.value(name)
        good = isinstance(value, list | tuple) and all(is_count(item) for item in value)
        if not good or not value:
            raise self.wrong(
                name, value, f"a list of whole numbers, each 1 to {LARGEST_COUNT}"
            )
        return tuple(value)

    def words(self, name: str, choices: Iterable[str], length: int) -> list[str]:
        """Read a list of `length` words, each one of `choices`."""
        value, known = self.value(name), sorted(choices)
        good = isinstance(value, list | tuple) and all(item in known for item in value)
        if not good or len(value) != length:
            wanted = f"a list of {length} of {', '.join(known)}"
            raise self.wrong(name, value, wanted)
        return list(value)

    def is_null(self, name: str) -> bool:
        """Return whether a field is null, where null is not its default."""
        self._read.add(name)
        return name in self._values and self._values[name] is None

    def choice(self, name: str, choices: Mapping[str, Any], default: str) -> Any:
        """Read one of several words and return its value in `choices`."""
        value = self.value(name, default)
        if not isinstance(value, str) or value not in choices:
            raise self.wrong(name, value, f"one of {', '.join(choices)}")
        return choices[value]

    def expect(self, **wanted: Any) -> None:
        """Check fields of which this library supports one value; missing is right."""
        for name, value in wanted.items():
            found = self.value(name, value)
            if found != value:
                raise self.wrong(name, found, f"{value!r}: nothing else is supported")

    def ignore(self, *names: str) -> None:
        """Accept any value of fields that do not change what is computed."""
        self._read.update(names)

    def done(self) -> None:
        """Check that every unread field is null or false."""
        for name, value in self._values.items():
            known = name in self._read or name.startswith("_")
            if not known and value not in (None, False):
                raise self.wrong(name, value, "null: this field is not known here")

    def wrong(self, name: str, value: object, wanted: object) -> InputError:
        """Return the error of a field, which all methods raise."""
        return InputError(f"{self._what}: {name}: got {value!r}, wanted {wanted}")


def is_count(value: object, *, low: int = 1) -> bool:
    """Return whether a value is a whole number from `low` to `LARGEST_COUNT`."""
    if isinstance(value, bool) or not isinstance(value, int):
        return False
    return low <= value <= LARGEST_COUNT
