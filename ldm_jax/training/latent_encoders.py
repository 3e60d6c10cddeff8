"""What makes the numbers of a cache: the first stage and a frozen text encoder."""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8

from ldm_jax.build import null_tokens
from ldm_jax.config import Config
from ldm_jax.data.latent_cache import CacheNote, pack, shard_range
from ldm_jax.data.pipeline import prepare_example
from ldm_jax.data.sources import Examples, reading_threads
from ldm_jax.images import to_float
from ldm_jax.latent_diffusion import LatentDiffusion, encode, in_chunks
from ldm_jax.models.conditioning import Condition, ConditionInputs
from ldm_jax.parallel.make_layout import PmapLayout
from ldm_jax.types import PyTree


class Encoders(NamedTuple):
    """What makes numbers of examples."""

    autoencoder: PyTree
    """The first stage's parameters."""
    conditioner: PyTree
    """A frozen text encoder's; {} if no text states are kept."""


class Given(NamedTuple):
    """What is encoded."""

    image: UInt8[Any, "b h w c"]
    """uint8 images."""
    tokens: Int[Any, "b n"] | None
    """Of their captions, where text states are kept."""


class Made(NamedTuple):
    """What it is encoded to."""

    moments: Float[Any, "b h w e"]
    """Of the posterior of each latent."""
    states: Float[Any, "b n d"] | None
    """What the text encoder says."""


def null_state_of(
    config: Config, model: LatentDiffusion, encoders: Encoders
) -> Float[np.ndarray, "n d"]:
    """Return what a frozen text encoder says of the empty prompt."""
    tokens = jnp.asarray([null_tokens(config)], jnp.int32)
    apply = jax.jit(model.conditioner.apply)
    variables = {"params": encoders.conditioner}
    cond = cast(Condition, apply(variables, ConditionInputs(tokens=tokens)))
    return np.asarray(cond.context, np.float32)[0]


def make_encode(
    model: LatentDiffusion, encoders: Encoders, layout: PmapLayout
) -> Callable[[Given], Made]:
    """Make a function that encodes examples on this process' devices.

    On a CPU an example has the same bits wherever it stands: see `images_per_call`.

    Args:
      encoders: Their parameters.
      layout: The devices.

    Returns:
      A function of as many examples as divide by the devices.
    """

    def encode_some(encoders: Encoders, given: Given) -> Made:
        images = to_float(given.image)
        posterior = encode(model.autoencoder, encoders.autoencoder, images)
        states = None
        if given.tokens is not None:
            variables = {"params": encoders.conditioner}
            inputs = ConditionInputs(tokens=given.tokens)
            cond = cast(Condition, model.conditioner.apply(variables, inputs))
            states = jnp.asarray(cond.context, jnp.float32)
        return Made(posterior.moments(), states)

    def on_device(encoders: Encoders, knobs: None, given: Given) -> Made:
        del knobs
        num = 1 if layout.platform == "cpu" else len(given.image)
        return in_chunks(functools.partial(encode_some, encoders), given, size=num)

    placed = layout.place(jax.tree.map(jnp.asarray, encoders))
    mapped = layout.map_images(on_device)
    return lambda given: mapped(placed, None, given)


def encode_records(
    config: Config,
    examples: Examples,
    note: CacheNote,
    encode_batch: Callable[[Given], Made],
    shard: int,
    *,
    size: int,
) -> Iterator[bytes]:
    """Encode the examples of a shard; the last batch is filled up.

    Args:
      examples: The split.
      encode_batch: Made by `make_encode`.
      shard: Which.
      size: Examples a call.

    Yields:
      The records, in the order of the split.
    """
    indices = shard_range(shard, note)
    reads_text = note.text_encoder is not None
    dataset = grain.MapDataset.source(cast(Any, examples))
    dataset = dataset[indices.start : indices.stop].map(
        functools.partial(prepare, config=config)
    )
    options = grain.ReadOptions(
        num_threads=reading_threads(config.data.source), prefetch_buffer_size=size
    )
    rows = iter(dataset.to_iter_dataset(options))
    try:
        place = indices.start
        while batch := list(itertools.islice(rows, size)):
            filled = [*batch, *batch[-1:] * (size - len(batch))]
            images = np.stack([row["image"] for row in filled])
            tokens = np.stack([row["tokens"] for row in filled]) if reads_text else None
            made = encode_batch(Given(images, tokens))
            for number, row in enumerate(batch):
                row["moments"] = made.moments[number]
                if made.states is not None:
                    row["states"] = made.states[number]
                yield pack(row, note, where=f"example {place + number}")
            place += len(batch)
    finally:
        cast(Any, rows).close()


def prepare(example: Any, config: Config) -> dict[str, Any]:
    """Make an example what a run sees of it, and keep its caption."""
    prepared: dict[str, Any] = prepare_example(
        {"index": 0, **example},
        image_size=config.data.image_size,
        image_channels=config.data.image_channels,
    )
    if "caption" in example:
        prepared["caption"] = example["caption"]
    return prepared
