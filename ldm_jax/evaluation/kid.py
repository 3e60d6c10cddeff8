"""The kernel Inception distance (KID): unbiased for any number of images."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from ldm_jax.types import InputError

SEED = 2020
DEGREE = 3
CONFIDENCE = 0.95


class KernelDistance(NamedTuple):
    """A kernel distance, and its uncertainty."""

    mean: float
    """Mean over the subsets; may be slightly below 0 where there is no difference."""
    std: float
    """Standard deviation over the subsets, which overlap."""
    half: float | None
    """Half the width of the 95 % interval of the mean, from disjoint blocks; None where
    there are fewer than two blocks."""


def kernel_distance(
    made: Float[np.ndarray, "n d"],
    real: Float[np.ndarray, "m d"],
    *,
    subsets: int,
    subset_size: int,
) -> KernelDistance:
    """Return the squared maximum mean discrepancy under a cubic kernel, unbiased.

    The mean over random subsets is published as KID. The subsets come from NumPy's
    legacy generator, whose numbers never change: those of `made` first, then those of
    `real`, without repetition within a subset.

    Args:
      made: Features of one set.
      real: Features of the other.
      subsets: Number of subsets.
      subset_size: Features in each, of either set.

    Raises:
      InputError: If a set is smaller than a subset.

    Source:
      Binkowski et al., arXiv:1801.01401, sec. 4 and eq. 4; the subsets as in
      torch-fidelity, whose default seed is 2020.
    """
    if min(len(made), len(real)) < subset_size or subset_size < 2 or subsets < 1:
        raise InputError(
            f"kernel distance: got {len(made)} and {len(real)} features, wanted at "
            f"least the {subset_size} of a subset; try more images, or a smaller subset"
        )
    random = np.random.RandomState(SEED)
    found: list[float] = []
    for _ in range(subsets):
        i = random.choice(len(made), subset_size, replace=False)
        j = random.choice(len(real), subset_size, replace=False)
        found.append(discrepancy(made[i], real[j]))
    return KernelDistance(
        float(np.mean(found)), float(np.std(found)), _half(made, real, subset_size)
    )


def discrepancy(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"]) -> float:
    """Return the unbiased estimate of one pair of sets, in float64.

    Args:
      x: Two rows or more.

    Source:
      Gretton et al., "A kernel two-sample test" (2012), lemma 6.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return _within(x) + _within(y) - 2.0 * float(_kernel(x, y).mean())


def _within(x: Float[np.ndarray, "n d"]) -> float:
    values = _kernel(x, x)
    return float((values.sum() - np.trace(values)) / (len(x) * (len(x) - 1)))


def _kernel(
    x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"]
) -> Float[np.ndarray, "n m"]:
    return (x @ y.T / x.shape[1] + 1.0) ** DEGREE


def _half(
    made: Float[np.ndarray, "n d"], real: Float[np.ndarray, "m d"], size: int
) -> float | None:
    """Return half the interval of the mean, by independent blocks of shuffled rows."""
    from scipy.special import stdtrit  # slow to import

    blocks = min(len(made), len(real)) // size
    if blocks < 2:
        return None
    random = np.random.RandomState(SEED)
    rows = [random.permutation(len(x))[: blocks * size] for x in (made, real)]
    found = [
        discrepancy(made[i], real[j])
        for i, j in zip(*(np.split(r, blocks) for r in rows), strict=True)
    ]
    error = np.std(found, ddof=1) / np.sqrt(blocks)
    quantile = stdtrit(blocks - 1, 0.5 + CONFIDENCE / 2.0)
    return float(quantile * error)
