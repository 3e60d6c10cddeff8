"""The Fréchet distance between two sets of features, each taken as a Gaussian."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class Moments(NamedTuple):
    """Mean and covariance of a set of features, float64.

    Attributes:
      mean: Of length d.
      covariance: d by d, unbiased.
    """

    mean: Float[np.ndarray, " d"]
    covariance: Float[np.ndarray, "d d"]


def moments(features: Float[np.ndarray, "n d"]) -> Moments:
    """Measure mean and unbiased covariance in float64.

    Args:
      features: At least two rows.

    Returns:
      The moments.

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
    `R R^T` being the covariance: by eigenvalues of symmetric matrices and singular
    values alone. Nothing turns complex, and no root is taken of what a product of
    covariances has lost to rounding, so that ill-conditioned ones keep their digits.

    Args:
      a: Moments of one set.
      b: Moments of the other, of the same length.

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
