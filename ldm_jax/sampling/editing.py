"""Starts of samples other than noise: images, masks, other samples."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from ldm_jax.diffusion.guidance import unguided
from ldm_jax.diffusion.parameterization import add_noise
from ldm_jax.diffusion.sampling import Known, keep_known, sample, starting_noise
from ldm_jax.diffusion.schedules import Level
from ldm_jax.diffusion.solvers import inversion, slope_of, tabulate
from ldm_jax.diffusion.timesteps import Levels, make_levels
from ldm_jax.latent_diffusion import (
    LatentDiffusion,
    SampleParams,
    calls_at_once,
    denoiser_of,
    encode_images,
    images_per_call,
    in_chunks,
    prepare,
)
from ldm_jax.models.conditioning import Condition, ConditionInputs
from ldm_jax.rng import image_keys
from ldm_jax.training.conditions import cut_holes, join_masked
from ldm_jax.types import SpacingName

InvertFn = Callable[
    [SampleParams, Float[Array, "b h w c"], ConditionInputs],
    Float[Array, "b h2 w2 d"],
]


def make_invert_fn(
    model: LatentDiffusion,
    *,
    num_steps: int,
    spacing: SpacingName | None = None,
    iterations: int = 1,
) -> InvertFn:
    """Make a jitted `invert_fn(params, images, cond)`, from images to DDIM's noise.

    Sampling with `ddim`, the same steps and spacing, no guidance, the same condition
    and `Edit(latents=...)` reproduces the images up to the error of the autoencoder;
    another condition changes them accordingly.

    Args:
      num_steps: Steps of the sampler.
      spacing: Spacing of the steps.
      iterations: Network calls a step; more make the inverse exact.

    Returns:
      The function.

    Raises:
      ValueError: If a number is out of range.

    Source:
      `solvers.inversion`.
    """
    if iterations < 1:
        raise ValueError(f"iterations: got {iterations}, wanted at least 1")
    levels = make_levels(model.schedule, num_steps, spacing=spacing)
    table = tabulate(
        inversion(levels, iterations=iterations),
        levels,
        slope_of(levels),
        prediction=model.prediction,
        sigma_data=model.sigma_data,
    )

    @jax.jit
    def invert_chunk(
        params: SampleParams,
        inputs: tuple[Float[Array, "b h w c"], ConditionInputs],
    ) -> Float[Array, "b h2 w2 d"]:
        images, cond = inputs
        unused = image_keys([0] * images.shape[0])  # inversion draws no noise
        end = sample(
            unguided(denoiser_of(model, params)),
            encode_images(model, params, images),
            unused,
            prepare(model, params, cond),
            table=table,
        )
        return end.x_0

    def invert_fn(
        params: SampleParams, images: Float[Array, "b h w c"], cond: ConditionInputs
    ) -> Float[Array, "b h2 w2 d"]:
        fn = functools.partial(invert_chunk, params)
        platform = jax.default_backend()
        size = images_per_call(model, platform)
        at_once = calls_at_once(model, platform)
        return in_chunks(fn, (images, cond), size=size, at_once=at_once)

    return invert_fn


PARALLEL_SINE = 1e-4


class Edit(NamedTuple):
    """Start of a sample; fields that are None have no effect."""

    image: Float[Array, "b h w c"] | None = None
    """Image in [-1, 1], which is changed by the share `strength` of the steps, or kept
    where the mask is 0."""
    mask: Float[Array, "b h w 1"] | None = None
    """1 where the image is sampled, 0 where its pixels are kept exactly."""
    latents: Float[Array, "b h w c"] | None = None
    """Latents at the first level, such as those of an inversion."""
    other_keys: Key[Array, " b"] | None = None
    """A second key per image; the start lies between the two noises."""
    other_cond: ConditionInputs | None = None
    """A second condition; the condition lies between the two."""
    weight: Float[Array, " b"] | None = None
    """Position between the two: 0 is the first, 1 the second."""


class FirstLevel(NamedTuple):
    """The noise level at which a sampler starts."""

    level: Level
    """The level."""
    spread: Float[Any, ""]
    """Standard deviation of the latents there."""
    is_whole: Bool[Any, ""]
    """Whether the sampler makes all its steps; False if an edit skips the first
    ones."""


class Start(NamedTuple):
    """Start of a sampler."""

    x_start: Float[Array, "b h w c"]
    """Latents at the first level."""
    known: Known | None
    """Known part of the images, or None."""


def start_of(
    model: LatentDiffusion,
    params: SampleParams,
    keys: Key[Array, " b"],
    edit: Edit,
    *,
    first: FirstLevel,
) -> Start:
    """Make the latents at the first level.

    A hole is filled from noise alone if the sampler makes all its steps, otherwise from
    the noised image.

    Args:
      keys: One per image.
      edit: The start.
      first: The level.

    Source:
      Meng et al., SDEdit, arXiv:2108.01073, algorithm 1; Lugmayr et al., RePaint,
      arXiv:2201.09865, eq. 8.
    """
    shape = model.latent_shape
    noise = starting_noise(keys, shape)
    if edit.other_keys is not None and edit.weight is not None:
        noise = slerp(noise, starting_noise(edit.other_keys, shape), edit.weight)
    x_start = first.spread * noise if edit.latents is None else edit.latents
    if edit.image is None:
        return Start(x_start, None)
    x_0 = encode_images(model, params, edit.image)
    level = Level(*(jnp.full(x_0.shape[:1], row, x_0.dtype) for row in first.level))
    if edit.latents is None:
        noised = add_noise(x_0, noise, level)
        from_noise = first.is_whole if edit.mask is not None else False
        x_start = jnp.where(from_noise, x_start, noised)
    if edit.mask is None:
        return Start(x_start, None)
    known = Known(x_0, noise, free_latents(edit.mask, shape))
    return Start(keep_known(x_start, known, level.alpha[0], level.sigma[0]), known)


def first_level(levels: Levels, *, sigma_data: float, is_whole: bool) -> FirstLevel:
    """Collect the values of the first level that `start_of` reads.

    The spread is that of `alpha x_0 + sigma eps`; it is below 1 in flows only.
    """
    rows = (levels.t[0], levels.alpha[0], levels.sigma[0])
    spread = np.hypot(sigma_data * levels.alpha[0], levels.sigma[0])
    return FirstLevel(
        Level(*map(np.asarray, rows)), np.asarray(spread), np.asarray(is_whole)
    )


def free_latents(
    mask: Float[Array, "b h w 1"], shape: tuple[int, int, int]
) -> Float[Array, "b h2 w2 1"]:
    """Mark every latent that covers a pixel to be sampled."""
    factor = mask.shape[1] // shape[0]
    blocks = mask.reshape(-1, shape[0], factor, shape[1], factor, 1)
    return (blocks.max(axis=(2, 4)) > 0.5).astype(jnp.float32)


def paste(images: Float[Array, "b h w c"], edit: Edit) -> Float[Array, "b h w c"]:
    """Restore the pixels that the mask keeps, exactly as they were given."""
    if edit.image is None or edit.mask is None:
        return images
    return jnp.where(edit.mask > 0.5, images, edit.image)


def masked_inputs(
    model: LatentDiffusion,
    params: SampleParams,
    images: Float[Array, "b h w c"],
    mask: Float[Array, "b h w 1"],
) -> Float[Array, "b h2 w2 d"]:
    """Make the condition of an inpainting model, as in its training.

    Args:
      images: In [-1, 1].
      mask: 1 where they are sampled.

    Returns:
      The latents of the images with holes, and the mask in {-1, 1}.
    """
    return join_masked(encode_images(model, params, cut_holes(images, mask)), mask)


def slerp(
    a: Float[Array, "b h w c"], b: Float[Array, "b h w c"], weight: Float[Array, " b"]
) -> Float[Array, "b h w c"]:
    """Interpolate between two noises along the sphere.

    Args:
      a: Noise at weight 0.
      b: Noise at weight 1.
      weight: Weight of each image.

    Returns:
      The interpolated noise; linear where the two are parallel.

    Source:
      Shoemake (1985); Song et al., DDIM, arXiv:2010.02502, eq. 67.
    """
    axes = (1, 2, 3)
    norms = jnp.sqrt(jnp.square(a).sum(axes) * jnp.square(b).sum(axes))
    angle = jnp.arccos(jnp.clip((a * b).sum(axes) / norms, -1.0, 1.0))
    sine = jnp.sin(angle)
    parallel = sine < PARALLEL_SINE
    safe = jnp.where(parallel, 1.0, sine)
    first = jnp.where(parallel, 1.0 - weight, jnp.sin((1.0 - weight) * angle) / safe)
    second = jnp.where(parallel, weight, jnp.sin(weight * angle) / safe)
    wide = (slice(None), None, None, None)
    return first[wide] * a + second[wide] * b


def mix_conditions(
    a: Condition, b: Condition, weight: Float[Array, " b"], *, num_classes: int
) -> Condition:
    """Interpolate linearly between two prepared conditions.

    Args:
      a: Condition at weight 0.
      b: Condition at weight 1.
      weight: Weight of each image.
      num_classes: Real classes; the null class has this index.

    Returns:
      The interpolated condition; a label becomes a weight for each class.
    """

    def mix(first: Array, second: Array) -> Array:
        w = weight.reshape(-1, *[1] * (first.ndim - 1)).astype(first.dtype)
        return (1 - w) * first + w * second

    soft = (soften(c, num_classes=num_classes) for c in (a, b))
    return cast(Condition, jax.tree.map(mix, *soft))


def soften(cond: Condition, *, num_classes: int) -> Condition:
    """Convert a label to a weight for each class, the null class last."""
    if cond.label is None:
        return cond
    label = jax.nn.one_hot(cond.label, num_classes + 1, dtype=jnp.float32)
    return cond._replace(label=label)
