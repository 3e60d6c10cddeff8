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
