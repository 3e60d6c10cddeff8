"""What the classes of a data set are called, found without preparing anything."""

import re
from pathlib import Path
from typing import Any

from ldm_jax.data.folder_listing import list_folder
from ldm_jax.data.own_builders import details, find_own
from ldm_jax.data.sources import (
    FOLDER,
    class_names_of,
    folder_path,
    tfds_directory,
)
from ldm_jax.types import InputError


def find_class_names(name: str, *, directory: str | None) -> tuple[str, ...]:
    """Look up what the classes of a data set are called.

    Args:
      name: As for `sources.open_source`.

    Returns:
      The names, as its `label` counts them; () if it has none, or is not here.
    """
    try:
        if name.startswith(FOLDER):
            return list_folder(folder_path(name)).class_names
        where = str(Path(directory).expanduser()) if directory else tfds_directory()
        builder = _builder(name, where)
    except (InputError, OSError):
        return ()
    return (None if builder is None else class_names_of(builder.info.features)) or ()


def _builder(name: str, where: str) -> Any:
    """Find a builder that knows its features; None if none is here."""
    import tensorflow_datasets as tfds

    if own := find_own(name):
        with details(name):
            return own.make(where)
    plain = name.removeprefix("tfds:")
    if not (Path(where) / re.split("[/:]", plain)[0]).is_dir():
        return None
    try:
        builder = tfds.builder(plain, data_dir=where, try_gcs=False)
    except (tfds.core.DatasetNotFoundError, ImportError, ValueError):
        return None
    return builder if builder.is_prepared() else None
