"""Features without a network: principal components of small averaged images.

They represent layout and contrast, not texture; distances between them compare samplers
of one model, not models.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from ldm_jax.evaluation.fid import Moments, moments

MAX_COMPONENTS, SMALL_SIDE = 32, 8


class Projection(NamedTuple):
    """Principal components of small averaged images."""

    mean: Float[np.ndarray, " d"]
    """Mean of the flat small images."""
    axes: Float[np.ndarray, "d k"]
    """One component a column, of unit length."""


def small_images(images: UInt8[np.ndarray, "n h w c"]) -> Float[np.ndarray, "n d"]:
    """Average square images to at most 8 pixels a side, and flatten them."""
    num, size, _, channels = images.shape
    side = max(s for s in range(1, SMALL_SIDE + 1) if size % s == 0)
    block = size // side
    blocks = images.reshape(num, side, block, side, block, channels)
    return blocks.mean(axis=(2, 4), dtype=np.float64).reshape(num, -1) / 255.0


def fit_projection(rows: Float[np.ndarray, "n d"]) -> Projection:
    """Find the principal components with most variance, at most 32."""
    mean = rows.mean(axis=0)
    _, vectors = np.linalg.eigh(np.cov(rows - mean, rowvar=False))
    return Projection(mean, vectors[:, ::-1][:, :MAX_COMPONENTS])


def moments_of(projection: Projection, rows: Float[np.ndarray, "n d"]) -> Moments:
    """Return the moments of the components of small images."""
    return moments((rows - projection.mean) @ projection.axes)
