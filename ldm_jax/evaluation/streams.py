"""Moments of features that come a batch at a time, from any number of devices."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from ldm_jax.evaluation.frechet import Moments


class Sums(NamedTuple):
    """What is kept of features seen so far, float64: enough for their moments.

    Attributes:
      num: How many there were.
      mean: Of length d.
      scatter: Sum of the outer products of what is left of each without the mean.
    """

    num: int
    mean: Float[np.ndarray, " d"]
    scatter: Float[np.ndarray, "d d"]


def sums_of(features: Float[np.ndarray, "n d"]) -> Sums:
    """Sum a batch up.

    Args:
      features: Any number of rows, one at least.
    """
    rows = np.asarray(features, np.float64)
    mean = rows.mean(axis=0)
    rest = rows - mean
    return Sums(len(rows), mean, rest.T @ rest)


def merge(a: Sums, b: Sums) -> Sums:
    """Join what two sets of features left, as if they had been one.

    Products of large numbers never cancel: the scatters are about the means, and only
    the means' difference is added.

    Args:
      a: Of one set.
      b: Of another.

    Source:
      Chan, Golub & LeVeque (1979), eq. 2.1.
    """
    num = a.num + b.num
    apart = b.mean - a.mean
    mean = a.mean + apart * (b.num / num)
    between = np.outer(apart, apart) * (a.num * (b.num / num))
    return Sums(num, mean, a.scatter + b.scatter + between)


def merge_all(parts: Iterable[Sums]) -> Sums:
    """Join all, in order; the order is felt in the last bits only.

    Raises:
      ValueError: If there is none.
    """
    total: Sums | None = None
    for part in parts:
        total = part if total is None else merge(total, part)
    if total is None:
        raise ValueError("moments: got no features, wanted 2 or more")
    return total


def moments_of(sums: Sums) -> Moments:
    """Return mean and unbiased covariance.

    Raises:
      ValueError: If there are fewer than two features.
    """
    if sums.num < 2:
        raise ValueError(f"moments: got {sums.num} features, wanted 2 or more")
    return Moments(sums.mean, sums.scatter / (sums.num - 1))
