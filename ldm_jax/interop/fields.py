"""A stranger's JSON config, read strictly: what is not understood is refused."""

from collections.abc import Mapping
from typing import Any

from ldm_jax.types import InputError

IGNORED = ("architectures", "torch_dtype", "dtype", "transformers_version")


class Fields:
    """The fields of one JSON object; every one must be read, expected or neutral."""

    def __init__(self, values: Mapping[str, Any], *, what: str) -> None:
        """Take the fields.

        Args:
          values: The object.
          what: What to call it in an error.
        """
        self._values = values
        self._what = what
        self._read: set[str] = set()

    def number(self, name: str, default: int | float | None = None) -> Any:
        """Read a number.

        Raises:
          InputError: If it is missing and has no default, or is none.
        """
        value = self.value(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(name, value, "a number")
        return value

    def value(self, name: str, default: Any = None) -> Any:
        """Read a field as it is; `default` if it is missing or null."""
        self._read.add(name)
        value = self._values.get(name)
        return default if value is None else value

    def numbers(self, name: str) -> tuple[int, ...]:
        """Read a list of whole numbers.

        Raises:
          InputError: If it is none.
        """
        value = self.value(name)
        good = (
            isinstance(value, list)
            and value
            and all(
                isinstance(item, int) and not isinstance(item, bool) for item in value
            )
        )
        if not good:
            raise self.wrong(name, value, "a list of whole numbers")
        return tuple(value)

    def choice(self, name: str, choices: Mapping[str, Any], default: str) -> Any:
        """Read one of several words and return what it stands for.

        Raises:
          InputError: If it is another.
        """
        value = self.value(name, default)
        if not isinstance(value, str) or value not in choices:
            raise self.wrong(name, value, f"one of {', '.join(choices)}")
        return choices[value]

    def expect(self, **wanted: Any) -> None:
        """Check fields that change the network and have one value here.

        Raises:
          InputError: If one is there and has another value.
        """
        for name, value in wanted.items():
            found = self.value(name, value)
            if found != value:
                raise self.wrong(name, found, f"{value!r}: nothing else is built here")

    def ignore(self, *names: str) -> None:
        """Pass over fields that do not change what is computed."""
        self._read.update(names)

    def done(self) -> None:
        """Check that nothing of weight was left unread.

        Raises:
          InputError: If an unread field is neither null nor false.
        """
        for name, value in self._values.items():
            known = name in self._read or name in IGNORED or name.startswith("_")
            if not known and value not in (None, False):
                raise self.wrong(name, value, "null: this field is not known here")

    def wrong(self, name: str, value: object, wanted: object) -> InputError:
        """Make the error of a field."""
        return InputError(f"{self._what}: {name}: got {value!r}, wanted {wanted}")
