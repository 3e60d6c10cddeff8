"""From clean and noise to noisy, and from a prediction back to clean."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

PredictionName = Literal["eps", "v", "x0"]


def add_noise(
    x_0: Float[Array, "b h w c"],
    eps: Float[Array, "b h w c"],
    *,
    abar_t: Float[Array, " b"],
) -> Float[Array, "b h w c"]:
    """Draw from q(x_t | x_0): `sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps`.

    Args:
      x_0: Clean latents, standard deviation about 1.
      eps: Unit-variance noise.
      abar_t: Signal power of each example, in (0, 1].

    Returns:
      The noisy latents.

    Source:
      Ho et al., DDPM, arXiv:2006.11239, eq. 4.
    """
    abar = abar_t[:, None, None, None]
    return jnp.sqrt(abar) * x_0 + jnp.sqrt(1.0 - abar) * eps


def clean_from_eps(
    x_t: Float[Array, "b h w c"],
    eps: Float[Array, "b h w c"],
    *,
    abar_t: Float[Array, ""],
) -> Float[Array, "b h w c"]:
    """Solve `add_noise` for the clean latents.

    Args:
      x_t: Noisy latents, all at the same level.
      eps: The noise in them, as predicted.
      abar_t: Signal power, in (0, 1].

    Returns:
      The predicted clean latents.

    Source:
      Ho et al., DDPM, arXiv:2006.11239, eq. 15 (before clipping; latents are not
      clipped).
    """
    return (x_t - jnp.sqrt(1.0 - abar_t) * eps) / jnp.sqrt(abar_t)


def target_of(
    x_0: Float[Array, "b h w c"],
    eps: Float[Array, "b h w c"],
    *,
    abar_t: Float[Array, " b"],
    prediction: PredictionName,
) -> Float[Array, "b h w c"]:
    """Return what a network should predict.

    Args:
      x_0: Clean latents.
      eps: The noise that was added to them.
      abar_t: Signal power of each example, in (0, 1).
      prediction: The noise, the velocity `sqrt(abar) eps - sqrt(1 - abar) x_0`, or
        the clean latents.

    Returns:
      The target.

    Source:
      Salimans & Ho, arXiv:2202.00512, app. D (v).
    """
    if prediction == "eps":
        return eps
    if prediction == "x0":
        return x_0
    abar = abar_t[:, None, None, None]
    return jnp.sqrt(abar) * eps - jnp.sqrt(1.0 - abar) * x_0


def eps_from_prediction(
    x_t: Float[Array, "b h w c"],
    output: Float[Array, "b h w c"],
    *,
    abar_t: Float[Array, " b"],
    prediction: PredictionName,
) -> Float[Array, "b h w c"]:
    """Read the noise out of what a network predicted.

    Args:
      x_t: The noisy latents it was given.
      output: What it predicted.
      abar_t: Signal power of each example, in (0, 1).
      prediction: What that is.

    Returns:
      The noise in `x_t`.

    Source:
      Salimans & Ho, arXiv:2202.00512, app. D, solved for eps.
    """
    if prediction == "eps":
        return output
    abar = abar_t[:, None, None, None]
    if prediction == "v":
        return jnp.sqrt(abar) * output + jnp.sqrt(1.0 - abar) * x_t
    return (x_t - jnp.sqrt(abar) * output) / jnp.sqrt(1.0 - abar)
