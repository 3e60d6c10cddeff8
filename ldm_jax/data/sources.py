"""Data sets on disk, as random access to single examples."""

import contextlib
import io
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from ldm_jax.data.folder import Need, folder_captions, num_threads, open_folder
from ldm_jax.data.own_builders import (
    BUILDER,
    OWN_BUILDERS,
    details,
    find_own,
    nearest,
)
from ldm_jax.types import InputError

FOLDER = "folder:"
"""Begins the name of a folder of images; what follows is its path."""

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
    """One split of a data set and what its metadata says."""

    examples: Examples
    """The split."""
    class_names: tuple[str, ...]
    """What its classes are called; () if it has none."""
    channels: int
    """Channels of its images."""

    @property
    def num_classes(self) -> int:
        """Classes of the data set."""
        return len(self.class_names)


class WithoutLabels:
    """Examples whose `label` is no class, such as a name or a number."""

    def __init__(self, examples: Examples) -> None:
        """Wrap examples."""
        self._examples = examples

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self._examples)

    def __getitem__(self, record: int, /) -> Mapping[str, Any]:
        """Return one example, without its label."""
        example = self._examples[record]
        return {name: value for name, value in example.items() if name != "label"}


def class_names_of(features: Any) -> tuple[str, ...] | None:
    """Return what the classes of a data set are called; None if it has none."""
    names = getattr(features["label"], "names", None) if "label" in features else None
    return None if names is None else tuple(names)


def open_source(
    name: str,
    split: str,
    *,
    directory: str | None,
    needs: tuple[Need, ...] = (),
    image_size: int = 0,
    max_broken_files: int = 0,
) -> Source:
    """Open a split of a folder of images or of a TFDS data set.

    Args:
      name: `folder:PATH`; or `tfds:NAME` or `tfds:NAME/CONFIG`; or `builder:PATH.py` or
        `builder:PATH.py/CONFIG`, a Python file with a TFDS builder. `tfds:digits` is
        this package's own; it and what a file builds are prepared first.
      split: Which part, in TFDS' notation.
      directory: Where TFDS keeps prepared data; None for TFDS' own default.
      needs: What the examples of a folder must have.
      image_size: Side below which images of a folder are told of, in pixels.
      max_broken_files: How many files of a folder that cannot be read are passed over.

    Returns:
      The split, decoded image by image on access. Its examples have an `image` and,
      where the data set has them, `label`, `caption`, `tokens`, `embedding`,
      `segmentation`.

    Raises:
      InputError: If the data set is not prepared there, cannot be read, or has no
        images or no such split; or if a folder has not what is needed.
    """
    if name.startswith(FOLDER):
        examples, class_names = open_folder(
            folder_path(name),
            split,
            needs=needs,
            image_size=image_size,
            max_broken_files=max_broken_files,
            max_bytes_in_memory=MAX_BYTES_IN_MEMORY,
        )
        return Source(examples, class_names, channels=examples.channels)
    where = str(Path(directory).expanduser()) if directory else tfds_directory()
    try:
        with _quiet():
            builder = _builder(name, where)
            examples = _open_split(builder, name, split)
            class_names = class_names_of(builder.info.features)
            if "label" in builder.info.features and class_names is None:
                examples = WithoutLabels(examples)
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
        class_names=class_names or (),
        channels=features["image"].shape[-1],
    )


def read_captions(
    name: str, split: str, *, directory: str | None, limit: int | None = None
) -> list[str]:
    """Read the captions of a split, without decoding its pictures.

    Args:
      name: As for `open_source`.
      limit: Read only so many.

    Raises:
      InputError: As `open_source`; or if there are no captions, or one is not UTF-8.
    """
    if name.startswith(FOLDER):
        return folder_captions(folder_path(name), split)[:limit]
    import tensorflow_datasets as tfds

    where = str(Path(directory).expanduser()) if directory else tfds_directory()
    with _quiet():
        builder = _builder(name, where)
        if "caption" not in builder.info.features:
            raise InputError(
                f"data.source: {name} has no feature 'caption' but "
                f"{', '.join(builder.info.features)}"
            )
        decoders = {"image": tfds.decode.SkipDecoding()}
        rows = builder.as_data_source(split, decoders=decoders)
        return [
            caption_of(rows[i], f"{name}, example {i}")
            for i in range(len(rows))[:limit]
        ]


def has_captions(name: str, *, directory: str | None) -> bool:
    """Say whether a data set's captions become the tokens of its examples.

    Args:
      name: As for `open_source`; a folder has been found to have them.

    Raises:
      InputError: As `open_source`.
    """
    if name.startswith(FOLDER):
        return True
    where = str(Path(directory).expanduser()) if directory else tfds_directory()
    with _quiet():
        features = _builder(name, where).info.features
    return "caption" in features and "tokens" not in features


def folder_path(name: str) -> Path:
    """Return the path in the name of a folder of images."""
    return Path(name.removeprefix(FOLDER)).expanduser()


def reading_threads(name: str) -> int:
    """Return how many threads should read a source: several where files are decoded."""
    return num_threads() if name.startswith(FOLDER) else 1


def caption_of(example: Mapping[str, Any], where: str) -> str:
    """Return the caption of an example as text.

    Args:
      example: With a `caption`, text or bytes.
      where: What to call the example.

    Raises:
      InputError: If it is not UTF-8.
    """
    caption = example["caption"]
    if isinstance(caption, str):
        return caption
    try:
        return bytes(caption).decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: its caption is not UTF-8 ({error})") from None


def _open_split(builder: Any, name: str, split: str) -> Any:
    try:
        return builder.as_data_source(split)
    except NotImplementedError:
        plain = name.removeprefix("tfds:")
        advice = f", and there: tfds build {plain} --data_dir FOLDER --file_format"
        advice = " for it" if name.startswith(BUILDER) else f"{advice} array_record"
        raise InputError(
            f"data.source: {name} is prepared in {builder.data_dir} in a format whose "
            f"examples cannot be read one by one; try another folder{advice}"
        ) from None
    except (KeyError, ValueError) as error:
        known = list(builder.info.splits)
        raise InputError(
            f"data: {name} has no split {split!r}, wanted one of {', '.join(known)}, "
            f"or a slice such as train[:90%]{nearest(split, known)}"
        ) from error


def _builder(name: str, where: str) -> Any:
    """Find the builder of a prepared data set; prepare our own and those of files."""
    import tensorflow_datasets as tfds

    if own := find_own(name):
        with details(name):
            builder: Any = own.make(where)
            builder.download_and_prepare()
        return builder
    plain = name.removeprefix("tfds:")
    try:
        builder = tfds.builder(plain, data_dir=where, try_gcs=False)
    except (tfds.core.DatasetNotFoundError, ImportError, ValueError) as error:
        reason = " ".join(str(error).split()).split(" Available datasets")[0][:160]
        known = [*OWN_BUILDERS, *tfds.list_builders(with_community_datasets=False)]
        advice = nearest(plain.partition("/")[0], known) or (
            "; see its catalogue for the names, or give your own builder's file, as in "
            "builder:FILE.py"
        )
        raise InputError(
            f"data.source: got {name}, which TFDS does not find in {where} "
            f"({reason}){advice}"
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
