"""Noise schedules: paths `x_t = alpha x_0 + sigma eps` from clean latents to noise.

Discrete schedules are float64 NumPy tables, cast once on the way to a device.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, Real

from ldm_jax.rng import integers, normal, uniform

DiscreteName = Literal["ldm_linear", "linear", "cosine"]
COSINE_OFFSET = 0.008
COSINE_MAX_BETA = 0.999


class Level(NamedTuple):
    """Noise levels: `x_t = alpha x_0 + sigma eps`."""

    t: Real[Any, "*k"]
    """Time input of the network: an index, or a continuous time scaled by T."""
    alpha: Float[Any, "*k"]
    """Weight of the clean latent, at least 0."""
    sigma: Float[Any, "*k"]
    """Weight of unit-variance noise, in [0, 1]."""


class DiscreteSchedule(NamedTuple):
    """A variance-preserving schedule over i in [0, T): alpha^2 + sigma^2 = 1.

    Source:
      Ho et al., DDPM, arXiv:2006.11239, eq. 2 and 4.
    """

    beta: np.ndarray
    """Variance added at step i, in (0, 1]; float64."""
    abar: np.ndarray
    """Signal power after step i, the product of `1 - beta`; float64."""

    @property
    def num_timesteps(self) -> int:
        """T, the number of discrete noise levels."""
        return len(self.beta)


class FlowSchedule(NamedTuple):
    """The straight path of flow matching: alpha = 1 - s, sigma = s, for s in [0, 1].

    Source:
      Liu et al., arXiv:2209.03003, eq. 1 (with time from the data to the noise).
    """

    num_timesteps: int
    """T; the time input of the network is T s."""


class EdmSchedule(NamedTuple):
    """EDM's noise-to-signal ratios, scaled so that `x_t` has unit variance.

    `x_t` is EDM's `c_in x`, and the time input is T times its `c_noise`.

    Source:
      Karras et al., EDM, arXiv:2206.00364, table 1.
    """

    num_timesteps: int
    """T."""
    sigma_min: float
    """Smallest ratio in sampling."""
    sigma_max: float
    """Largest ratio in sampling."""
    sigma_data: float
    """Standard deviation of the clean latents."""
    log_mean: float
    """Mean of the ratio's natural logarithm in training."""
    log_std: float
    """Standard deviation of the ratio's natural logarithm in training."""


Schedule = DiscreteSchedule | FlowSchedule | EdmSchedule


def make_schedule(
    name: DiscreteName,
    *,
    num_timesteps: int,
    beta_start: float,
    beta_end: float,
    zero_terminal_snr: bool = False,
) -> DiscreteSchedule:
    """Tabulate a discrete schedule.

    `ldm_linear` is linear in the square root of beta, which latent-diffusion calls
    `linear` and diffusers `scaled_linear`; `linear` is linear in beta (DDPM);
    `cosine` is a squared cosine in abar and ignores both betas.

    Args:
      name: Name of the schedule.
      num_timesteps: T, at least 1.
      beta_start: First beta, in (0, 1).
      beta_end: Last beta, in [beta_start, 1).
      zero_terminal_snr: Shift and scale `sqrt(abar)` so that the last level is pure
        noise; the network must then predict v, x0 or flow.

    Raises:
      ValueError: If a number is out of range or the name is unknown.

    Source:
      Ho et al., arXiv:2006.11239, sec. 4 (linear); latent-diffusion
      `make_beta_schedule` (ldm_linear); Nichol & Dhariwal, arXiv:2102.09672, eq. 17
      (cosine); Lin et al., arXiv:2305.08891, algorithm 1 (zero terminal SNR).
    """
    if num_timesteps < 1:
        raise ValueError(f"num_timesteps must be at least 1, got {num_timesteps}")
    if zero_terminal_snr and num_timesteps < 2:
        raise ValueError("zero_terminal_snr wants num_timesteps of at least 2, got 1")
    if not 0.0 < beta_start <= beta_end < 1.0:
        raise ValueError(
            f"betas must satisfy 0 < start <= end < 1, got {beta_start}, {beta_end}"
        )
    match name:
        case "ldm_linear":
            root = np.linspace(beta_start**0.5, beta_end**0.5, num_timesteps)
            beta = root**2
        case "linear":
            beta = np.linspace(beta_start, beta_end, num_timesteps)
        case "cosine":
            time = np.arange(num_timesteps + 1) / num_timesteps
            angle = (time + COSINE_OFFSET) / (1.0 + COSINE_OFFSET) * np.pi / 2
            power = np.cos(angle) ** 2
            beta = np.minimum(1.0 - power[1:] / power[:-1], COSINE_MAX_BETA)
        case _:
            raise ValueError(f"unknown schedule {name!r}")
    abar = np.cumprod(1.0 - beta)
    if zero_terminal_snr:
        root = np.sqrt(abar)
        root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
        abar = root**2
        beta = 1.0 - np.append(abar[:1], abar[1:] / abar[:-1])
    return DiscreteSchedule(beta=beta, abar=abar)


def reaches_pure_noise(schedule: Schedule) -> bool:
    """Return whether the last level has no signal: eps then determines no image."""
    if isinstance(schedule, DiscreteSchedule):
        return bool(schedule.abar[-1] == 0.0)
    return isinstance(schedule, FlowSchedule)


def draw_levels(
    schedule: Schedule, keys: Key[Array, " b"], *, shift: float = 1.0
) -> Level:
    """Draw a training noise level for each example.

    Args:
      schedule: Discrete levels and times of a flow are uniform; EDM's ratios are
        log-normal.
      keys: One key for each example.
      shift: Maps times u in [0, 1] to shift u / (1 + (shift - 1) u): above 1, high
        noise levels are more frequent. Static; ignored by EDM.

    Returns:
      Float32 levels; `t` of a discrete schedule is int32.

    Source:
      Karras et al., EDM, arXiv:2206.00364, table 1 (log-normal); Esser et al.,
      arXiv:2403.03206, eq. 23 (shift, there the root of m / n).
    """
    match schedule:
        case DiscreteSchedule():
            top = schedule.num_timesteps
            if shift == 1.0:
                t = integers(keys, below=top)
            else:
                t = (top * shift_time(uniform(keys), shift)).astype(jnp.int32)
                t = jnp.minimum(t, top - 1)  # a time may round to 1
            alpha = jnp.asarray(np.sqrt(schedule.abar), jnp.float32)
            sigma = jnp.asarray(np.sqrt(1.0 - schedule.abar), jnp.float32)
            return Level(t, alpha[t], sigma[t])
        case FlowSchedule():
            time = uniform(keys)
            if shift != 1.0:
                time = shift_time(time, shift)
            return Level(schedule.num_timesteps * time, 1.0 - time, time)
        case EdmSchedule():
            drawn = normal(keys, (1,))[:, 0]
            log_ratio = schedule.log_mean + schedule.log_std * drawn
            return _edm_level(schedule, log_ratio)


def shift_time(time: Float[Array, " b"], shift: float) -> Float[Array, " b"]:
    """Shift times in [0, 1] towards 1 (a shift above 1) or 0.

    Source:
      Esser et al., arXiv:2403.03206, eq. 23.
    """
    return shift * time / (1.0 + (shift - 1.0) * time)


def level_at(schedule: Schedule, position: Float[np.ndarray, " k"]) -> Level:
    """Return the levels at positions of a schedule, in float64.

    Args:
      schedule: Its positions 0 to T - 1 go from least to most noise: entries of a
        table; times 1/T to 1 of a flow; EDM's ratios, evenly spaced in the logarithm.
      position: Positions in [0, T - 1]; between entries of a table, the ratio's
        logarithm is interpolated linearly.
    """
    top = schedule.num_timesteps
    match schedule:
        case DiscreteSchedule():
            whole = np.rint(position)
            if np.array_equal(whole, position):
                abar = schedule.abar[whole.astype(int)]
                return Level(position, np.sqrt(abar), np.sqrt(1.0 - abar))
            log_ratio = np.interp(position, np.arange(top), log_ratios(schedule))
            return vp_level(position, log_ratio)
        case FlowSchedule():
            time = (position + 1.0) / top
            return Level(top * time, 1.0 - time, time)
        case EdmSchedule():
            low, high = np.log(schedule.sigma_min), np.log(schedule.sigma_max)
            share = position / max(top - 1, 1) if top > 1 else np.ones_like(position)
            return _edm_level(schedule, low + (high - low) * share)


def level_of_ratio(schedule: Schedule, ratio: Float[np.ndarray, " k"]) -> Level:
    """Return the levels of given noise-to-signal ratios sigma / alpha, in float64.

    Args:
      schedule: A discrete one is interpolated in the ratio's logarithm.
      ratio: Ratios within those of the schedule.
    """
    match schedule:
        case DiscreteSchedule():
            known = log_ratios(schedule)
            position = np.interp(np.log(ratio), known, np.arange(len(known)))
            return vp_level(position, np.log(ratio))
        case FlowSchedule():
            time = ratio / (1.0 + ratio)
            return Level(schedule.num_timesteps * time, 1.0 - time, time)
        case EdmSchedule():
            return _edm_level(schedule, np.log(ratio))


def log_ratios(schedule: DiscreteSchedule) -> np.ndarray:
    """Return ln(sigma / alpha) of every entry; infinite at zero SNR."""
    with np.errstate(divide="ignore"):
        return 0.5 * (np.log1p(-schedule.abar) - np.log(schedule.abar))


def vp_level(t: np.ndarray, log_ratio: np.ndarray) -> Level:
    """Return the variance-preserving level of a noise-to-signal ratio."""
    alpha = 1.0 / np.sqrt(1.0 + np.exp(2.0 * log_ratio))
    return Level(t, alpha, 1.0 / np.sqrt(1.0 + np.exp(-2.0 * log_ratio)))


def _edm_level(schedule: EdmSchedule, log_ratio: Any) -> Level:
    xp = jnp if isinstance(log_ratio, jax.Array) else np
    ratio = xp.exp(log_ratio)
    alpha = 1.0 / xp.sqrt(xp.square(ratio) + schedule.sigma_data**2)
    return Level(schedule.num_timesteps / 4 * log_ratio, alpha, ratio * alpha)
