"""Exponential integrators in lambda, the log signal-to-noise ratio.

They approximate the clean latent by a polynomial in lambda between two levels, and
integrate its exponentially weighted mean exactly.
"""

import math

import numpy as np

from ldm_jax.diffusion.tables import Row, towards_clean
from ldm_jax.diffusion.timesteps import Levels


def log_snr(levels: Levels) -> np.ndarray:
    """Return lambda = ln(alpha / sigma); infinite at pure signal or pure noise."""
    with np.errstate(divide="ignore"):
        return np.log(levels.alpha) - np.log(levels.sigma)


def step_sizes(levels: Levels) -> np.ndarray:
    """Return the step sizes in lambda."""
    return np.diff(log_snr(levels))


def dpmpp_2m(levels: Levels) -> list[Row]:
    """Tabulate DPM-Solver++(2M), which extrapolates the last two clean latents.

    The first step, and a step to the clean latent, have first order.

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
    """Tabulate SDE-DPM-Solver++(2M), the stochastic 2M.

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
    """Tabulate DPM-Solver++(2S), which uses a level between the ends of a step.

    A step here is one network call, half a step of the paper. An even number of them
    begins with one of first order; the last one, to the clean latent, has first order.

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
    """Tabulate UniPC-2 with B2(h), a predictor and a corrector.

    The corrector needs no network call of its own: it uses the output at the predicted
    latent. Registers: the predicted latent, and the corrected one before it.

    Source:
      Zhao et al., UniPC, arXiv:2302.04867, algorithms 1 and 2, with data prediction.
    """
    lam, rows = log_snr(levels), []
    previous = (1.0, 0.0)  # the corrected latent, in terms of the registers
    for i in range(levels.num_steps):
        signals = np.zeros(3)
        if i > 0:
            # Before the call the registers hold the prediction and its start.
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
    """Return UniC's weights of the clean latents at levels i, i - 1 and i - 2.

    They are relative to the weight in a first-order step, and make the step from level
    i - 1 to i exact for clean latents that are polynomials in lambda of degree 1, or 2
    if all three are used, up to the order of the method.

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
