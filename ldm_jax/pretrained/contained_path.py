"""Paths inside a downloaded folder, which must not lead out of it."""

from pathlib import Path, PurePosixPath

from ldm_jax.files import printable
from ldm_jax.types import InputError


def contained(root: Path, relative: str) -> Path:
    """Join a path to the folder that it must not leave, by `..` or by links.

    A link into `blobs` is allowed if the folder lies in a `snapshots` beside it: the
    Hugging Face cache stores the files of a repository so.

    Args:
      relative: Path with forward slashes.

    Returns:
      The path below `root`, with its last link not followed.

    Raises:
      InputError: If it leaves the folder.
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


def _blobs(folder: Path) -> list[Path]:
    """Return the `blobs` beside the `snapshots` that a folder lies in, if any."""
    for inner in (folder, *folder.parents):
        if inner.parent.name == "snapshots":
            return [inner.parent.parent / "blobs"]
    return []
