"""The Fréchet distance between two sets of features, and the Inception Score."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from ldm_jax.types import InputError


class InceptionScore(NamedTuple):
    """A score over splits."""

    mean: float
    """From 1 to the number of classes."""
    std: float
    """Over the splits."""


def inception_score(
    logits: Float[np.ndarray, "n k"], *, splits: int, seed: int | None
) -> InceptionScore:
    """Return `exp(E KL(p(y | x) || p(y)))`, a mean over splits, in float64.

    Args:
      logits: Logits of a classifier, by image.
      splits: Parts of the images; each has its own p(y).
      seed: Seed of the order of the images before they are split; None keeps the order.

    Raises:
      InputError: If there are fewer images than splits.

    Source:
      Salimans et al., arXiv:1606.03498, sec. 4; the order as in torch-fidelity.
    """
    from scipy.special import log_softmax  # slow to import

    num = len(logits)
    if num < splits or splits < 1:
        raise InputError(
            f"inception score: got {num} images, wanted at least one for each of "
            f"{splits} splits; the published one takes 50,000"
        )
    if seed is not None:
        logits = logits[np.random.RandomState(seed).permutation(num)]
    log_p = log_softmax(np.asarray(logits, np.float64), axis=1)
    found: list[float] = []
    for i in range(splits):
        part = log_p[i * num // splits : (i + 1) * num // splits]
        p = np.exp(part)
        marginal = p.mean(axis=0)
        # A class with p = 0 for all images adds nothing.
        log_marginal = np.log(np.where(marginal > 0.0, marginal, 1.0))
        divergence = (p * (np.where(p > 0.0, part, 0.0) - log_marginal)).sum(axis=1)
        found.append(float(np.exp(divergence.mean())))
    return InceptionScore(float(np.mean(found)), float(np.std(found)))


class Moments(NamedTuple):
    """Mean and covariance of a set of features, float64."""

    mean: Float[np.ndarray, " d"]
    """Mean."""
    covariance: Float[np.ndarray, "d d"]
    """Unbiased covariance."""


def moments(features: Float[np.ndarray, "n d"]) -> Moments:
    """Measure mean and unbiased covariance in float64.

    Raises:
      ValueError: If there are fewer than two rows.
    """
    if len(features) < 2:
        raise ValueError(f"moments: got {len(features)} features, wanted 2 or more")
    rows = np.asarray(features, np.float64)
    return Moments(rows.mean(axis=0), np.cov(rows, rowvar=False, ddof=1))


def frechet_distance(a: Moments, b: Moments) -> float:
    """Return the squared Fréchet (2-Wasserstein) distance of two Gaussians.

    `|m_a - m_b|^2 + tr(A) + tr(B) - 2 |R_a^T R_b|` with the nuclear norm and any roots,
    where `R R^T` is the covariance: by eigenvalues of symmetric matrices and singular
    values alone. No value is complex, and no root is taken of a rounded product of
    covariances, so that ill-conditioned ones keep their digits.

    Returns:
      The distance, 0 for equal moments.

    Source:
      Dowson & Landau (1982); Heusel et al., arXiv:1706.08500, sec. 3.
    """
    cross = np.linalg.svd(_root(a).T @ _root(b), compute_uv=False).sum()
    spread = np.trace(np.atleast_2d(a.covariance + b.covariance))
    return float(np.square(a.mean - b.mean).sum() + spread - 2.0 * cross)


def _root(x: Moments) -> Float[np.ndarray, "d d"]:
    values, vectors = np.linalg.eigh(np.atleast_2d(x.covariance))
    return vectors * np.sqrt(np.maximum(values, 0.0))


class Sums(NamedTuple):
    """Sums over features, float64: enough for their moments."""

    num: int
    """Number of features."""
    mean: Float[np.ndarray, " d"]
    """Mean."""
    scatter: Float[np.ndarray, "d d"]
    """Sum of the outer products of the differences from the mean."""


def sums_of(features: Float[np.ndarray, "n d"]) -> Sums:
    """Sum a batch of one feature or more."""
    rows = np.asarray(features, np.float64)
    mean = rows.mean(axis=0)
    rest = rows - mean
    return Sums(len(rows), mean, rest.T @ rest)


def merge(a: Sums, b: Sums) -> Sums:
    """Join the sums of two sets of features.

    Large products never cancel: the scatters are about the means, and only the
    difference of the means is added.

    Source:
      Chan, Golub & LeVeque (1979), eq. 2.1.
    """
    num = a.num + b.num
    apart = b.mean - a.mean
    mean = a.mean + apart * (b.num / num)
    between = np.outer(apart, apart) * (a.num * (b.num / num))
    return Sums(num, mean, a.scatter + b.scatter + between)


def merge_all(parts: Iterable[Sums]) -> Sums:
    """Join all sums, in order; the order changes the last bits only.

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
