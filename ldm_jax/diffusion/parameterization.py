"""Predictions of a network, and conversion between them.

With `x_t = alpha x_0 + sigma eps`, every prediction is linear in x_0 and eps. So the
clean latent, the noise and the flow are weighted sums of `x_t` and the prediction, with
the weights `Reading`.
"""

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ldm_jax.diffusion.schedules import Level

PredictionName = Literal["eps", "v", "x0", "flow", "edm"]
SignalName = Literal["x0", "eps", "flow"]


class Reading(NamedTuple):
    """Weights of a signal: `x_t_weight x_t + output_weight output`."""

    x_t_weight: Float[Any, "*k"]
    output_weight: Float[Any, "*k"]


def add_noise(
    x_0: Float[Array, "b h w c"], eps: Float[Array, "b h w c"], level: Level
) -> Float[Array, "b h w c"]:
    """Draw from q(x_t | x_0): `alpha x_0 + sigma eps`.

    Args:
      x_0: Clean latents, standard deviation about 1.
      eps: Unit-variance noise.
      level: Noise level of each example.

    Source:
      Ho et al., DDPM, arXiv:2006.11239, eq. 4.
    """
    return _wide(level.alpha) * x_0 + _wide(level.sigma) * eps


def target_of(
    x_0: Float[Array, "b h w c"],
    eps: Float[Array, "b h w c"],
    level: Level,
    *,
    prediction: PredictionName,
    sigma_data: float = 1.0,
) -> Float[Array, "b h w c"]:
    """Return the target of a prediction.

    Args:
      x_0: Clean latents.
      eps: Noise that was added to them.
      level: Noise level of each example.
      prediction: The noise; the clean latents; the velocity `alpha eps - sigma x_0`;
        the flow `eps - x_0`; or EDM's F, which is -v if `sigma_data` is 1.
      sigma_data: Standard deviation of the clean latents (`edm`).

    Source:
      Salimans & Ho, arXiv:2202.00512, app. D (v); Liu et al., arXiv:2209.03003, eq. 1
      (flow, with time reversed); Karras et al., arXiv:2206.00364, eq. 8 (F).
    """
    alpha, sigma = _wide(level.alpha), _wide(level.sigma)
    match prediction:
        case "eps":
            return eps
        case "x0":
            return x_0
        case "v":
            return alpha * eps - sigma * x_0
        case "flow":
            return eps - x_0
        case "edm":
            norm = jnp.sqrt(jnp.square(sigma) + jnp.square(sigma_data * alpha))
            return (sigma * x_0 - sigma_data**2 * alpha * eps) / (sigma_data * norm)


def reading_of(
    signal: SignalName,
    level: Level,
    *,
    prediction: PredictionName,
    sigma_data: float = 1.0,
) -> Reading:
    """Return the weights that compute a signal from a prediction, in float64.

    They solve the linear equations of `add_noise` and `target_of`.

    Args:
      signal: The clean latent, the noise, or the flow `eps - x_0`.
      level: Noise levels on the host; sigma above 0 for the noise from x0, alpha above
        0 for the clean latent from eps.
      prediction: Prediction of the network.
      sigma_data: Standard deviation of the clean latents (`edm`).
    """
    alpha, sigma = np.asarray(level.alpha), np.asarray(level.sigma)
    one, zero = np.ones_like(alpha), np.zeros_like(alpha)
    power = alpha**2 + sigma**2
    match prediction:
        case "eps":
            clean = Reading(_over(one, alpha), _over(-sigma, alpha))
            noise = Reading(zero, one)
        case "x0":
            clean = Reading(zero, one)
            noise = Reading(_over(one, sigma), _over(-alpha, sigma))
        case "v":
            clean = Reading(alpha / power, -sigma / power)
            noise = Reading(sigma / power, alpha / power)
        case "flow":
            clean = Reading(1.0 / (alpha + sigma), -sigma / (alpha + sigma))
            noise = Reading(1.0 / (alpha + sigma), alpha / (alpha + sigma))
        case "edm":
            square = sigma**2 + (sigma_data * alpha) ** 2
            out = sigma_data / np.sqrt(square)
            clean = Reading(sigma_data**2 * alpha / square, sigma * out)
            noise = Reading(sigma / square, -alpha * out)
    if signal == "x0":
        return clean
    if signal == "eps":
        return noise
    if prediction == "flow":
        return Reading(zero, one)
    return Reading(*(n - c for n, c in zip(noise, clean, strict=True)))


def prediction_gain(
    level: Level, *, prediction: PredictionName, sigma_data: float = 1.0
) -> Float[Any, "*k"]:
    """Return the ratio of squared errors of the clean latent and of the prediction.

    This is `|d x_0 / d output|^2` at a given `x_t`; it converts a weight of the clean
    latent's error to one of the prediction's.

    Args:
      level: Noise levels; alpha above 0 for eps.
      prediction: Prediction of the network.
      sigma_data: Standard deviation of the clean latents (`edm`).
    """
    alpha2, sigma2 = jnp.square(level.alpha), jnp.square(level.sigma)
    match prediction:
        case "x0":
            return jnp.ones_like(alpha2)
        case "eps":
            return sigma2 / alpha2
        case "v":
            return sigma2 / jnp.square(alpha2 + sigma2)
        case "flow":
            return sigma2 / jnp.square(level.alpha + level.sigma)
        case "edm":
            return sigma2 * sigma_data**2 / (sigma2 + sigma_data**2 * alpha2)


def _wide(weights: Float[Any, " b"]) -> Float[Array, "b 1 1 1"]:
    return jnp.asarray(weights)[:, None, None, None]


def _over(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return a / b
