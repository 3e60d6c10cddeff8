"""Gaussian data, for which the best denoiser and the exact samples are known.

With x_0 ~ N(mean, std^2) per pixel and x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps, the
conditional expectation of eps is linear in x_t, and the probability-flow ODE carries
x_T to `mean + std * (x_T - sqrt(abar_T) mean) / total_T`, where
`total_t^2 = abar_t std^2 + 1 - abar_t`.
"""

import jax.numpy as jnp
import numpy as np

MEAN, STD = 0.7, 0.4


def total(abar):
    return (abar * STD**2 + 1 - abar) ** 0.5


def denoiser(abar_table: np.ndarray):
    table = jnp.asarray(abar_table)

    def eps(x_t, t, cond):
        del cond
        abar = table[t][:, None, None, None]
        residual = x_t - jnp.sqrt(abar) * MEAN
        return jnp.sqrt(1 - abar) * residual / (abar * STD**2 + 1 - abar)

    return eps


def flow_end(x_start: np.ndarray, abar_start: float) -> np.ndarray:
    residual = x_start - abar_start**0.5 * MEAN
    return MEAN + STD * residual / total(abar_start)


def sample_moments(abar: np.ndarray, eta: float) -> tuple[float, float]:
    """Carry mean and variance through DDIM: with this denoiser every step is affine.

    Args:
      abar: Signal power of each level visited, rising; the end, 1, is added.
      eta: Share of renewed noise.

    Returns:
      Mean and standard deviation of a pixel of the samples.
    """
    mean, variance = 0.0, 1.0
    for here, there in zip(abar, [*abar[1:], 1.0], strict=True):
        slope = (1 - here) ** 0.5 / total(here) ** 2  # eps = slope (x - root MEAN)
        sigma2 = eta**2 * (1 - there) / (1 - here) * (1 - here / there)
        to_x0 = (there / here) ** 0.5
        direction = (1 - there - sigma2) ** 0.5 - to_x0 * (1 - here) ** 0.5
        gain = to_x0 + direction * slope
        mean = gain * mean - direction * slope * here**0.5 * MEAN
        variance = gain**2 * variance + sigma2
    return mean, variance**0.5
