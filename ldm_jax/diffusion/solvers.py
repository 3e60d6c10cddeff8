"""Samplers by name, and the tables of the simple ones."""

import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ldm_jax.diffusion.exponential import dpmpp_2m, dpmpp_2s, dpmpp_sde_2m, unipc
from ldm_jax.diffusion.parameterization import PredictionName
from ldm_jax.diffusion.tables import (
    Row,
    Table,
    along_time,
    slope_of,
    tabulate,
)
from ldm_jax.diffusion.timesteps import Levels
from ldm_jax.types import TAKES_ETA, SamplerName, choices

FOLLOW_THE_SLOPE: frozenset[SamplerName] = frozenset({"heun", "plms"})
LCM_TIME_SCALE, LCM_SIGMA_DATA = 10.0, 0.5
ADAMS_BASHFORTH = ((1,), (3, -1), (23, -16, 5), (55, -59, 37, -9))
ADAMS_BASHFORTH_OVER = (1, 2, 12, 24)


def make_table(
    sampler: SamplerName,
    levels: Levels,
    *,
    prediction: PredictionName,
    sigma_data: float = 1.0,
    eta: Float[Array, ""] | float = 0.0,
) -> Table:
    """Tabulate a sampler, in float64 NumPy except for what a traced `eta` affects.

    Sources are at the functions of the samplers below.

    Args:
      sampler: Name of the sampler.
      levels: Noise levels of its steps.
      prediction: Prediction of the network.
      sigma_data: Standard deviation of the clean latents, for EDM's F.
      eta: DDIM's share of renewed noise, in [0, 1]; may be traced.

    Raises:
      ValueError: If the sampler is unknown, or the first level has no signal and the
        network predicts eps.
    """
    if prediction == "eps" and levels.alpha[0] == 0.0:
        raise ValueError(
            "prediction: got 'eps' at a level without signal, where the noise does not "
            "determine the image; wanted v, x0, flow or edm"
        )
    if sampler not in SOLVERS:
        raise ValueError(f"sampler: {choices(sampler, SOLVERS)}")
    rows = SOLVERS[sampler](levels)
    signal = slope_of(levels) if sampler in FOLLOW_THE_SLOPE else "x0"
    table = tabulate(rows, levels, signal, prediction=prediction, sigma_data=sigma_data)
    return with_eta(table, levels, eta) if sampler in TAKES_ETA else table


def ancestral(levels: Levels, *, fresh: float = 1.0) -> list[Row]:
    """Tabulate draws from the posterior q(x_s | x_t, x_0).

    With `fresh` 1 this is DDPM and, in other coordinates, Euler ancestral; with 0 it is
    DDIM and Euler.

    Args:
      fresh: eta, the share of renewed noise.

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
    """Return the share of the noise at the end of a step that the posterior renews."""
    old = (
        levels.alpha[i] * levels.sigma[i + 1] / (levels.sigma[i] * levels.alpha[i + 1])
    )
    return math.sqrt(max(1.0 - old**2, 0.0))


def with_eta(table: Table, levels: Levels, eta: Float[Array, ""] | float) -> Table:
    """Renew a share `eta` of DDIM's noise; it may be traced.

    Source:
      Song et al., DDIM, arXiv:2010.02502, eq. 16.
    """
    xp = jnp if isinstance(eta, Array) else np
    whole = ancestral(levels, fresh=0.0)
    kept, clean = np.asarray([row.mix[0] for row in whole]).T
    most = [renewable(levels, i) for i in range(levels.num_steps)]
    share = xp.square(eta * xp.asarray(most))
    # 1 - sqrt(1 - share), in a form without cancellation.
    less = share / (1.0 + xp.sqrt(xp.maximum(1.0 - share, 0.0)))
    lost, alpha = xp.asarray(kept) * less, xp.asarray(levels.alpha[:-1])
    mix = [xp.asarray(kept) - lost, xp.asarray(clean) + alpha * lost]
    noise = eta * xp.asarray(np.multiply(most, levels.sigma[1:]))
    return table._replace(mix=xp.stack(mix, axis=-1)[:, None], noise=noise[:, None])


def ddim(levels: Levels) -> list[Row]:
    """Tabulate DDIM, which is Euler's method in any linear time.

    Source:
      Song et al., DDIM, arXiv:2010.02502, eq. 12; Karras et al., EDM,
      arXiv:2206.00364, algorithm 1 without the correction.
    """
    return ancestral(levels, fresh=0.0)


def heun(levels: Levels) -> list[Row]:
    """Tabulate Heun's method: the mean of the slopes at both ends of each step.

    A step makes two network calls, or one if it ends at the clean latent.

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
    """Tabulate PLMS: the Adams-Bashforth mean of the last four slopes.

    The first step is Heun's; its second slope is not reused.

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


def lcm(levels: Levels) -> list[Row]:
    """Tabulate LCM for distilled networks: predict the clean latent, add new noise.

    Raises:
      ValueError: If a t is negative, as EDM's are; the scaling needs timesteps.

    Source:
      Luo et al., LCM, arXiv:2310.04378, eq. 9 and algorithm 3; the boundary scaling is
      that of their released code.
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
    """Tabulate DDIM inversion: from a clean latent to the noise that DDIM maps to it.

    A step of DDIM is `x_s = a x_t + b slope(x_t)`. Its inverse is the fixed point of
    `x_t = (x_s - b slope(x_t)) / a`, iterated from `x_s`: one iteration is the usual
    inversion; more converge to the exact one if the steps are short enough.

    Args:
      levels: Noise levels of the sampler that is inverted.
      iterations: Network calls of a step, at least 1.

    Returns:
      Rows whose signal is `slope_of(levels)`.

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
