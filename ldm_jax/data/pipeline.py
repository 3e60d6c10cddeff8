"""From examples to batches: order, resize, batch, shard; all of it resumable."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import grain
import numpy as np
from jaxtyping import Float, Int, UInt8, UInt32
from PIL import Image

from ldm_jax.data.sources import Examples
from ldm_jax.rng import Stream, host_uniform

INDEX_MODULUS = 2**32


class Batch(NamedTuple):
    """Examples of one step: NumPy arrays on the host, JAX arrays on a device."""

    image: UInt8[Any, "b h w c"]
    """uint8 images."""
    label: Int[Any, " b"]
    """Class of each, in [0, num_classes)."""
    example_index: UInt32[Any, " b"]
    """Position in the endless shuffled stream of all processes, so that an example met
    again in a later epoch draws new noise. Modulo 2**32."""
    tokens: Int[Any, "b n"] | None = None
    """Token ids, where the data set has any."""
    embedding: Float[Any, "b n d"] | None = None
    """Vectors of another network, where the data set has any."""
    segmentation: Int[Any, "b h w"] | None = None
    """Class of each pixel, where the data set has any."""


class LatentBatch(NamedTuple):
    """As `Batch`, with what the first stage made of the images in their place."""

    moments: Float[Any, "b h w e"]
    """Of the posterior of each latent, as `nn.bottleneck.read_moments` takes them."""
    label: Int[Any, " b"]
    """As of `Batch`; so are the others."""
    example_index: UInt32[Any, " b"]
    """Likewise."""
    tokens: Int[Any, "b n"] | None = None
    """Likewise."""
    embedding: Float[Any, "b n d"] | None = None
    """Likewise; or what a frozen text encoder says of the caption."""
    segmentation: Int[Any, "b h w"] | None = None
    """Likewise."""


class Augment(NamedTuple):
    """How training examples vary from one epoch to the next.

    What is drawn is a function of the seed and of the example's index in the stream.
    """

    seed: int
    """Of the run, in [0, 2**32)."""
    crop: bool
    """Whether the square is cut anywhere along the longer side, not its middle."""
    flip: bool
    """Whether left and right are exchanged in half of the examples."""


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
    augment: Augment | None = None,
    num_threads: int = 1,
) -> BatchIterator:
    """Make an endless, shuffled, resumable stream of batches of images.

    Args:
      examples: Where to read.
      batch_size: As of `make_stream`, like the others.
      image_size: Height and width that images are resized to, in pixels.
      image_channels: 1 or 3.
      augment: How examples vary; None: they do not.

    Returns:
      The stream; its elements become `Batch`es through `to_batch`.

    Raises:
      ValueError: If `process_count` does not divide `batch_size`.
    """
    prepare = functools.partial(
        prepare_example,
        image_size=image_size,
        image_channels=image_channels,
        augment=augment,
    )
    return make_stream(
        examples,
        prepare,
        batch_size=batch_size,
        seed=seed,
        process_index=process_index,
        process_count=process_count,
        num_threads=num_threads,
    )


def make_stream(
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
    batches of all processes together are the same for any number of them.

    Args:
      examples: Where to read.
      prepare: Makes an example, with its `index` in the endless stream, into arrays.
      batch_size: Examples a step, over all processes.
      seed: Of the order, in [0, 2**32).
      process_index: Which process this is.
      process_count: How many there are; must divide `batch_size`.
      num_threads: That read; several where decoding takes long. Batches stay the same.

    Returns:
      The stream.

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
    """Resize one example's image and map; keep its label, tokens, vectors and index."""
    index = example["index"] % INDEX_MODULUS
    place, flipped = draw_view(augment, index)
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


def draw_view(augment: Augment | None, index: int) -> tuple[float | None, bool]:
    """Draw where an example's square is cut, and whether it is flipped.

    Args:
      augment: What varies.
      index: Of the example in the stream, in [0, 2**32).

    Returns:
      The place along the longer side, in [0, 1), or None for the middle; and whether
      left and right are exchanged.
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
    """Cut and resize a map of classes as its image, by its nearest pixels."""
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
    """Cut the largest square and resize it; grey to colour or back.

    Args:
      image: Grey or RGB.
      size: Side, in pixels.
      channels: 1 or 3.
      place: Of the square along the longer side, in [0, 1); None: its middle.

    Returns:
      The resized image (bicubic), rounded to uint8.
    """
    mode = "L" if channels == 1 else "RGB"
    grey = image.shape[-1] == 1
    picture = Image.fromarray(image[..., 0] if grey else image).convert(mode)
    picture = picture.resize(
        (size, size),
        Image.Resampling.BICUBIC,
        box=_square(*image.shape[:2], place=place),
    )
    return np.asarray(picture, np.uint8).reshape(size, size, channels)


def _square(
    height: int, width: int, *, place: float | None
) -> tuple[int, int, int, int]:
    """Return the largest square at a place: left, top, right, bottom."""
    side = min(height, width)
    spare = (width - side, height - side)  # one of them is 0
    left, top = (
        length // 2 if place is None else int(place * (length + 1)) for length in spare
    )
    return (left, top, left + side, top + side)


def to_batch(element: Mapping[str, np.ndarray]) -> Batch | LatentBatch:
    """Name the arrays of one element of the stream, of images or of latents."""
    if "moments" in element:
        return LatentBatch(
            moments=element["moments"],
            label=element["label"],
            example_index=element["index"],
            tokens=element.get("tokens"),
            embedding=element.get("embedding"),
            segmentation=element.get("segmentation"),
        )
    return Batch(
        image=element["image"],
        label=element["label"],
        example_index=element["index"],
        tokens=element.get("tokens"),
        embedding=element.get("embedding"),
        segmentation=element.get("segmentation"),
    )


def scattered(num: int) -> Int[np.ndarray, " n"]:
    """Return an order of examples in which any first part stands for all of them.

    Data sets come class by class: the first thousand show two of ten.

    Args:
      num: Examples there are.

    Returns:
      Their places, always the same for as many.
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
      examples: The split.
      image_size: Side, in pixels.
      image_channels: 1 or 3.
      limit: Read only so many, from all over the split.

    Returns:
      The examples, the index of each the position in the split, rising.
    """
    chosen = range(len(examples))
    if limit is not None and limit < len(examples):
        chosen = sorted(map(int, scattered(len(examples))[:limit]))
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
