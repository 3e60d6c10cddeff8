"""The way back: from pictures to the noise they would be made from."""

import functools
from collections.abc import Callable

import jax
from jaxtyping import Array, Float

from ldm_jax.diffusion.guidance import unguided
from ldm_jax.diffusion.levels import make_levels
from ldm_jax.diffusion.samplers import sample
from ldm_jax.diffusion.solvers import inversion, slope_of, tabulate
from ldm_jax.networks import (
    Networks,
    SampleParams,
    calls_at_once,
    denoiser_of,
    encode_images,
    images_a_call,
    in_chunks,
    prepare,
)
from ldm_jax.nn.conditioning import ConditionInputs
from ldm_jax.rng import image_keys
from ldm_jax.types import SpacingName

InvertFn = Callable[
    [SampleParams, Float[Array, "b h w c"], ConditionInputs],
    Float[Array, "b h2 w2 d"],
]


def make_invert_fn(
    networks: Networks,
    *,
    num_steps: int,
    spacing: SpacingName | None = None,
    iterations: int = 1,
) -> InvertFn:
    """Make a jitted `invert_fn(params, images, cond)`: the noise DDIM makes them from.

    Sampling with `ddim`, the same steps and spacing, no guidance, the same condition
    and `Edit(latents=...)` gives the images back, as far as the autoencoder can; with
    another condition it changes what differs.

    Args:
      networks: Of the model.
      num_steps: Steps of the sampler.
      spacing: Of the sampler.
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
    levels = make_levels(networks.schedule, num_steps, spacing=spacing)
    table = tabulate(
        inversion(levels, iterations=iterations),
        levels,
        slope_of(levels),
        prediction=networks.prediction,
        sigma_data=networks.sigma_data,
    )

    @jax.jit
    def invert_chunk(
        params: SampleParams,
        inputs: tuple[Float[Array, "b h w c"], ConditionInputs],
    ) -> Float[Array, "b h2 w2 d"]:
        images, cond = inputs
        unused = image_keys([0] * images.shape[0])  # the climb draws nothing
        end = sample(
            unguided(denoiser_of(networks, params)),
            encode_images(networks, params, images),
            unused,
            prepare(networks, params, cond),
            table=table,
        )
        return end.x_0

    def invert_fn(
        params: SampleParams, images: Float[Array, "b h w c"], cond: ConditionInputs
    ) -> Float[Array, "b h2 w2 d"]:
        fn = functools.partial(invert_chunk, params)
        platform = jax.default_backend()
        size = images_a_call(networks, platform)
        at_once = calls_at_once(networks, platform)
        return in_chunks(fn, (images, cond), size=size, at_once=at_once)

    return invert_fn
