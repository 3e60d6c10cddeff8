"""The data set of a run, as evaluation reads it."""

import functools
import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from ldm_jax import build
from ldm_jax.config import Config, DataConfig
from ldm_jax.data.pipeline import Batch, load_all, prepare_example
from ldm_jax.data.sources import Examples, Source, folder_digest


class Dataset(NamedTuple):
    """The data set of a run."""

    data: DataConfig
    """Config of the data."""
    open_split: Callable[[build.Split], Source]
    """Opens a split, or raises `InputError`."""


def dataset_of(config: Config) -> Dataset:
    """Return the data set of a run; nothing is opened yet."""
    return Dataset(config.data, functools.partial(build.open_split, config))


def load_images(dataset: Dataset, split: build.Split, *, limit: int) -> Batch:
    """Read a split, or `limit` examples that are spread over it.

    Raises:
      InputError: If the data cannot be read.
    """
    return prepare_all(dataset, dataset.open_split(split).examples, limit=limit)


def prepare_all(dataset: Dataset, examples: Examples, *, limit: int) -> Batch:
    """Read examples, or `limit` spread over them, as the run prepares its images."""
    size, channels = dataset.data.image_size, dataset.data.image_channels
    return load_all(examples, image_size=size, image_channels=channels, limit=limit)


def read_block(
    data: DataConfig, examples: Examples, start: int, stop: int
) -> UInt8[np.ndarray, "b h w c"]:
    """Read images as the run prepares them, without flips."""
    size, channels = data.image_size, data.image_channels
    rows = [
        prepare_example(
            {**examples[i], "index": i}, image_size=size, image_channels=channels
        )["image"]
        for i in range(start, min(stop, len(examples)))
    ]
    return np.stack(rows)


def data_digest(data: DataConfig) -> str:
    """Return a digest that differs between data sets, without reading their images.

    Raises:
      InputError: If a folder of images does not exist.
    """
    facts: list[Any] = [data.source, data.directory, data.train_split, data.image_size]
    facts += [data.image_channels, data.crop, data.num_train_examples]
    if (folder := folder_digest(data.source)) is not None:
        facts.append(folder)
    return hashlib.sha256(repr(tuple(facts)).encode()).hexdigest()
