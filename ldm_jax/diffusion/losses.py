"""The objective of the diffusion stage and its loss."""

from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from ldm_jax.diffusion.guidance import Denoiser
from ldm_jax.diffusion.parameterization import (
    PredictionName,
    add_noise,
    prediction_gain,
    target_of,
)
from ldm_jax.diffusion.schedules import Level, Schedule
from ldm_jax.types import PyTree

WeightName = Literal["uniform", "min_snr", "p2", "debiased"]
LossName = Literal["l1", "l2"]
TINY = 1e-20


class DiffusionObjective(NamedTuple):
    """Prediction, noise levels and loss of the diffusion stage; all static."""

    schedule: Schedule
    """The noise levels."""
    prediction: PredictionName
    """Prediction of the network."""
    sigma_data: float = 1.0
    """Standard deviation of the clean latents (`edm`)."""
    loss: LossName = "l2"
    """Absolute or squared error."""
    weight: WeightName = "uniform"
    """Weight of each noise level."""
    weight_gamma: float = 5.0
    """Parameter of the weight; see `loss_weight`."""
    offset_noise: float = 0.0
    """Weight of noise that is equal in all pixels of a channel; 0: none."""
    timestep_shift: float = 1.0
    """Above 1, high noise levels are drawn more often."""
    condition_dropout: float = 0.0
    """Probability of training an example without its condition, in [0, 1]."""


def denoising_loss(
    denoise: Denoiser,
    x_0: Float[Array, "b h w c"],
    level: Level,
    eps: Float[Array, "b h w c"],
    cond: PyTree,
    *,
    objective: DiffusionObjective,
) -> Float[Array, " b"]:
    """Return the weighted error of a network's prediction.

    Args:
      x_0: Clean latents, standard deviation about 1.
      level: Noise level of each example.
      eps: Unit-variance noise.
      cond: Condition of each example.

    Returns:
      The error of each example, averaged over its latent.

    Source:
      Ho et al., DDPM, arXiv:2006.11239, eq. 14; Rombach et al., arXiv:2112.10752,
      eq. 2; Salimans & Ho, arXiv:2202.00512, sec. 4 (v); Liu et al., arXiv:2209.03003,
      eq. 1 (flow); Karras et al., arXiv:2206.00364, eq. 8 (EDM, whose weight is
      uniform in what its network predicts).
    """
    prediction, sigma_data = objective.prediction, objective.sigma_data
    x_t = add_noise(x_0, eps, level)
    target = target_of(x_0, eps, level, prediction=prediction, sigma_data=sigma_data)
    error = denoise(x_t, level.t, cond) - target
    per_value = jnp.abs(error) if objective.loss == "l1" else jnp.square(error)
    losses = per_value.mean(axis=(1, 2, 3))
    if objective.weight == "uniform":
        return losses
    return losses * loss_weight(
        level,
        weight=objective.weight,
        gamma=objective.weight_gamma,
        prediction=prediction,
        sigma_data=sigma_data,
    )


def loss_weight(
    level: Level,
    *,
    weight: Literal["min_snr", "p2", "debiased"],
    gamma: float,
    prediction: PredictionName,
    sigma_data: float = 1.0,
) -> Float[Array, " b"]:
    """Return the weight of the squared error of a prediction at a noise level.

    As weights of the clean latent's error they are `min(SNR, gamma)`,
    `SNR / (1 + SNR)^gamma` and `SNR^(1 - gamma)`; converted to any prediction.

    Args:
      level: Noise level of each example.
      weight: Weighting.
      gamma: Cap of the SNR (5 in the paper), exponent of P2 (1), or of debiased (1/2).
      prediction: Prediction of the network.
      sigma_data: Standard deviation of the clean latents (`edm`).

    Source:
      Hang et al., arXiv:2303.09556, eq. 8 and 9 (min-SNR); Choi et al.,
      arXiv:2204.00227, eq. 8 (P2, k = 1); Yu et al., arXiv:2310.08442, sec. 3.3
      (debiased: error of the noise over the root of the SNR).
    """
    sigma2 = jnp.maximum(jnp.square(level.sigma), TINY)
    snr = jnp.square(level.alpha) / sigma2
    if weight == "min_snr":
        of_clean = jnp.minimum(snr, gamma)
    elif weight == "p2":
        of_clean = snr / (1.0 + snr) ** gamma
    else:
        of_clean = snr ** (1.0 - gamma)
    gain = prediction_gain(level, prediction=prediction, sigma_data=sigma_data)
    return of_clean * gain


def offset_noise(
    eps: Float[Array, "b h w c"],
    offset: Float[Array, "b c"],
    *,
    strength: float,
) -> Float[Array, "b h w c"]:
    """Add noise that is constant over each channel, so that brightness is learned.

    Args:
      eps: Unit-variance noise.
      offset: Unit-variance noise, one number for each channel of an image.
      strength: Weight of `offset`; 0.1 in the source.

    Source:
      Guttenberg, "Diffusion with Offset Noise" (2023).
    """
    return eps + strength * offset[:, None, None, :]
