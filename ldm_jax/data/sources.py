"""Data sets on disk, as random access to single examples."""

import contextlib
import io
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from ldm_jax.types import InputError

Split = Literal["train", "test"]

MAX_BYTES_IN_MEMORY = 64 * 2**20
"""Smaller data sets are decoded once and kept: decoding is most of the reading."""


@runtime_checkable
class Examples(Protocol):
    """Random access to examples: `image` (uint8, h w c) and `label` (an integer)."""

    def __len__(self) -> int:
        """Return the number of examples."""
        ...

    def __getitem__(self, record: int, /) -> Mapping[str, Any]:
        """Return one example."""
        ...


class Source(NamedTuple):
    """One split of a data set and what its metadata says.

    Attributes:
      examples: The split.
      num_classes: Classes of the data set.
      channels: Channels of its images.
    """

    examples: Examples
    num_classes: int
    channels: int


def open_source(name: str, split: Split, *, directory: str | None) -> Source:
    """Open a split of a data set, preparing it first where that needs no network.

    Args:
      name: `tfds:digits`.
      split: Which part.
      directory: Where TFDS keeps prepared data; None for TFDS' own default.

    Returns:
      The split, decoded image by image on access.

    Raises:
      InputError: If the data cannot be prepared or read there.
    """
    if name != "tfds:digits":
        raise InputError(f"data.source: got {name!r}, wanted tfds:digits")
    where = str(Path(directory).expanduser()) if directory else tfds_directory()
    try:
        with _quiet():
            from ldm_jax.data.builders.digits.digits_dataset_builder import Builder

            builder: Any = Builder(data_dir=where, file_format="array_record")
            builder.download_and_prepare()
            examples = builder.as_data_source(split)
            if builder.info.dataset_size < MAX_BYTES_IN_MEMORY:
                examples = [examples[i] for i in range(len(examples))]
    except OSError as error:
        raise InputError(
            f"data.directory: cannot prepare or read {name} in {where} "
            f"({error.strerror or error}); try --data.directory with a folder you may "
            "write to"
        ) from error
    features: Any = builder.info.features
    return Source(
        examples=examples,
        num_classes=features["label"].num_classes,
        channels=features["image"].shape[-1],
    )


def tfds_directory() -> str:
    """Return where TFDS keeps prepared data when nothing else is said."""
    with _quiet():
        from tensorflow_datasets.core import constants

    return str(Path(constants.DATA_DIR).expanduser())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep TFDS from printing progress bars and advice on image libraries."""
    absl_logger = logging.getLogger("absl")
    level = absl_logger.level
    absl_logger.setLevel(logging.ERROR)
    try:
        import tensorflow_datasets as tfds

        tfds.disable_progress_bar()
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        absl_logger.setLevel(level)
