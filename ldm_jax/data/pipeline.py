"""Batches of examples: shuffled, resized, sharded and resumable."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import grain
import numpy as np
from jaxtyping import Float, Int, UInt8, UInt32
from PIL import Image

from ldm_jax.data.image_files import to_picture
from ldm_jax.data.sources import Examples
from ldm_jax.rng import Stream, host_uniform

INDEX_MODULUS = 2**32


class Batch(NamedTuple):
    """Examples of one step: NumPy arrays on the host, JAX arrays on a device."""

    image: UInt8[Any, "b h w c"]
    """8-bit images."""
    label: Int[Any, " b"]
    """Class, in [0, num_classes)."""
    example_index: UInt32[Any, " b"]
    """Position in the endless shuffled stream of all processes, modulo 2**32, so that
    an example draws new noise in every epoch."""
    tokens: Int[Any, "b n"] | None = None
    """Token ids, if the model reads text."""
    embedding: Float[Any, "b n d"] | None = None
    """Vectors of another network, if the data set has them."""
    segmentation: Int[Any, "b h w"] | None = None
    """Class of each pixel, if the data set has them."""


class LatentBatch(NamedTuple):
    """A batch with cached latents in place of images; other fields as in `Batch`."""

    moments: Float[Any, "b h w e"]
    """Moments of each latent's posterior, for `models.bottleneck.read_moments`."""
    label: Int[Any, " b"]
    """Class, in [0, num_classes)."""
    example_index: UInt32[Any, " b"]
    """Position in the stream, modulo 2**32."""
    tokens: Int[Any, "b n"] | None = None
    """Token ids, if the model reads text."""
    embedding: Float[Any, "b n d"] | None = None
    """Vectors of another network, or of a frozen text encoder."""
    segmentation: Int[Any, "b h w"] | None = None
    """Class of each pixel, if the data set has them."""


class Augment(NamedTuple):
    """Random variation of training examples.

    Draws are a function of the seed and of the example's index in the stream.
    """

    seed: int
    """Seed of the run, in [0, 2**32)."""
    crop: bool
    """Crop the square at random along the longer side instead of in its middle."""
    flip: bool
    """Flip half of the examples left to right."""


@runtime_checkable
class BatchIterator(Protocol):
    """An endless iterator whose position can be saved and restored."""

    def __next__(self) -> Any:
        """Return the next element."""
        ...

    def get_state(self) -> Any:
        """Return the position as JSON-compatible values."""
        ...

    def set_state(self, state: Any) -> None:
        """Move to a position."""
        ...

    def close(self) -> None:
        """Stop the reading threads."""
        ...


def make_iterator(
    examples: Examples,
    prepare: Callable[[Mapping[str, Any]], dict[str, np.ndarray]],
    *,
    batch_size: int,
    seed: int,
    process_index: int,
    process_count: int,
    num_threads: int = 1,
) -> BatchIterator:
    """Make an endless, shuffled, resumable stream of batches.

    Each epoch has its own order, a function of `seed` and the number of examples alone.
    A process reads every `process_count`-th example of the common stream, so that the
    batches of all processes together do not depend on their number.

    Args:
      prepare: Converts an example, with its `index` in the endless stream, to arrays.
      batch_size: Examples a step, over all processes.
      seed: Seed of the order, in [0, 2**32).
      process_index: Index of this process.
      process_count: Number of processes; must divide `batch_size`.
      num_threads: Reading threads; batches do not depend on it.

    Raises:
      ValueError: If `process_count` does not divide `batch_size`.
    """
    if batch_size % process_count:
        raise ValueError(
            f"batch size {batch_size} does not divide by {process_count} processes"
        )
    dataset = (
        grain.MapDataset.source(cast(Any, examples))
        .seed(seed)
        .shuffle()
        .repeat(None)
        .map_with_index(lambda index, example: {**example, "index": index})
    )
    dataset = dataset[process_index::process_count].map(prepare)
    dataset = dataset.batch(batch_size // process_count, drop_remainder=True)
    options = grain.ReadOptions(
        num_threads=num_threads, prefetch_buffer_size=num_threads + 1
    )
    return iter(dataset.to_iter_dataset(options))


def prepare_example(
    example: Mapping[str, Any],
    *,
    image_size: int,
    image_channels: int,
    augment: Augment | None = None,
) -> dict[str, np.ndarray]:
    """Convert an example to arrays, its image and segmentation resized."""
    index = example["index"] % INDEX_MODULUS
    place, flipped = draw_augmentation(augment, index)
    image = resize(example["image"], image_size, channels=image_channels, place=place)
    prepared = {
        "image": image[:, ::-1] if flipped else image,
        "label": np.asarray(example.get("label", 0), np.int32),
        "index": np.asarray(index, np.uint32),
    }
    for name, dtype in (("tokens", np.int32), ("embedding", np.float32)):
        if name in example:
            prepared[name] = np.asarray(example[name], dtype)
    if "segmentation" in example:
        segments = np.asarray(example["segmentation"], np.int32)
        segments = segments.reshape(segments.shape[:2])  # TFDS' masks are (h, w, 1)
        segments = resize_segments(segments, image_size, place=place)
        prepared["segmentation"] = segments[:, ::-1] if flipped else segments
    return prepared


def draw_augmentation(augment: Augment | None, index: int) -> tuple[float | None, bool]:
    """Draw the crop and the flip of an example.

    Args:
      index: Index of the example in the stream, in [0, 2**32).

    Returns:
      The place of the square along the longer side, in [0, 1), or None for the middle;
      and whether the example is flipped left to right.
    """
    if augment is None:
        return None, False
    draw = functools.partial(host_uniform, augment.seed, index=index)
    return (
        draw(Stream.CROP) if augment.crop else None,
        augment.flip and draw(Stream.FLIP) < 0.5,
    )


def resize_segments(
    segments: Int[np.ndarray, "h w"], size: int, *, place: float | None = None
) -> Int[np.ndarray, "s s"]:
    """Crop and resize a segmentation map like its image, by nearest pixels."""
    left, top, right, bottom = _square(*segments.shape, place=place)
    square = segments[top:bottom, left:right]
    places = np.arange(size) * len(square) // size
    return square[places][:, places]


def resize(
    image: UInt8[np.ndarray, "h w c"],
    size: int,
    *,
    channels: int,
    place: float | None = None,
) -> UInt8[np.ndarray, "s s d"]:
    """Crop the largest square, resize it (bicubic), and convert its channels.

    Args:
      image: Grey or RGB.
      size: Side of the result, in pixels.
      channels: 1 or 3.
      place: Place of the square along the longer side, in [0, 1); None for the middle.
    """
    picture = to_picture(image, channels).resize(
        (size, size),
        Image.Resampling.BICUBIC,
        box=_square(*image.shape[:2], place=place),
    )
    return np.asarray(picture, np.uint8).reshape(size, size, channels)


def _square(
    height: int, width: int, *, place: float | None
) -> tuple[int, int, int, int]:
    """Return the left, top, right and bottom of the largest square at a place."""
    side = min(height, width)
    spare = (width - side, height - side)  # one of them is 0
    left, top = (
        length // 2 if place is None else int(place * (length + 1)) for length in spare
    )
    return (left, top, left + side, top + side)


def to_batch(element: Mapping[str, np.ndarray]) -> Batch | LatentBatch:
    """Convert an element of a stream of images or of cached latents to a batch."""
    shared = {
        "label": element["label"],
        "example_index": element["index"],
        "tokens": element.get("tokens"),
        "embedding": element.get("embedding"),
        "segmentation": element.get("segmentation"),
    }
    if "moments" in element:
        return LatentBatch(moments=element["moments"], **shared)
    return Batch(image=element["image"], **shared)


def shuffled_order(num: int) -> Int[np.ndarray, " n"]:
    """Return a fixed random order of `num` examples.

    Its first examples represent all: data sets are often sorted by class.
    """
    return np.random.RandomState(0).permutation(num)


def load_all(
    examples: Examples,
    *,
    image_size: int,
    image_channels: int,
    limit: int | None = None,
) -> Batch:
    """Read a whole split in order, for a small data set or an evaluation.

    Args:
      image_size: Side of the resized images, in pixels.
      image_channels: 1 or 3.
      limit: Largest number of examples, spread over the split; None for all.

    Returns:
      The examples; `example_index` is the index in the split.
    """
    chosen = range(len(examples))
    if limit is not None and limit < len(examples):
        chosen = sorted(map(int, shuffled_order(len(examples))[:limit]))
    rows: Iterator[dict[str, np.ndarray]] = (
        prepare_example(
            {**examples[i], "index": i},
            image_size=image_size,
            image_channels=image_channels,
        )
        for i in chosen
    )
    columns = list(rows)
    batch = to_batch(
        {name: np.stack([row[name] for row in columns]) for name in columns[0]}
    )
    return cast(Batch, batch)
