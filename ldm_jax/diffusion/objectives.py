"""What the network is trained to minimise."""

from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ldm_jax.diffusion.parameterize import (
    PredictionName,
    add_noise,
    eps_from_prediction,
    target_of,
)
from ldm_jax.types import PyTree

Denoiser = Callable[
    [Float[Array, "b h w c"], Int[Array, " b"], PyTree],
    Float[Array, "b h w c"],
]
"""A network as the mathematics sees it: `f(x_t, t, cond)`, the condition any tree of
arrays with a leading batch axis. What it predicts is told beside it."""


def denoising_loss(
    denoise: Denoiser,
    x_0: Float[Array, "b h w c"],
    t: Int[Array, " b"],
    eps: Float[Array, "b h w c"],
    cond: PyTree,
    *,
    abar: Float[Array, " t"],
    prediction: PredictionName,
    loss: Literal["l1", "l2"],
) -> Float[Array, " b"]:
    """Score a network on what it should have predicted.

    Args:
      denoise: The network.
      x_0: Clean latents, standard deviation about 1.
      t: Timestep of each example, in [0, T).
      eps: Unit-variance noise.
      cond: Condition of each example.
      abar: The schedule's table, float32.
      prediction: What the network predicts.
      loss: Absolute or squared error.

    Returns:
      The mean error of each example, over its latent.

    Source:
      Ho et al., DDPM, arXiv:2006.11239, eq. 14; Rombach et al., arXiv:2112.10752,
      eq. 2; Salimans & Ho, arXiv:2202.00512, sec. 4 (v).
    """
    x_t = add_noise(x_0, eps, abar_t=abar[t])
    target = target_of(x_0, eps, abar_t=abar[t], prediction=prediction)
    error = denoise(x_t, t, cond) - target
    per_value = jnp.abs(error) if loss == "l1" else jnp.square(error)
    return per_value.mean(axis=(1, 2, 3))


def predicting_eps(
    denoise: Denoiser, *, abar: Float[Array, " t"], prediction: PredictionName
) -> Denoiser:
    """Make a network predict the noise, whatever it was trained to predict.

    Args:
      denoise: The network.
      abar: The schedule's table, float32.
      prediction: What it predicts.

    Returns:
      A network that predicts eps; the same one if it already does.
    """
    if prediction == "eps":
        return denoise

    def as_eps(
        x_t: Float[Array, "b h w c"], t: Int[Array, " b"], cond: PyTree
    ) -> Float[Array, "b h w c"]:
        output = denoise(x_t, t, cond)
        return eps_from_prediction(x_t, output, abar_t=abar[t], prediction=prediction)

    return as_eps
