"""Data whose best denoiser, exact flow and exact samples are known.

A pixel is drawn from a mixture of Gaussians, independently of the others. So E[x_0|x_t]
has a closed form. The flow of one number keeps the order of its values, hence carries
each to the value of the same rank: its end is a quantile, exact to rounding.

Where the mixture is one Gaussian the denoiser is affine, so every sampler is, and
`moments` carries mean and covariance through its table, exactly. `follow` runs a table
in NumPy on any denoiser; `test_samplers.py` shows that the scan does the same.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from scipy.special import ndtr

from ldm_jax.diffusion.schedules import (
    DiscreteSchedule,
    EdmSchedule,
    FlowSchedule,
    Level,
    Schedule,
    make_schedule,
)
from ldm_jax.diffusion.solvers import Table
from ldm_jax.diffusion.timesteps import Levels


class Mixture(NamedTuple):
    """Weights, means and standard deviations of the components."""

    weight: np.ndarray
    mean: np.ndarray
    std: np.ndarray


STOCHASTIC = frozenset({"ddim", "ddpm", "euler_ancestral", "dpmpp_sde_2m", "lcm"})
"""Samplers that add noise at some step."""
SIGMA_DATA = 0.5
BETAS = {"num_timesteps": 1000, "beta_start": 0.0015, "beta_end": 0.0195}
SCHEDULES: dict[str, Schedule] = {
    "ldm_linear": make_schedule("ldm_linear", **BETAS),
    "cosine": make_schedule("cosine", **BETAS),
    "zero_snr": make_schedule("ldm_linear", **BETAS, zero_terminal_snr=True),
    "flow": FlowSchedule(1000),
    "edm": EdmSchedule(
        num_timesteps=1000,
        sigma_min=0.002,
        sigma_max=80.0,
        sigma_data=SIGMA_DATA,
        log_mean=-1.2,
        log_std=1.2,
    ),
}
MEAN, STD = 0.7, 0.4
ONE = Mixture(np.ones(1), np.asarray([MEAN]), np.asarray([STD]))
TWO = Mixture(np.asarray([0.4, 0.6]), np.asarray([-1.0, 0.8]), np.asarray([0.3, 0.5]))
POINT = Mixture(np.ones(1), np.asarray([MEAN]), np.zeros(1))


def clean(x: Any, alpha: Any, sigma: Any, data: Mixture, xp: Any = np) -> Any:
    """Return E[x_0 | x_t], by Bayes' rule for each component."""
    weight, mean, std = (xp.asarray(part, x.dtype) for part in data)
    variance = (alpha * std) ** 2 + sigma**2
    away = x[..., None] - alpha * mean
    score = xp.log(weight) - xp.log(variance) / 2 - away**2 / (2 * variance)
    chance = xp.exp(score - score.max(-1, keepdims=True))
    chance = chance / chance.sum(-1, keepdims=True)
    return (chance * (mean + alpha * std**2 / variance * away)).sum(-1)


def answer(
    x: Any, level: Level, prediction: str, *, sigma_data: float = 1.0, **kw: Any
) -> Any:
    """Return the prediction of a perfect network; `kw` goes to `clean`."""
    alpha, sigma = level.alpha, level.sigma
    x_0 = clean(x, alpha, sigma, **kw)
    eps = (x - alpha * x_0) / sigma
    norm = (sigma**2 + (sigma_data * alpha) ** 2) ** 0.5
    return {
        "x0": x_0,
        "eps": eps,
        "v": alpha * eps - sigma * x_0,
        "flow": eps - x_0,
        "edm": (sigma * x_0 / sigma_data - sigma_data * alpha * eps) / norm,
    }[prediction]


def rank(x: np.ndarray, alpha: float, sigma: float, data: Mixture) -> np.ndarray:
    """Return the share of the noisy pixels below x."""
    scale = np.sqrt((alpha * data.std) ** 2 + sigma**2)
    return (data.weight * ndtr((x[..., None] - alpha * data.mean) / scale)).sum(-1)


def flow_end(x: np.ndarray, levels: Levels, data: Mixture) -> np.ndarray:
    """Return the end of the flow from x, by bisection of the rank."""
    wanted = rank(x, levels.alpha[0], levels.sigma[0], data)
    low, high = np.full_like(x, -50.0), np.full_like(x, 50.0)
    for _ in range(70):
        middle = (low + high) / 2
        below = rank(middle, levels.alpha[-1], levels.sigma[-1], data) < wanted
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return (low + high) / 2


def level_of_time(schedule: Schedule, t: float) -> Level:
    """Return the level of the network's time t."""
    time = np.float64(t) / schedule.num_timesteps
    match schedule:
        case FlowSchedule():
            return Level(np.float64(t), 1.0 - time, time)
        case EdmSchedule():
            ratio = np.exp(4.0 * time)
            c_in = 1.0 / np.sqrt(ratio**2 + schedule.sigma_data**2)
            return Level(np.float64(t), c_in, ratio * c_in)
        case DiscreteSchedule():
            left = int(np.floor(t))
            abar = schedule.abar[left]
            if left != t:
                odds = np.log(1 / schedule.abar[left : left + 2] - 1)
                abar = 1 / (1 + np.exp(odds[0] + (t - left) * (odds[1] - odds[0])))
            return Level(np.float64(t), np.sqrt(abar), np.sqrt(1.0 - abar))


def network(
    levels: Levels, prediction: str, data: Mixture, *, schedule: Schedule | None = None
) -> Callable[[np.ndarray, float], np.ndarray]:
    """Return a perfect network, of x_t and t, on some levels or a whole schedule."""

    def denoise(x: np.ndarray, t: float) -> np.ndarray:
        if schedule is None:
            place = np.flatnonzero(levels.t == t)[0]
            level = Level(t, levels.alpha[place], levels.sigma[place])
        else:
            level = level_of_time(schedule, t)
        return answer(x, level, prediction, sigma_data=SIGMA_DATA, data=data)

    return denoise


def follow(
    table: Table,
    denoise: Callable[[np.ndarray, float], np.ndarray],
    x_start: np.ndarray,
    fresh: np.ndarray | None = None,
) -> np.ndarray:
    """Run a table in NumPy.

    Args:
      table: The sampler.
      denoise: The network, of x_t and t.
      x_start: The first latent.
      fresh: Unit-variance noise of each call; None for none.

    Returns:
      The registers at the end.
    """
    registers = [x_start] * table.num_registers
    signals = [np.zeros_like(x_start)] * (table.num_signals - 1)
    for i, (read, mix, noise) in enumerate(
        zip(table.read, np.asarray(table.mix), np.asarray(table.noise), strict=True)
    ):
        x_t = registers[0]
        signals = [read[0] * x_t + read[1] * denoise(x_t, table.t[i]), *signals]
        terms = np.stack([*registers, *signals])
        registers = list(np.tensordot(mix, terms, 1))
        if fresh is not None:
            registers = [
                x + w * fresh[i] for x, w in zip(registers, noise, strict=True)
            ]
        signals = signals[:-1]
    return np.stack(registers)


def moments(
    table: Table,
    denoise: Callable[[np.ndarray, float], np.ndarray],
    mean: float,
    variance: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Carry mean and variance through a table whose network is affine.

    Every latent is a mean and a weighted sum of the start and the fresh noises. The
    state is these weights: variances would lose half of the digits.

    Args:
      table: The sampler of n calls and r registers.
      denoise: The network, of x_t and t; affine.
      mean: Of a pixel at the start.
      variance: Of a pixel at the start.

    Returns:
      Mean and variance of a pixel of every register after every call, `(n, r)` each.
    """
    num, size = table.num_registers, table.mix.shape[2] - 1
    # Columns: the mean, the start, the noise of each call.
    state = np.zeros((size, 2 + table.num_calls))
    state[:num, :2] = mean, variance**0.5
    means, variances = [], []
    for i, (read, mix, noise) in enumerate(
        zip(table.read, np.asarray(table.mix), np.asarray(table.noise), strict=True)
    ):
        offset, end = denoise(np.asarray([0.0, 1.0]), table.t[i])
        signal = (read[0] + read[1] * (end - offset)) * state[0]
        signal[0] += read[1] * offset
        terms = np.concatenate([state[:num], signal[None], state[num:]])
        state = np.concatenate([mix @ terms, terms[num:-1]])
        state[:num, 2 + i] += noise
        means.append(state[:num, 0])
        variances.append(np.square(state[:num, 1:]).sum(-1))
    return np.stack(means), np.stack(variances)
