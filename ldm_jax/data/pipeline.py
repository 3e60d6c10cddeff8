"""From examples to batches: order, resize, batch, shard; all of it resumable."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import grain
import numpy as np
from jaxtyping import Float, Int, UInt8, UInt32
from PIL import Image

from ldm_jax.data.sources import Examples

INDEX_MODULUS = 2**32


class Batch(NamedTuple):
    """Examples of one step: NumPy arrays on the host, JAX arrays on a device.

    Attributes:
      image: uint8 images.
      label: Class of each, in [0, num_classes).
      example_index: Position in the endless shuffled stream of all processes, so that
        an example met again in a later epoch draws new noise. Modulo 2**32.
      tokens: Token ids, where the data set has any.
      embedding: Vectors of another network, where the data set has any.
      segmentation: Class of each pixel, where the data set has any.
    """

    image: UInt8[Any, "b h w c"]
    label: Int[Any, " b"]
    example_index: UInt32[Any, " b"]
    tokens: Int[Any, "b n"] | None = None
    embedding: Float[Any, "b n d"] | None = None
    segmentation: Int[Any, "b h w"] | None = None


@runtime_checkable
class BatchIterator(Protocol):
    """An endless iterator whose position can be saved and restored."""

    def __next__(self) -> Any:
        """Return the next element."""
        ...

    def get_state(self) -> Any:
        """Return the position, as JSON-compatible values."""
        ...

    def set_state(self, state: Any) -> None:
        """Go to a position."""
        ...

    def close(self) -> None:
        """Stop the reading threads."""
        ...


def make_iterator(
    examples: Examples,
    *,
    batch_size: int,
    image_size: int,
    image_channels: int,
    seed: int,
    process_index: int,
    process_count: int,
) -> BatchIterator:
    """Make an endless, shuffled, resumable stream of batches.

    Each epoch has its own order, a function of `seed` alone. A process reads every
    `process_count`-th example of the common stream, so that the batches of all
    processes together are the same for any number of them.

    Args:
      examples: Where to read.
      batch_size: Examples a step, over all processes.
      image_size: Height and width that images are resized to, in pixels.
      image_channels: 1 or 3.
      seed: Of the order, in [0, 2**32).
      process_index: Which process this is.
      process_count: How many there are; must divide `batch_size`.

    Returns:
      The stream; its elements become `Batch`es through `to_batch`.

    Raises:
      ValueError: If `process_count` does not divide `batch_size`.
    """
    if batch_size % process_count:
        raise ValueError(
            f"batch size {batch_size} does not divide by {process_count} processes"
        )
    prepare = functools.partial(
        prepare_example, image_size=image_size, image_channels=image_channels
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
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return iter(dataset.to_iter_dataset(options))


def prepare_example(
    example: Mapping[str, Any], *, image_size: int, image_channels: int
) -> dict[str, np.ndarray]:
    """Resize one example's image and map; keep its label, tokens, vectors and index."""
    image = resize(example["image"], image_size, channels=image_channels)
    prepared = {
        "image": image,
        "label": np.asarray(example.get("label", 0), np.int32),
        "index": np.asarray(example["index"] % INDEX_MODULUS, np.uint32),
    }
    for name, dtype in (("tokens", np.int32), ("embedding", np.float32)):
        if name in example:
            prepared[name] = np.asarray(example[name], dtype)
    if "segmentation" in example:
        segments = np.asarray(example["segmentation"], np.int32)
        segments = segments.reshape(segments.shape[:2])  # TFDS' masks are (h, w, 1)
        prepared["segmentation"] = resize_segments(segments, image_size)
    return prepared


def resize_segments(
    segments: Int[np.ndarray, "h w"], size: int
) -> Int[np.ndarray, "s s"]:
    """Cut and resize a map of classes as its image, by its nearest pixels."""
    left, top, right, bottom = _middle(*segments.shape)
    square = segments[top:bottom, left:right]
    places = np.arange(size) * len(square) // size
    return square[places][:, places]


def resize(
    image: UInt8[np.ndarray, "h w c"], size: int, *, channels: int
) -> UInt8[np.ndarray, "s s d"]:
    """Cut the largest square from the middle and resize it; grey to colour or back.

    Args:
      image: Grey or RGB.
      size: Side, in pixels.
      channels: 1 or 3.

    Returns:
      The resized image (bicubic), rounded to uint8.
    """
    mode = "L" if channels == 1 else "RGB"
    grey = image.shape[-1] == 1
    picture = Image.fromarray(image[..., 0] if grey else image).convert(mode)
    picture = picture.resize(
        (size, size), Image.Resampling.BICUBIC, box=_middle(*image.shape[:2])
    )
    return np.asarray(picture, np.uint8).reshape(size, size, channels)


def _middle(height: int, width: int) -> tuple[int, int, int, int]:
    """Return the largest square in the middle: left, top, right, bottom."""
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    return (left, top, left + side, top + side)


def to_batch(element: Mapping[str, np.ndarray]) -> Batch:
    """Name the arrays of one element of the stream."""
    return Batch(
        image=element["image"],
        label=element["label"],
        example_index=element["index"],
        tokens=element.get("tokens"),
        embedding=element.get("embedding"),
        segmentation=element.get("segmentation"),
    )


def load_all(
    examples: Examples,
    *,
    image_size: int,
    image_channels: int,
    limit: int | None = None,
) -> Batch:
    """Read a whole split in order, for a small data set or an evaluation.

    Args:
      examples: The split.
      image_size: Side, in pixels.
      image_channels: 1 or 3.
      limit: Read only so many.

    Returns:
      The examples, the index of each its index the position in the split.
    """
    rows: Iterator[dict[str, np.ndarray]] = (
        prepare_example(
            {**examples[i], "index": i},
            image_size=image_size,
            image_channels=image_channels,
        )
        for i in range(len(examples))[:limit]
    )
    columns = list(rows)
    return to_batch(
        {name: np.stack([row[name] for row in columns]) for name in columns[0]}
    )
