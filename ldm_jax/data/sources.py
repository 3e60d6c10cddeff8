"""Data sets on disk, as random access to single examples."""

import contextlib
import io
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from ldm_jax.types import InputError

MAX_BYTES_IN_MEMORY = 64 * 2**20
"""Smaller data sets are decoded once and kept: decoding is most of the reading."""


@runtime_checkable
class Examples(Protocol):
    """Random access to examples: `image` (uint8, h w c), and what else there is."""

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


def open_source(name: str, split: str, *, directory: str | None) -> Source:
    """Open a split of a TFDS data set; the digits are prepared first.

    Args:
      name: `tfds:NAME`; `tfds:digits` is this package's own.
      split: Which part, in TFDS' notation.
      directory: Where TFDS keeps prepared data; None for TFDS' own default.

    Returns:
      The split, decoded image by image on access. Its examples have an `image` and,
      where the data set has them, `label`, `tokens`, `embedding`, `segmentation`.

    Raises:
      InputError: If the data set is not prepared there, cannot be read, or has no
        images or no such split.
    """
    where = str(Path(directory).expanduser()) if directory else tfds_directory()
    try:
        with _quiet():
            builder = _builder(name, where)
            examples = _open_split(builder, name, split)
            if builder.info.dataset_size < MAX_BYTES_IN_MEMORY:
                examples = [examples[i] for i in range(len(examples))]
    except OSError as error:
        raise InputError(
            f"data.directory: cannot prepare or read {name} in {where} "
            f"({error.strerror or error}); try --data.directory with a folder you may "
            "write to"
        ) from error
    features: Any = builder.info.features
    if "image" not in features:
        raise InputError(
            f"data.source: {name} has no feature 'image' but {', '.join(features)}"
        )
    return Source(
        examples=examples,
        num_classes=features["label"].num_classes if "label" in features else 0,
        channels=features["image"].shape[-1],
    )


def _open_split(builder: Any, name: str, split: str) -> Any:
    try:
        return builder.as_data_source(split)
    except (KeyError, ValueError) as error:
        raise InputError(
            f"data: {name} has no split {split!r}, wanted one of "
            f"{', '.join(builder.info.splits)}, or a slice such as train[:90%]"
        ) from error


def _builder(name: str, where: str) -> Any:
    """Find the builder of a prepared data set; prepare the digits."""
    import tensorflow_datasets as tfds

    if name == "tfds:digits":
        from ldm_jax.data.builders.digits.digits_dataset_builder import Builder

        builder: Any = Builder(data_dir=where, file_format="array_record")
        builder.download_and_prepare()
        return builder
    plain = name.removeprefix("tfds:")
    try:
        builder = tfds.builder(plain, data_dir=where, try_gcs=False)
    except (tfds.core.DatasetNotFoundError, ImportError, ValueError) as error:
        raise InputError(
            f"data.source: got {name}, which TFDS does not find in {where} "
            f"({' '.join(str(error).split())[:160]}); see its catalogue for the names"
        ) from error
    if not builder.is_prepared():
        raise InputError(
            f"data.source: {name} is not prepared in {where}; try: tfds build {plain} "
            f"--data_dir {where} --file_format array_record"
        )
    return builder


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
