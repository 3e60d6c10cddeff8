"""Names and listings inside a foreign folder, which may not lead out of it."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ldm_jax.files import printable
from ldm_jax.types import InputError

IGNORED = ("architectures", "torch_dtype", "dtype", "transformers_version")

LARGEST_NUMBER = 2.0**63
LARGEST_COUNT = 2**20
"""Beyond every width, vocabulary and number of steps that a model has."""


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
          InputError: If it is missing and has no default, is none, or is not finite.
        """
        value = self.value(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(name, value, "a number")
        if not -LARGEST_NUMBER < value < LARGEST_NUMBER:
            raise self.wrong(name, value, "a finite number")
        return value

    def count(self, name: str, default: int | None = None, *, low: int = 1) -> int:
        """Read a whole number.

        Raises:
          InputError: If it is missing and has no default, is none, or is below `low`.
        """
        value = self.value(name, default)
        if not is_count(value, low=low):
            raise self.wrong(name, value, f"a whole number, {low} to {LARGEST_COUNT}")
        return value

    def value(self, name: str, default: Any = None) -> Any:
        """Read a field as it is; `default` if it is missing or null."""
        self._read.add(name)
        value = self._values.get(name)
        return default if value is None else value

    def numbers(self, name: str) -> tuple[int, ...]:
        """Read a list of whole numbers.

        Raises:
          InputError: If it is none, is empty, or has one below 1.
        """
        value = self.value(name)
        good = isinstance(value, list | tuple) and all(is_count(item) for item in value)
        if not good or not value:
            raise self.wrong(
                name, value, f"a list of whole numbers, each 1 to {LARGEST_COUNT}"
            )
        return tuple(value)

    def words(self, name: str, choices: Iterable[str], length: int) -> list[str]:
        """Read a list of so many words, each one of several.

        Raises:
          InputError: If it is none, of another length, or has another word.
        """
        value, known = self.value(name), sorted(choices)
        good = isinstance(value, list | tuple) and all(item in known for item in value)
        if not good or len(value) != length:
            wanted = f"a list of {length} of {', '.join(known)}"
            raise self.wrong(name, value, wanted)
        return list(value)

    def is_null(self, name: str) -> bool:
        """Tell whether a field is there and null, where that is not its default."""
        self._read.add(name)
        return name in self._values and self._values[name] is None

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


def is_count(value: object, *, low: int = 1) -> bool:
    """Tell whether a value is a whole number from `low` to `LARGEST_COUNT`."""
    if isinstance(value, bool) or not isinstance(value, int):
        return False
    return low <= value <= LARGEST_COUNT


def contained(root: Path, relative: str) -> Path:
    """Join a foreign path to a folder that it must not leave, by links neither.

    A link into `blobs` is allowed where the folder lies in a `snapshots` next to it:
    so the Hugging Face cache keeps the files of one repository.

    Args:
      root: The folder.
      relative: A path that a file or a listing names, with forward slashes.

    Returns:
      The path below `root`, its last link not followed.

    Raises:
      InputError: If it would leave the folder.
    """
    pure = PurePosixPath(relative)
    plain = relative.isprintable() and "\\" not in relative and pure.parts
    if plain and not pure.is_absolute() and ".." not in pure.parts:
        try:
            path, base = (root / relative).resolve(), root.resolve()
        except (OSError, RuntimeError) as error:
            reason = printable(str(error))
            raise InputError(f"{root / relative}: {reason}; try a copy") from error
        if path.is_relative_to(base) or path.parent in _blobs(base):
            return root / relative
    raise InputError(
        f"{root}: got the path {printable(relative)}, which leaves the folder, wanted "
        "one inside; try a copy of the folder with its files in place of links"
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Args:
      path: A file.

    Returns:
      The object.

    Raises:
      InputError: If it cannot be read or holds anything but an object.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror or error}), wanted a JSON file; "
            "try downloading it again"
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: got a file that is not JSON ({printable(str(error))}); try "
            "downloading it again"
        ) from error
    if not isinstance(content, dict):
        raise InputError(
            f"{path}: got a JSON {type(content).__name__}, wanted an object; try "
            "downloading it again"
        )
    return content


def _blobs(folder: Path) -> list[Path]:
    """Return the `blobs` next to the `snapshots` that a folder lies in, if any."""
    for inner in (folder, *folder.parents):
        if inner.parent.name == "snapshots":
            return [inner.parent.parent / "blobs"]
    return []
