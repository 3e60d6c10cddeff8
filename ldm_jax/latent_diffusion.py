"""A latent diffusion model as one static value, and the functions of its networks."""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Key, Real

from ldm_jax.config import ConditionConfig
from ldm_jax.diffusion.guidance import Denoiser
from ldm_jax.diffusion.parameterization import PredictionName
from ldm_jax.diffusion.schedules import Schedule
from ldm_jax.models.autoencoder import Autoencoder
from ldm_jax.models.bottleneck import DiagonalGaussian, Unquantized
from ldm_jax.models.conditioning import (
    Condition,
    Conditioner,
    ConditionInputs,
    null_inputs,
)
from ldm_jax.models.tiled_decoding import decode_in_tiles
from ldm_jax.models.unet import UNet
from ldm_jax.parallel.launch import num_cores
from ldm_jax.rng import Stream, root_key, stream_key
from ldm_jax.types import PrecisionName, PyTree

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

MAPS_A_CALL = 8
"""Maps of an image's size, as wide as the autoencoder, that a call holds at once."""
MOST_MAP_BYTES = 2**30
"""Bytes of the maps of all calls side by side."""


class LatentDiffusion(NamedTuple):
    """A latent diffusion model without its parameters.

    Source:
      Rombach et al., arXiv:2112.10752, figure 3.
    """

    autoencoder: Autoencoder
    """The first stage: images to latents and back."""
    unet: UNet
    """The second stage: denoises latents."""
    conditioner: Conditioner
    """Prepares the condition that the UNet reads."""
    schedule: Schedule
    """The noise levels that the UNet was trained on."""
    prediction: PredictionName
    """Prediction of the UNet."""
    sigma_data: float
    """Standard deviation of the scaled latents, where the UNet predicts EDM's F."""
    image_shape: tuple[int, int, int]
    """Height, width and channels of an image in training."""
    latent_shape: tuple[int, int, int]
    """Height, width and channels of a latent."""
    condition: ConditionConfig
    """The kinds of condition that the UNet reads, and their sizes."""
    num_classes: int
    """Real classes; the null class has this index."""
    null_tokens: tuple[int, ...]
    """Tokens of the empty prompt."""
    chunk: int
    """Images that one call of a sample program makes."""
    precision: PrecisionName
    """Products of float32 in every program of the model, whatever JAX's own setting."""

    @property
    def downsampling(self) -> int:
        """Pixels of an image that a latent stands for, along a side."""
        return 2 ** (len(self.autoencoder.channel_multipliers) - 1)

    @property
    def moments_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of a latent's moments in a cache."""
        height, width, channels = self.latent_shape
        is_gaussian = self.autoencoder.regularizer == "kl"
        return (height, width, 2 * channels if is_gaussian else channels)

    @property
    def concat_channels(self) -> int:
        """Channels of the condition that is stacked on the latent."""
        return self.condition.concat_channels(
            image_channels=self.image_shape[-1], latent_channels=self.latent_shape[-1]
        )

    @property
    def size_unit(self) -> int:
        """Pixels that the height and width of an image must be a multiple of."""
        return self.downsampling * 2 ** (len(self.unet.channel_multipliers) - 1)


class SampleParams(NamedTuple):
    """The arrays that sampling needs."""

    autoencoder: PyTree
    """Averaged parameters of the first stage."""
    unet: PyTree
    """Averaged parameters of the second."""
    conditioner: PyTree
    """Parameters of the conditioner; averaged if it was trained."""
    latent_scale: Float[Array, ""]
    """Factor of the latents in training."""


def in_its_precision(
    fn: Callable[Concatenate[LatentDiffusion, Arguments], Result],
) -> Callable[Concatenate[LatentDiffusion, Arguments], Result]:
    """Compute the products of a function of a model in the precision of the model.

    The model carries the setting, because a setting of JAX around a call is not that of
    a thread, nor of a program that was compiled before.
    """

    @functools.wraps(fn)
    def run(
        model: LatentDiffusion, *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        with jax.default_matmul_precision(model.precision):
            return fn(model, *args, **kwargs)

    return run


def init_autoencoder(model: LatentDiffusion, key: Key[Array, ""]) -> PyTree:
    """Draw the parameters of the first stage from the root key of a run."""
    image = jnp.zeros((1, *model.image_shape))
    noise = jnp.zeros((1, *model.latent_shape))
    key = stream_key(key, Stream.INIT_AUTOENCODER)
    return jax.jit(model.autoencoder.init)(key, image, noise)["params"]


def init_unet(model: LatentDiffusion, key: Key[Array, ""]) -> PyTree:
    """Draw the parameters of the UNet from the root key of a run."""
    latent = jnp.zeros((1, *model.latent_shape))
    key = stream_key(key, Stream.INIT_UNET)
    init = jax.jit(model.unet.init)
    times = jnp.zeros((1,), jnp.int32)
    return init(key, latent, times, blank_condition(model))["params"]


def init_conditioner(model: LatentDiffusion, key: Key[Array, ""]) -> PyTree:
    """Draw the parameters of the conditioner; {} if it has none."""
    key = stream_key(key, Stream.INIT_CONDITIONER)
    variables = jax.jit(model.conditioner.init)(key, blank_inputs(model))
    return variables.get("params", {})


def param_shapes(
    init: Callable[[LatentDiffusion, Key[Array, ""]], PyTree], model: LatentDiffusion
) -> PyTree:
    """Return the shapes of the parameters that an `init_` function draws."""
    return jax.eval_shape(lambda: init(model, root_key(0)))


def blank_inputs(model: LatentDiffusion, *, batch_size: int = 1) -> ConditionInputs:
    """Make conditioner inputs of the right shapes, all zero."""
    condition = model.condition
    label, tokens, embedding, image = None, None, None, None
    if condition.uses_classes:
        label = jnp.zeros((batch_size,), jnp.int32)
    if condition.uses_tokens:
        tokens = jnp.zeros((batch_size, condition.num_tokens), jnp.int32)
    if condition.context == "embedding":
        shape = (condition.embedding_length, condition.embedding_width)
        embedding = jnp.zeros((batch_size, *shape))
    if condition.concat == "segmentation":
        height, width, _ = model.image_shape
        image = jnp.zeros((batch_size, height, width, condition.num_segments))
    elif model.concat_channels:
        height, width, _ = model.latent_shape
        image = jnp.zeros((batch_size, height, width, model.concat_channels))
    return ConditionInputs(label, tokens, embedding, image)


def blank_condition(model: LatentDiffusion) -> Condition:
    """Make a condition of the shapes that the UNet reads, all zero."""
    condition = model.condition
    label, context, concat = None, None, None
    if condition.label:
        label = jnp.zeros((1,), jnp.int32)
    if condition.context != "none":
        context = jnp.zeros((1, 1, condition.context_width))
    if model.concat_channels:
        height, width, _ = model.latent_shape
        concat = jnp.zeros((1, height, width, model.concat_channels))
    return Condition(label, context, concat)


def reading_embeddings(model: LatentDiffusion) -> LatentDiffusion:
    """Return a model that reads text embeddings where `model` encodes text."""
    return model._replace(
        conditioner=model.conditioner.clone(reads="embedding", encoder=None),
        condition=model.condition.as_vectors(),
    )


def null_condition(model: LatentDiffusion, cond: ConditionInputs) -> ConditionInputs:
    """Return the null condition of a model."""
    return null_inputs(
        cond, num_classes=model.num_classes, null_tokens=model.null_tokens
    )


@in_its_precision
def prepare(
    model: LatentDiffusion, params: SampleParams, inputs: ConditionInputs
) -> Condition:
    """Convert inputs to the condition that the UNet reads, once for all steps."""
    variables = {"params": params.conditioner}
    return cast(Condition, model.conditioner.apply(variables, inputs))


def denoiser_of(model: LatentDiffusion, params: SampleParams) -> Denoiser:
    """Bind the UNet to its parameters."""

    def denoise(
        x_t: Float[Array, "b h w c"], t: Real[Array, " b"], cond: PyTree
    ) -> Float[Array, "b h w c"]:
        variables = {"params": params.unet}
        with jax.default_matmul_precision(model.precision):
            return cast(jax.Array, model.unet.apply(variables, x_t, t, cond))

    return denoise


def encode_images(
    model: LatentDiffusion, params: SampleParams, images: Float[Array, "b h w c"]
) -> Float[Array, "b h2 w2 d"]:
    """Encode images in [-1, 1] to the most likely latents, scaled as in training."""
    latents = encode(model, params.autoencoder, images).mode()
    return latents * params.latent_scale


@in_its_precision
def decode(
    model: LatentDiffusion,
    params: SampleParams,
    latents: Float[Array, "b h w c"],
    *,
    tile: int = 0,
) -> Float[Array, "b h2 w2 e"]:
    """Decode latents to images in [-1, 1], at once or tile by tile."""

    def plain(latents: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 e"]:
        variables = {"params": params.autoencoder}
        images = model.autoencoder.apply(variables, latents, method=Autoencoder.decode)
        return jnp.clip(cast(jax.Array, images), -1.0, 1.0)

    latents = latents / params.latent_scale
    if not tile:
        return plain(latents)
    return decode_in_tiles(plain, latents, tile=tile, factor=model.downsampling)


def images_per_call(model: LatentDiffusion, platform: str) -> int:
    """Return how many images one device makes at once.

    On a CPU it is one: XLA splits a convolution of many images over its threads, and
    rounds the last rows of each part differently, so that an image would depend on its
    place (measured on 0.10.2). The cost is in `docs/reference/benchmarks.md`.

    Args:
      platform: JAX's name of the platform.

    Returns:
      `chunk`, or 1.
    """
    return 1 if platform == "cpu" else model.chunk


def calls_at_once(model: LatentDiffusion, platform: str) -> int:
    """Return how many calls of `images_per_call` to make side by side.

    On a CPU one for each core, because a small network's operations do not use several
    cores; fewer if the maps of large images would take much memory. Elsewhere one.

    Args:
      platform: JAX's name of the platform.
    """
    if platform != "cpu":
        return 1
    height, width, _ = model.latent_shape
    pixels = height * width * model.downsampling**2
    bytes_of_map = 4 * pixels * model.autoencoder.channels
    return max(1, min(num_cores(), MOST_MAP_BYTES // (MAPS_A_CALL * bytes_of_map)))


def autoencoder_bytes(model: LatentDiffusion, platform: str) -> int:
    """Return the bytes of the largest array that one image certainly is in stage 1.

    Args:
      platform: JAX's name of the platform.
    """
    height, width, _ = model.latent_shape
    pixels = height * width * model.downsampling**2
    itemsize = jnp.dtype(model.autoencoder.dtype).itemsize
    map_bytes = pixels * model.autoencoder.channels * itemsize
    if not model.autoencoder.mid_attention:
        return map_bytes
    return max(map_bytes, _attention_bytes(height * width, platform))


def unet_bytes(model: LatentDiffusion, platform: str) -> int:
    """Return the bytes of the largest array that one image certainly is in the UNet.

    Args:
      platform: JAX's name of the platform.
    """
    height, width, _ = model.latent_shape
    itemsize = jnp.dtype(model.unet.dtype).itemsize
    sizes = [height * width * model.unet.channels * itemsize]
    for level in range(len(model.unet.channel_multipliers)):
        if 2**level in model.unet.attention_downsampling:
            tokens = height * width // 4**level
            sizes.append(_attention_bytes(tokens, platform))
    return max(sizes)


def _attention_bytes(tokens: int, platform: str) -> int:
    """Return the bytes of one head's probabilities; kernels of a GPU or TPU need none.

    They are float32 in any dtype of computation.
    """
    return 4 * tokens**2 if platform == "cpu" else 0


def in_chunks(
    fn: Callable[[PyTree], PyTree], inputs: PyTree, *, size: int, at_once: int = 1
) -> PyTree:
    """Map a function of `size` images over any number; the last call is padded.

    One program makes every image, so that its bits do not depend on the number of
    images. (A program for several chunks would differ in the last bits.) Inside another
    jitted function the calls become a `lax.map`.

    Args:
      fn: Function from arrays by image to arrays by image.
      inputs: Any tree of arrays by image.
      size: Images a call.
      at_once: Calls side by side, each in a thread; only where all inputs are arrays.

    Returns:
      The results of the function for all images.
    """
    num = jax.tree.leaves(inputs)[0].shape[0]
    # The indices are padded, not the arrays: keys have a dtype of their own.
    slots = np.minimum(np.arange(num + -num % size), num - 1).reshape(-1, size)

    def join(leaf: Array) -> Array:
        return leaf.reshape(leaf.shape[0] * size, *leaf.shape[2:])[:num]

    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(inputs)):
        outputs = jax.lax.map(fn, jax.tree.map(lambda x: x[slots], inputs))
        return jax.tree.map(join, outputs)
    if num == size:
        return fn(inputs)
    parts = _call_all(fn, [_take(inputs, row) for row in slots], at_once)
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[:num], *parts)


def _call_all(
    fn: Callable[[PyTree], PyTree], inputs: list[PyTree], at_once: int
) -> list[PyTree]:
    """Call a function for every input; in threads only if it is compiled already.

    A thread does not inherit settings of its caller, such as a precision in a `with`
    block, and a program compiled in it would differ in the last bits.
    """
    first, *others = inputs
    done = [fn(first)]  # compiled if need be, and not waited for

    def call(given: PyTree) -> PyTree:
        with jax.no_tracing():
            return jax.block_until_ready(fn(given))

    if at_once > 1:
        try:
            with ThreadPoolExecutor(at_once) as threads:
                return done + list(threads.map(call, others))
        except RuntimeError as error:
            if "no_tracing" not in str(error):
                raise
    return done + [fn(given) for given in others]


@jax.jit
def _take(inputs: PyTree, row: Int[Array, " c"]) -> PyTree:
    """Return some of the images, in one dispatch."""
    return jax.tree.map(lambda x: jnp.take(x, row, axis=0), inputs)


@in_its_precision
def encode(
    model: LatentDiffusion, params: PyTree, images: Float[Array, "b h w c"]
) -> DiagonalGaussian | Unquantized:
    """Encode images in [-1, 1] to the posterior of unscaled latents.

    Args:
      params: Parameters of the autoencoder.
    """
    variables = {"params": params}
    encoded = model.autoencoder.apply(variables, images, method=Autoencoder.encode)
    return cast(Any, encoded)
