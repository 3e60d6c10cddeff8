"""Examples to the records of a latent cache: first stage and frozen text encoder."""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8

from ldm_jax.config import DataConfig
from ldm_jax.data.latent_cache import CacheNote, pack, shard_range
from ldm_jax.data.pipeline import prepare_example
from ldm_jax.data.sources import Examples, reading_threads
from ldm_jax.images import to_float
from ldm_jax.latent_diffusion import LatentDiffusion, encode, in_chunks
from ldm_jax.models.conditioning import Condition, ConditionInputs
from ldm_jax.parallel.make_layout import PmapLayout
from ldm_jax.types import PyTree


class Encoders(NamedTuple):
    """Parameters of the networks that encode examples."""

    autoencoder: PyTree
    """Parameters of the first stage."""
    conditioner: PyTree
    """Parameters of a frozen text encoder; {} if the cache has no text embeddings."""


class EncoderInputs(NamedTuple):
    """A batch of examples before encoding."""

    image: UInt8[Any, "b h w c"]
    """8-bit images."""
    tokens: Int[Any, "b n"] | None
    """Tokens of the captions, where text embeddings are cached."""


class Encoded(NamedTuple):
    """A batch of examples after encoding."""

    moments: Float[Any, "b h w e"]
    """Moments of the posterior of each latent."""
    embeddings: Float[Any, "b n d"] | None
    """Text embeddings."""


def encode_empty_prompt(
    model: LatentDiffusion, encoders: Encoders
) -> Float[np.ndarray, "n d"]:
    """Return the text embedding of the empty prompt."""
    tokens = jnp.asarray([model.null_tokens], jnp.int32)
    apply = jax.jit(model.conditioner.apply)
    variables = {"params": encoders.conditioner}
    with jax.default_matmul_precision(model.precision):
        cond = cast(Condition, apply(variables, ConditionInputs(tokens=tokens)))
    return np.asarray(cond.context, np.float32)[0]


def make_encode(
    model: LatentDiffusion, encoders: Encoders, layout: PmapLayout
) -> Callable[[EncoderInputs], Encoded]:
    """Make a function that encodes examples on this process' devices.

    On a CPU the bits of an example do not depend on its place in the batch: see
    `images_per_call`.

    Returns:
      A function of a batch that divides by the devices.
    """

    def encode_some(encoders: Encoders, inputs: EncoderInputs) -> Encoded:
        images = to_float(inputs.image)
        posterior = encode(model, encoders.autoencoder, images)
        embeddings = None
        if inputs.tokens is not None:
            variables = {"params": encoders.conditioner}
            text = ConditionInputs(tokens=inputs.tokens)
            with jax.default_matmul_precision(model.precision):
                cond = cast(Condition, model.conditioner.apply(variables, text))
            embeddings = jnp.asarray(cond.context, jnp.float32)
        return Encoded(posterior.moments(), embeddings)

    def on_device(encoders: Encoders, unused: None, inputs: EncoderInputs) -> Encoded:
        del unused
        num = 1 if layout.platform == "cpu" else len(inputs.image)
        return in_chunks(functools.partial(encode_some, encoders), inputs, size=num)

    placed = layout.place(jax.tree.map(jnp.asarray, encoders))
    mapped = layout.map_images(on_device)
    return lambda inputs: mapped(placed, None, inputs)


def encode_records(
    data: DataConfig,
    examples: Examples,
    note: CacheNote,
    encode_batch: Callable[[EncoderInputs], Encoded],
    shard: int,
    *,
    size: int,
) -> Iterator[bytes]:
    """Encode the examples of a shard.

    Args:
      examples: The whole split.
      encode_batch: Made by `make_encode`.
      shard: Index of the shard.
      size: Examples a call; the last batch is padded.

    Yields:
      The records, in the order of the split.
    """
    indices = shard_range(shard, note)
    reads_text = note.text_encoder is not None
    dataset = grain.MapDataset.source(cast(Any, examples))
    dataset = dataset[indices.start : indices.stop].map(
        functools.partial(prepare, data=data)
    )
    options = grain.ReadOptions(
        num_threads=reading_threads(data.source), prefetch_buffer_size=size
    )
    rows = iter(dataset.to_iter_dataset(options))
    try:
        place = indices.start
        while batch := list(itertools.islice(rows, size)):
            filled = [*batch, *batch[-1:] * (size - len(batch))]
            images = np.stack([row["image"] for row in filled])
            tokens = np.stack([row["tokens"] for row in filled]) if reads_text else None
            encoded = encode_batch(EncoderInputs(images, tokens))
            for number, row in enumerate(batch):
                row["moments"] = encoded.moments[number]
                if encoded.embeddings is not None:
                    row["states"] = encoded.embeddings[number]
                yield pack(row, note, where=f"example {place + number}")
            place += len(batch)
    finally:
        cast(Any, rows).close()


def prepare(example: Any, data: DataConfig) -> dict[str, Any]:
    """Prepare an example as training does, and keep its caption."""
    prepared: dict[str, Any] = prepare_example(
        {"index": 0, **example},
        image_size=data.image_size,
        image_channels=data.image_channels,
    )
    if "caption" in example:
        prepared["caption"] = example["caption"]
    return prepared
