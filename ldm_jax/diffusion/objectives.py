"""What the network is trained to minimise."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ldm_jax.diffusion.parameterize import add_noise

Denoiser = Callable[
    [Float[Array, "b h w c"], Int[Array, " b"], Int[Array, " b"]],
    Float[Array, "b h w c"],
]
"""A network as the mathematics sees it: `f(x_t, t, cond)`, predicting eps."""


def eps_loss(
    denoise: Denoiser,
    x_0: Float[Array, "b h w c"],
    t: Int[Array, " b"],
    eps: Float[Array, "b h w c"],
    cond: Int[Array, " b"],
    *,
    abar: Float[Array, " t"],
) -> Float[Array, " b"]:
    """Score a network on the noise it should have found.

    Args:
      denoise: The network.
      x_0: Clean latents, standard deviation about 1.
      t: Timestep of each example, in [0, T).
      eps: Unit-variance noise.
      cond: Condition of each example.
      abar: The schedule's table, float32.

    Returns:
      The mean squared error of each example, over its latent.

    Source:
      Ho et al., DDPM, arXiv:2006.11239, eq. 14; Rombach et al., arXiv:2112.10752,
      eq. 2.
    """
    x_t = add_noise(x_0, eps, abar_t=abar[t])
    error = denoise(x_t, t, cond) - eps
    return jnp.square(error).mean(axis=(1, 2, 3))
