"""Files that are written whole or not at all."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name a file in the failure to write it: `write` itself does not."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def write_text(path: Path, text: str) -> None:
    """Write text whole or not at all.

    Raises:
      OSError: If it cannot be written.
    """
    part = path.with_name(path.name + ".part")
    with naming(part):
        part.write_text(text)
    os.replace(part, path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all.

    Raises:
      OSError: If it cannot be written.
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")
