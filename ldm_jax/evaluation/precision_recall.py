"""Precision, recall, density and coverage, by nearest neighbours."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from ldm_jax.types import InputError

ROWS = 1024
"""Rows whose distances to all others are held at once."""


class Neighbourhoods(NamedTuple):
    """Precision, recall, density and coverage of two sets of features.

    A neighbourhood is a ball around a feature; its radius is the distance to the k-th
    neighbour in the same set.
    """

    precision: float
    """Share of samples that lie in a real neighbourhood."""
    recall: float
    """Share of real images that lie in a sample's neighbourhood."""
    density: float
    """Mean number of real neighbourhoods that a sample lies in, over k; may exceed
    1."""
    coverage: float
    """Share of real neighbourhoods that a sample lies in."""


def neighbourhoods(
    made: Float[np.ndarray, "n d"],
    real: Float[np.ndarray, "m d"],
    *,
    neighbours: int,
) -> Neighbourhoods:
    """Compare two sets of features by their nearest neighbours.

    Args:
      made: Features of samples.
      real: Features of real images; published scores use as many as samples.
      neighbours: k.

    Raises:
      InputError: If a set has no k-th neighbour.

    Source:
      Kynkäänniemi et al., arXiv:1904.06991, eq. 1 (k = 3); Naeem et al.,
      arXiv:2002.09797, eq. 5 and 6 (density and coverage).
    """
    least = min(len(made), len(real))
    if not 1 <= neighbours < least:
        raise InputError(
            f"neighbourhoods: got {len(made)} and {len(real)} features, wanted more "
            f"than {neighbours} of each for their neighbour number {neighbours}"
        )
    # Relative to the real mean: distances stay the same and lose fewer digits.
    middle = np.asarray(real, np.float64).mean(axis=0)
    x, y = (jnp.asarray(np.asarray(f - middle, np.float32)) for f in (made, real))
    radius_x, radius_y = (_radii(f, neighbours) for f in (x, y))
    hits = np.zeros(len(made), np.int64)
    covered = np.zeros(len(real), bool)
    recalled = np.zeros(len(real), bool)
    for start in range(0, len(made), ROWS):
        part = slice(start, start + ROWS)
        in_real, in_made = _inside(x[part], y, radius_x[part], radius_y)
        hits[part] = np.asarray(in_real).sum(axis=1)
        covered |= np.asarray(in_real).any(axis=0)
        recalled |= np.asarray(in_made).any(axis=0)
    return Neighbourhoods(
        precision=float((hits > 0).mean()),
        recall=float(recalled.mean()),
        density=float(hits.mean() / neighbours),
        coverage=float(covered.mean()),
    )


def _radii(x: Float[Array, "n d"], neighbours: int) -> Float[Array, " n"]:
    parts = [
        _kth(x[i : i + ROWS], x, neighbours=neighbours) for i in range(0, len(x), ROWS)
    ]
    return jnp.concatenate(parts)


@functools.partial(jax.jit, static_argnames="neighbours")
def _kth(
    part: Float[Array, "r d"], x: Float[Array, "n d"], *, neighbours: int
) -> Float[Array, " r"]:
    """Return the squared distance to the k-th neighbour; itself is the 0-th."""
    nearest, _ = jax.lax.top_k(-_squared_distances(part, x), neighbours + 1)
    return -nearest[:, -1]


@jax.jit
def _inside(
    part: Float[Array, "r d"],
    y: Float[Array, "m d"],
    radius_part: Float[Array, " r"],
    radius_y: Float[Array, " m"],
) -> tuple[Bool[Array, "r m"], Bool[Array, "r m"]]:
    """Return which of `part` lie in which balls of `y`, and the reverse."""
    distances = _squared_distances(part, y)
    return distances <= radius_y[None, :], distances <= radius_part[:, None]


def _squared_distances(
    x: Float[Array, "n d"], y: Float[Array, "m d"]
) -> Float[Array, "n m"]:
    product = jnp.dot(x, y.T, precision=jax.lax.Precision.HIGHEST)
    squares = jnp.square(x).sum(axis=1)[:, None] + jnp.square(y).sum(axis=1)[None, :]
    return jnp.maximum(squares - 2.0 * product, 0.0)
