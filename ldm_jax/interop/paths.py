"""Names and listings inside a foreign folder, which may not lead out of it."""

import json
from pathlib import Path, PurePosixPath
from typing import Any

from ldm_jax.interop.pickles import printable
from ldm_jax.types import InputError


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
