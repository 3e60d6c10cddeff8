"""Solvers whose time is lambda, the logarithm of the signal-to-noise ratio.

They take the clean latent to be a polynomial in lambda between two levels, and
integrate its exponentially weighted mean exactly.
"""

import math

import numpy as np

from ldm_jax.diffusion.tables import Row, towards_clean
from ldm_jax.diffusion.timesteps import Levels


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
