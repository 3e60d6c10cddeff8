"""What the classes of a data set are called, found without preparing anything."""

import importlib
from pathlib import Path
from typing import Any

from ldm_jax.data.listing import list_folder
from ldm_jax.data.sources import (
    FOLDER,
    OWN_BUILDERS,
    class_names_of,
    folder_path,
    tfds_directory,
)
from ldm_jax.types import InputError


def find_class_names(name: str, *, directory: str | None) -> tuple[str, ...]:
    """Look up what the classes of a data set are called.

    Args:
      name: As for `sources.open_source`.
      directory: Likewise.

    Returns:
      The names, as its `label` counts them; () if it has none, or is not here.
    """
    try:
        if name.startswith(FOLDER):
            return list_folder(folder_path(name)).class_names
        where = str(Path(directory).expanduser()) if directory else tfds_directory()
        builder = _builder(name.removeprefix("tfds:"), where)
    except (InputError, OSError):
        return ()
    return (None if builder is None else class_names_of(builder.info.features)) or ()


def _builder(plain: str, where: str) -> Any:
    """Find a builder that knows its features; None if none is here."""
    import tensorflow_datasets as tfds

    own, _, config = plain.partition("/")
    if own in OWN_BUILDERS:
        cls: Any = importlib.import_module(OWN_BUILDERS[own]).Builder
        if config and config not in cls.builder_configs:
            return None
        return cls(config=config or None, data_dir=where)
    if not (Path(where) / own.partition(":")[0]).is_dir():
        return None
    try:
        builder = tfds.builder(plain, data_dir=where, try_gcs=False)
    except (tfds.core.DatasetNotFoundError, ImportError, ValueError):
        return None
    return builder if builder.is_prepared() else None
