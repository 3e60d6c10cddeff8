"""Data sets on disk as random access to single examples."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from ldm_jax.data.folder import Need, folder_captions, num_threads, open_folder
from ldm_jax.data.folder_listing import digest_of, list_folder
from ldm_jax.data.tfds_builders import (
    BUILDER,
    nearest,
    open_builder,
    quiet,
    tfds_directory,
)
from ldm_jax.types import InputError

FOLDER = "folder:"
"""Prefix of the name of a folder of images; its path follows."""

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


class MappedExamples:
    """Examples that a function changes on access."""

    def __init__(
        self,
        examples: Examples,
        change: Callable[[Mapping[str, Any], int], Mapping[str, Any]],
    ) -> None:
        """Wrap examples; `change` takes an example and its index."""
        self._examples = examples
        self._change = change

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self._examples)

    def __getitem__(self, record: int, /) -> Mapping[str, Any]:
        """Return one example, changed."""
        return self._change(self._examples[record], record)


class Source(NamedTuple):
    """One split of a data set, and its metadata."""

    examples: Examples
    """Examples of the split."""
    class_names: tuple[str, ...]
    """Names of the classes; () if there are none."""
    channels: int
    """Channels of the images."""

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)


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
      name: `folder:PATH`; `tfds:NAME` or `tfds:NAME/CONFIG`; or `builder:PATH.py` or
        `builder:PATH.py/CONFIG`, a Python file with a TFDS builder. `tfds:digits` is
        this package's own; it and a file's data set are prepared first.
      split: Part of the data set in TFDS' notation.
      directory: TFDS' data folder; None for TFDS' default.
      needs: What every example of a folder must have.
      image_size: Side in pixels; a warning names smaller images of a folder.
      max_broken_files: Unreadable files of a folder that are skipped.

    Returns:
      The split. An example is decoded on access; it has an `image` and, where the data
      set has them, `label`, `caption`, `tokens`, `embedding` and `segmentation`.

    Raises:
      InputError: If the data set is not prepared, cannot be read, or has no images or
        no such split; or if a folder lacks what is needed.
    """
    if name.startswith(FOLDER):
        examples, class_names = open_folder(
            _folder_path(name),
            split,
            needs=needs,
            image_size=image_size,
            max_broken_files=max_broken_files,
            max_bytes_in_memory=MAX_BYTES_IN_MEMORY,
        )
        return Source(examples, class_names, channels=examples.channels)
    where = tfds_directory(directory)
    try:
        with quiet():
            builder = open_builder(name, where)
            features: Any = builder.info.features
            examples = _open_split(builder, name, split)
            class_names = _class_names_of(features)
            if "label" in features and class_names is None:
                examples = MappedExamples(examples, _without_label)
            if builder.info.dataset_size < MAX_BYTES_IN_MEMORY:
                examples = [examples[i] for i in range(len(examples))]
    except OSError as error:
        raise InputError(
            f"data.directory: cannot prepare or read {name} in {where} "
            f"({error.strerror or error}); try --data.directory with a folder you may "
            "write to"
        ) from error
    _check_feature("image", features, name)
    return Source(examples, class_names or (), features["image"].shape[-1])


def read_captions(
    name: str, split: str, *, directory: str | None, limit: int | None = None
) -> list[str]:
    """Read the captions of a split without decoding its images.

    Args:
      limit: Largest number to read, from the start; None for all.

    Raises:
      InputError: As `open_source`; or if there are no captions, or one is not UTF-8.
    """
    if name.startswith(FOLDER):
        return folder_captions(_folder_path(name), split)[:limit]
    import tensorflow_datasets as tfds

    with quiet():
        builder = open_builder(name, tfds_directory(directory))
        _check_feature("caption", builder.info.features, name)
        decoders = {"image": tfds.decode.SkipDecoding()}
        rows = builder.as_data_source(split, decoders=decoders)
        return [
            caption_of(rows[i], f"{name}, example {i}")
            for i in range(len(rows))[:limit]
        ]


def has_captions(name: str, *, directory: str | None) -> bool:
    """Return whether a data set has captions that must be tokenized.

    A folder counts as having them: `open_source` has checked it.

    Raises:
      InputError: As `open_source`.
    """
    if name.startswith(FOLDER):
        return True
    with quiet():
        features = open_builder(name, tfds_directory(directory)).info.features
    return "caption" in features and "tokens" not in features


def find_class_names(name: str, *, directory: str | None) -> tuple[str, ...]:
    """Return the names of a data set's classes in the order of its labels.

    Nothing is prepared; () if the data set has no classes or is not there.
    """
    try:
        if name.startswith(FOLDER):
            return list_folder(_folder_path(name)).class_names
        with quiet():
            builder = open_builder(name, tfds_directory(directory), prepare=False)
        return _class_names_of(builder.info.features) or ()
    except (InputError, OSError):
        return ()


def folder_digest(name: str) -> str | None:
    """Return a digest of a folder's file names and sizes; None for another source.

    Raises:
      InputError: If the folder is not there, or holds no images.
    """
    if not name.startswith(FOLDER):
        return None
    return digest_of(list_folder(_folder_path(name)))


def reading_threads(name: str) -> int:
    """Return how many threads read a source: several if it decodes files."""
    return num_threads() if name.startswith(FOLDER) else 1


def caption_of(example: Mapping[str, Any], where: str) -> str:
    """Return the caption of an example as text.

    Args:
      example: An example whose `caption` is text or bytes.
      where: Name of the example in an error.

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


def _folder_path(name: str) -> Path:
    return Path(os.path.expanduser(name.removeprefix(FOLDER)))


def _class_names_of(features: Any) -> tuple[str, ...] | None:
    names = getattr(features["label"], "names", None) if "label" in features else None
    return None if names is None else tuple(names)


def _without_label(example: Mapping[str, Any], record: int) -> Mapping[str, Any]:
    """Remove a label that is no class, such as a name or a number."""
    del record
    return {name: value for name, value in example.items() if name != "label"}


def _check_feature(feature: str, features: Any, name: str) -> None:
    if feature not in features:
        raise InputError(
            f"data.source: {name} has no feature {feature!r} but {', '.join(features)}"
        )


def _open_split(builder: Any, name: str, split: str) -> Any:
    try:
        return builder.as_data_source(split)
    except NotImplementedError:
        advice = " for it"
        if not name.startswith(BUILDER):
            advice = (
                f", and there: tfds build {name.removeprefix('tfds:')} --data_dir "
                "FOLDER --file_format array_record"
            )
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
