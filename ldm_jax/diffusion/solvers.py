"""Every sampler as a table: what becomes of each answer of the network.

Samplers of diffusion models differ in nothing but numbers. Each asks the network at a
known level, reads one signal out of the answer (the clean latent, the noise or the
flow), and goes on with a weighted sum of what it has: one or two latents, the last few
signals, fresh noise. So a sampler is a `Table` of those weights, worked out in float64
before the network runs, and one scan drives them all (`samplers.sample`).

Deterministic steps from a level t to a cleaner level s follow the same flow:
`x_s = (sigma_s / sigma_t) x_t + (alpha_s - alpha_t sigma_s / sigma_t) x_0`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ldm_jax.diffusion.levels import Levels
from ldm_jax.diffusion.parameterize import PredictionName, SignalName, reading_of
from ldm_jax.diffusion.schedules import Level
from ldm_jax.types import TAKES_ETA, SamplerName

STOCHASTIC: frozenset[SamplerName] = frozenset(
    {"ddim", "ddpm", "euler_ancestral", "dpmpp_sde_2m", "lcm"}
)
FOLLOW_THE_SLOPE: frozenset[SamplerName] = frozenset({"heun", "plms"})
LCM_TIME_SCALE, LCM_SIGMA_DATA = 10.0, 0.5
ADAMS_BASHFORTH = ((1,), (3, -1), (23, -16, 5), (55, -59, 37, -9))
ADAMS_BASHFORTH_OVER = (1, 2, 12, 24)


class Table(NamedTuple):
    """A sampler of n network calls, r latents (registers) and k remembered signals.

    The network is asked at the first register. A row's terms are the registers, then
    the signals, the newest first; every new register is a weighted sum of them.

    Attributes:
      step: Which step each call belongs to, from 0.
      t: What the network is asked at.
      ratio: Noise-to-signal ratio sigma / alpha there.
      read: Weights of `x_t` and of the network's output in the signal.
      mix: Weights of the terms in each new register.
      noise: Weight of fresh unit-variance noise in each new register.
      alpha: Weight of the clean latent in each new register.
      sigma: Weight of the noise in it.
    """

    step: Int[Any, " n"]
    t: Float[Any, " n"]
    ratio: Float[Any, " n"]
    read: Float[Any, "n 2"]
    mix: Float[Any, "n r terms"]
    noise: Float[Any, "n r"]
    alpha: Float[Any, "n r"]
    sigma: Float[Any, "n r"]

    @property
    def num_calls(self) -> int:
        """Network calls of a sample."""
        return self.t.shape[0]

    @property
    def num_registers(self) -> int:
        """Latents it goes on with."""
        return self.mix.shape[1]

    @property
    def num_signals(self) -> int:
        """Signals it remembers, the newest included."""
        return self.mix.shape[2] - self.num_registers


class Row(NamedTuple):
    """One network call, before it is tabulated.

    Attributes:
      at: Index of the level the network is asked at.
      to: Index of the level of each new register.
      mix: Weights of the terms in each new register; short rows are filled with 0.
      noise: Weight of fresh noise in the first register.
      step: Which step it belongs to.
    """

    at: int
    to: tuple[int, ...]
    mix: tuple[tuple[float, ...], ...]
    step: int
    noise: float = 0.0


def make_table(
    sampler: SamplerName,
    levels: Levels,
    *,
    prediction: PredictionName,
    sigma_data: float = 1.0,
    eta: Float[Array, ""] | float = 0.0,
) -> Table:
    """Tabulate a sampler.

    Args:
      sampler: Which one.
      levels: The levels it visits.
      prediction: What the network predicts.
      sigma_data: Standard deviation of the clean latents, where it predicts EDM's F.
      eta: DDIM's share of renewed noise, in [0, 1]; may be traced.

    Returns:
      The table: float64 NumPy, but for what depends on a traced `eta`.

    Raises:
      ValueError: If eps is predicted at a first level that has no signal.

    Source:
      Of each sampler, at its function below.
    """
    if prediction == "eps" and levels.alpha[0] == 0.0:
        raise ValueError(
            "prediction: got 'eps' at a level without signal, where the noise says "
            "nothing of the image; wanted v, x0, flow or edm"
        )
    rows = SOLVERS[sampler](levels)
    signal = slope_of(levels) if sampler in FOLLOW_THE_SLOPE else "x0"
    table = tabulate(rows, levels, signal, prediction=prediction, sigma_data=sigma_data)
    return with_eta(table, levels, eta) if sampler in TAKES_ETA else table


def tabulate(
    rows: list[Row],
    levels: Levels,
    signal: SignalName,
    *,
    prediction: PredictionName,
    sigma_data: float,
) -> Table:
    """Turn rows into arrays.

    Args:
      rows: The network calls, in order.
      levels: What their indices mean.
      signal: What is read out of the network's answers.
      prediction: What the network predicts.
      sigma_data: Standard deviation of the clean latents, for EDM's F.

    Returns:
      The table.
    """
    at = np.asarray([row.at for row in rows])
    to = np.asarray([row.to for row in rows])
    num_registers = to.shape[1]
    num_terms = max(len(weights) for row in rows for weights in row.mix)
    mix = np.zeros((len(rows), num_registers, num_terms))
    for i, row in enumerate(rows):
        for j, weights in enumerate(row.mix):
            mix[i, j, : len(weights)] = weights
    noise = np.zeros((len(rows), num_registers))
    noise[:, 0] = [row.noise for row in rows]
    level = Level(levels.t[at], levels.alpha[at], levels.sigma[at])
    read = reading_of(signal, level, prediction=prediction, sigma_data=sigma_data)
    with np.errstate(divide="ignore"):
        ratio = level.sigma / level.alpha
    return Table(
        step=np.asarray([row.step for row in rows]),
        t=level.t,
        ratio=ratio,
        read=np.stack(read, axis=-1),
        mix=mix,
        noise=noise,
        alpha=levels.alpha[to],
        sigma=levels.sigma[to],
    )


def towards_clean(levels: Levels, here: int, there: int) -> tuple[float, float]:
    """Return the weights of `x_t` and the clean latent in a step of the flow.

    Source:
      Song et al., DDIM, arXiv:2010.02502, eq. 12 with sigma 0.
    """
    kept = levels.sigma[there] / levels.sigma[here]
    return kept, levels.alpha[there] - levels.alpha[here] * kept


def slope_of(levels: Levels) -> SignalName:
    """Return the signal that is the slope of the flow in its time: `along_time`."""
    return "flow" if levels.straight else "eps"


def along_time(levels: Levels, here: int, there: int) -> tuple[float, float]:
    """Return the weights of `x_t` and of the slope in a step of the flow, either way.

    The slope is the noise where time is `sigma / alpha` (Karras et al., EDM), and
    `eps - x_0` where it is `sigma / (alpha + sigma)` (rectified flow).
    """
    old = levels.alpha[here] + levels.sigma[here] * levels.straight
    new = levels.alpha[there] + levels.sigma[there] * levels.straight
    return new / old, levels.sigma[there] - levels.sigma[here] * new / old


def ancestral(levels: Levels, *, fresh: float = 1.0) -> list[Row]:
    """Step by drawing from the posterior q(x_s | x_t, x_0), or keep all the noise.

    With `fresh` 1 this is DDPM and, in other coordinates, Euler ancestral: one update
    under two names. With 0 it is DDIM and Euler.

    Args:
      levels: The levels.
      fresh: eta, the share of renewed noise.

    Returns:
      A row per step.

    Source:
      Ho et al., DDPM, arXiv:2006.11239, eq. 6 and 7; Song et al., DDIM,
      arXiv:2010.02502, eq. 12 and 16.
    """
    rows = []
    for i in range(levels.num_steps):
        renewed = fresh * renewable(levels, i)
        kept = math.sqrt(max(1.0 - renewed**2, 0.0)) * levels.sigma[i + 1]
        kept /= levels.sigma[i]
        clean = levels.alpha[i + 1] - levels.alpha[i] * kept
        noise = renewed * levels.sigma[i + 1]
        rows.append(Row(i, (i + 1,), ((kept, clean),), i, noise))
    return rows


def renewable(levels: Levels, i: int) -> float:
    """Return which share of the noise at the end of a step the posterior draws anew."""
    old = (
        levels.alpha[i] * levels.sigma[i + 1] / (levels.sigma[i] * levels.alpha[i + 1])
    )
    return math.sqrt(max(1.0 - old**2, 0.0))


def with_eta(table: Table, levels: Levels, eta: Float[Array, ""] | float) -> Table:
    """Renew a share of DDIM's noise, which may be traced.

    Source:
      Song et al., DDIM, arXiv:2010.02502, eq. 16.
    """
    xp = jnp if isinstance(eta, Array) else np
    steps = range(levels.num_steps)
    renewed = eta * xp.asarray([renewable(levels, i) for i in steps])
    here = xp.asarray(levels.alpha[:-1]), xp.asarray(levels.sigma[:-1])
    there = xp.asarray(levels.alpha[1:]), xp.asarray(levels.sigma[1:])
    kept = xp.sqrt(xp.maximum(1.0 - xp.square(renewed), 0.0)) * there[1] / here[1]
    mix = xp.stack([kept, there[0] - here[0] * kept], axis=-1)
    return table._replace(mix=mix[:, None], noise=(renewed * there[1])[:, None])


def ddim(levels: Levels) -> list[Row]:
    """Follow the flow by Euler's method: DDIM, and Euler in any linear time.

    Source:
      Song et al., DDIM, arXiv:2010.02502, eq. 12; Karras et al., EDM,
      arXiv:2206.00364, algorithm 1 without the correction.
    """
    return ancestral(levels, fresh=0.0)


def heun(levels: Levels) -> list[Row]:
    """Follow the flow by the mean of its slopes at both ends of each step.

    Two network calls a step, but one for a step that ends at the clean latent.

    Source:
      Karras et al., EDM, arXiv:2206.00364, algorithm 1.
    """
    rows: list[Row] = []
    for i in range(levels.num_steps):
        kept, slope = along_time(levels, i, i + 1)
        ahead = (kept, 0.0, slope)
        if levels.sigma[i + 1] == 0.0:
            rows.append(Row(i, (i + 1, i + 1), (ahead, ahead), i))
            continue
        corrected = (0.0, kept, slope / 2, slope / 2)
        rows.append(Row(i, (i + 1, i), (ahead, (1.0,)), i))
        rows.append(Row(i + 1, (i + 1, i + 1), (corrected, corrected), i))
    return rows


def plms(levels: Levels) -> list[Row]:
    """Follow the flow by the Adams-Bashforth mean of the last four slopes.

    The first step is Heun's, whose second slope is not used again.

    Source:
      Liu et al., PNDM, arXiv:2202.09778, eq. 12 and 13; latent-diffusion `plms.py`.
    """
    rows: list[Row] = []
    for i in range(levels.num_steps):
        kept, slope = along_time(levels, i, i + 1)
        order = min(i + 1, 4)
        slopes = [0.0] * 5
        for j in range(order):
            # The fifth call of the network is the second of the first step: skip it.
            place = j + (j == i and i > 0)
            slopes[place] = slope * ADAMS_BASHFORTH[order - 1][j]
            slopes[place] /= ADAMS_BASHFORTH_OVER[order - 1]
        ahead = (kept, 0.0, *slopes)
        if i == 0 and levels.sigma[1] > 0.0:
            corrected = (0.0, kept, slope / 2, slope / 2)
            rows.append(Row(0, (1, 0), (ahead, (1.0,)), 0))
            rows.append(Row(1, (1, 1), (corrected, corrected), 0))
        else:
            rows.append(Row(i, (i + 1, i + 1), (ahead, ahead), i))
    return rows


def log_snr(levels: Levels) -> np.ndarray:
    """Return lambda = ln(alpha / sigma); infinite at either end that is pure."""
    with np.errstate(divide="ignore"):
        return np.log(levels.alpha) - np.log(levels.sigma)


def step_sizes(levels: Levels) -> np.ndarray:
    """Return the steps in lambda."""
    return np.diff(log_snr(levels))


def dpmpp_2m(levels: Levels) -> list[Row]:
    """Extrapolate the clean latent from the last two: DPM-Solver++(2M).

    The first step, and one that ends at the clean latent, have first order.

    Source:
      Lu et al., arXiv:2211.01095, algorithm 2.
    """
    sizes, rows = step_sizes(levels), []
    for i, size in enumerate(sizes):
        kept, clean = towards_clean(levels, i, i + 1)
        back = 0.0 if i == 0 or np.isinf(size) else size / sizes[i - 1] / 2
        mix = ((kept, clean * (1.0 + back), -clean * back),)
        rows.append(Row(i, (i + 1,), mix, i))
    return rows


def dpmpp_sde_2m(levels: Levels) -> list[Row]:
    """Take the 2M step of the stochastic equation: SDE-DPM-Solver++(2M).

    Source:
      Lu et al., arXiv:2211.01095, app. D (SDE-DPM-Solver++2M, midpoint).
    """
    sizes, rows = step_sizes(levels), []
    for i, size in enumerate(sizes):
        fresh = -math.expm1(-2.0 * size)
        kept = levels.sigma[i + 1] / levels.sigma[i] * math.exp(-size)
        clean = levels.alpha[i + 1] * fresh
        back = 0.0 if i == 0 or np.isinf(size) else size / sizes[i - 1] / 2
        mix = ((kept, clean * (1.0 + back), -clean * back),)
        noise = levels.sigma[i + 1] * math.sqrt(fresh)
        rows.append(Row(i, (i + 1,), mix, i, noise))
    return rows


def dpmpp_2s(levels: Levels) -> list[Row]:
    """Step over two levels at once, from the slope between them: DPM-Solver++(2S).

    Steps are network calls. An even number begins with a step of first order, and the
    last one, to the clean latent, has first order always.

    Source:
      Lu et al., arXiv:2211.01095, algorithm 1, the middle level being the grid's.
    """
    lam, rows = log_snr(levels), []
    clean_end = bool(np.isinf(lam[-1]))
    i = 0
    while i < levels.num_steps:
        kept, clean = towards_clean(levels, i, i + 1)
        ahead = (kept, 0.0, clean)
        left = levels.num_steps - i - clean_end
        if left < 2 or left % 2 or np.isinf(lam[i]):
            rows.append(Row(i, (i + 1, i + 1), (ahead, ahead), i))
            i += 1
            continue
        kept_2, clean_2 = towards_clean(levels, i, i + 2)
        weight = (lam[i + 2] - lam[i]) / (lam[i + 1] - lam[i]) / 2
        whole = (0.0, kept_2, clean_2 * weight, clean_2 * (1.0 - weight))
        rows.append(Row(i, (i + 1, i), (ahead, (1.0,)), i))
        rows.append(Row(i + 1, (i + 2, i + 2), (whole, whole), i + 1))
        i += 2
    return rows


def unipc(levels: Levels) -> list[Row]:
    """Predict, and correct the last step by the newest answer: UniPC-2, B2(h).

    The correction costs no network call: the answer at the predicted latent serves
    both. Registers: the predicted latent, and the corrected one before it.

    Source:
      Zhao et al., UniPC, arXiv:2302.04867, algorithms 1 and 2, with data prediction.
    """
    lam, rows = log_snr(levels), []
    previous = (1.0, 0.0)  # the corrected latent, in terms of the registers
    for i in range(levels.num_steps):
        signals = np.zeros(3)
        if i > 0:
            # Before the answer the registers hold the prediction and its start.
            kept, clean = towards_clean(levels, i - 1, i)
            weights = corrector_weights(lam, i)
            previous, signals = (0.0, kept), clean * weights
        kept, clean = towards_clean(levels, i, i + 1)
        ahead = np.zeros(3)
        ahead[0] = clean
        size = lam[i + 1] - lam[i]
        if i > 0 and np.isfinite(size):
            back = clean * size / (lam[i] - lam[i - 1]) / 2
            ahead[:2] += (back, -back)
        corrected = (*previous, *signals)
        mix = (kept * previous[0], kept * previous[1], *(kept * signals + ahead))
        rows.append(Row(i, (i + 1, i), (mix, corrected), i))
    return rows


def corrector_weights(lam: np.ndarray, i: int) -> np.ndarray:
    """Return the weights of the signals at levels i, i - 1 and i - 2 in UniC's step.

    Relative to the weight of the clean latent in a first-order step. They make the step
    from level i - 1 to i exact for clean latents that are polynomials of degree 1 (2,
    where there are three) in lambda, up to the order of the method.

    Source:
      Zhao et al., UniPC, arXiv:2302.04867, eq. 5 and app. A, with B(h) = e^h - 1.
    """
    size = lam[i] - lam[i - 1]
    if not np.isfinite(size):
        return np.asarray([0.0, 1.0, 0.0])
    if i == 1 or not np.isfinite(lam[i - 2]):
        return np.asarray([0.5, 0.5, 0.0])
    # Moments of the exact integral, normalised: phi_2 and phi_3 over phi_1 (h < 0).
    h = -size
    phi_1 = np.expm1(h)
    phi_2 = phi_1 / h - 1.0
    phi_3 = phi_2 / h - 0.5
    first, second = phi_2 / phi_1, 2.0 * phi_3 / phi_1
    back = (lam[i - 2] - lam[i - 1]) / size
    old, new = np.linalg.solve([[1.0, 1.0], [back, 1.0]], [first, second])
    return np.asarray([new, 1.0 - new - old / back, old / back])


def lcm(levels: Levels) -> list[Row]:
    """Jump to the clean latent and add noise again: for distilled networks.

    Raises:
      ValueError: If a t is below 0, as EDM's are, where the scaling has no meaning.

    Source:
      Luo et al., LCM, arXiv:2310.04378, eq. 9 and algorithm 3; the boundary's scaling
      is that of their released code.
    """
    if levels.t[:-1].min() < 0.0:
        raise ValueError(
            "sampler: got 'lcm' on levels that are not timesteps from 0 up, by which "
            "its networks are scaled; try another sampler than lcm"
        )
    rows = []
    for i in range(levels.num_steps):
        scaled = levels.t[i] * LCM_TIME_SCALE
        norm = scaled**2 + LCM_SIGMA_DATA**2
        skip, out = LCM_SIGMA_DATA**2 / norm, scaled / math.sqrt(norm)
        alpha = levels.alpha[i + 1]
        mix = ((alpha * skip, alpha * out),)
        rows.append(Row(i, (i + 1,), mix, i, levels.sigma[i + 1]))
    return rows


SOLVERS: dict[SamplerName, Callable[[Levels], list[Row]]] = {
    "ddim": ddim,
    "ddpm": ancestral,
    "euler": ddim,
    "euler_ancestral": ancestral,
    "heun": heun,
    "plms": plms,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2s": dpmpp_2s,
    "dpmpp_sde_2m": dpmpp_sde_2m,
    "unipc": unipc,
    "lcm": lcm,
}


def inversion(levels: Levels, *, iterations: int) -> list[Row]:
    """Climb from the clean latent to the noise that DDIM takes to it.

    A step of DDIM is `x_s = a x_t + b slope(x_t)`. Its inverse is the fixed point of
    `x_t = (x_s - b slope(x_t)) / a`, begun at `x_s`: with one iteration this is the
    usual inversion, with more it becomes exact, if the steps are short enough for the
    iteration to contract.

    Args:
      levels: Those of the sampler that shall come back.
      iterations: Network calls a step, at least 1.

    Returns:
      The rows; their signal is `slope_of(levels)`.

    Source:
      Song et al., DDIM, arXiv:2010.02502, eq. 13; Dhariwal & Nichol,
      arXiv:2105.05233, app. F.
    """
    rows = []
    for step, i in enumerate(range(levels.num_steps - 1, -1, -1)):
        up = (0.0, *along_time(levels, i + 1, i))
        for left in range(iterations - 1, -1, -1):
            last = left == 0
            anchor = up if last else (0.0, 1.0)
            rows.append(Row(i, (i, i if last else i + 1), (up, anchor), step))
    return rows
