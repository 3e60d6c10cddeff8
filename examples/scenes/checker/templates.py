"""Every shape of a scene in every size and place, to compare a spot of colour with."""

import functools
import itertools
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int
from scipy import ndimage

from examples.scenes.checker.spots import PIXELS
from examples.scenes.outlines import coverage
from examples.scenes.things import POINTS, SHAPES, ShapeName

POINTS_A_PIXEL = POINTS // PIXELS
RADII = (25, 27, 29, 31, 33, 41, 43, 45, 47, 49)
"""Nominal radii, in points: those of things and their neighbours, none between."""
BLURS = ((0.0, 0.0), (0.6, 0.6), (0.0, 1.0))
"""Standard deviations in pixels, of luma and of chroma: decoders smear the latter."""
DEVIATIONS = (0.0, 0.6, 1.0)
PHASE = 2
"""Step of the middles of templates, in points."""
NEAREST, FARTHEST = -8, 14
"""Middles lie so far right of and below the corner of the middle pixel, in points."""


class Bank(NamedTuple):
    """Templates: how much of each pixel of a square window a shape covers."""

    blurred: Float32[np.ndarray, "blurs k d"]
    """For each of `DEVIATIONS` one template a row, in the order of their shapes; parts
    in [0, 1]."""
    norms: Float32[np.ndarray, "blurs k"]
    """Squares of the same, summed over each row."""
    radii: Int[np.ndarray, " k"]
    """Nominal radius of each, in points."""
    middles: Int[np.ndarray, "k 2"]
    """x and y of each, in points from the corner of the middle pixel."""
    side: int
    """Pixels of the window's side; odd."""

    def shape(self, template: int) -> ShapeName:
        """Return the shape of a template."""
        return SHAPES[template * len(SHAPES) // len(self.radii)]


class Fit(NamedTuple):
    """The best template of each shape in each colour that was tried, for windows."""

    error: Float32[np.ndarray, "n colours shapes"]
    """Squared error left."""
    held: Float32[np.ndarray, "n colours shapes"]
    """Squares of the template in its colour."""
    template: Int[np.ndarray, "n colours shapes"]
    """Its row in the bank."""
    blur: Int[np.ndarray, "n colours shapes"]
    """Its blur, as an index of `BLURS`."""


@functools.lru_cache(maxsize=1)
def bank() -> Bank:
    """Make the templates, once."""
    side = len(coverage(SHAPES[0], radius=RADII[-1], shift=(0, 0), pixels=PIXELS))
    steps = np.arange(NEAREST, FARTHEST, PHASE)
    middles = np.stack(np.meshgrid(steps, steps, indexing="ij"), axis=-1).reshape(-1, 2)
    drawn = np.concatenate(
        [
            _draw(shape, radius, middles, side)
            for shape, radius in itertools.product(SHAPES, RADII)
        ]
    )
    blurred = np.stack([_blur(drawn, deviation) for deviation in DEVIATIONS])
    blurred = blurred.reshape(len(DEVIATIONS), len(drawn), side * side)
    return Bank(
        blurred=blurred,
        norms=np.sum(blurred**2, axis=-1),
        radii=np.tile(np.repeat(RADII, len(middles)), len(SHAPES)),
        middles=np.tile(middles, (len(RADII) * len(SHAPES), 1)),
        side=side,
    )


def _draw(
    shape: ShapeName, radius: int, middles: Int[np.ndarray, "m 2"], side: int
) -> Float32[np.ndarray, "m s s"]:
    """Draw a shape at every middle."""
    drawn = np.zeros((len(middles), side, side), np.float32)
    for template, (x, y) in zip(drawn, middles.tolist(), strict=True):
        column, right = divmod(x, POINTS_A_PIXEL)
        row, down = divmod(y, POINTS_A_PIXEL)
        parts = coverage(shape, radius=radius, shift=(right, down), pixels=PIXELS)
        whole = np.pad(parts, (side - len(parts)) // 2)
        template[:] = np.roll(whole, (row, column), axis=(0, 1))  # its edge is empty
    return drawn


def _blur(
    drawn: Float32[np.ndarray, "m s s"], deviation: float
) -> Float32[np.ndarray, "m s s"]:
    if deviation == 0.0:
        return drawn
    return ndimage.gaussian_filter(drawn, (0.0, deviation, deviation))


def fit(
    windows: Float32[np.ndarray, "n s s 3"],
    colours: Float32[np.ndarray, "n colours 3"],
) -> Fit:
    """Find the template of each shape that explains each window best.

    The error is `|window - colour * template|^2`, summed over pixels and channels.

    Args:
      windows: What differs from the background: luma and two of chroma; `bank().side`
        pixels a side, around the pixel that the thing's middle is near.
      colours: How the colours to try differ from the background.

    Returns:
      For each window, colour and shape the best template, and how well it fits.
    """
    templates = bank()
    flat = windows.reshape(len(windows), -1, 3)
    energy = np.sum(flat**2, axis=(1, 2))[:, None, None]
    products = [
        [flat[..., channel] @ rows.T for channel in range(3)]
        for rows in templates.blurred
    ]
    fits: list[Fit] = []
    for blur, deviations in enumerate(BLURS):
        luma, chroma = (DEVIATIONS.index(deviation) for deviation in deviations)
        by_channel = products[luma][0], products[chroma][1], products[chroma][2]
        product = np.einsum("nmc,cnk->nmk", colours, by_channel)
        squares = colours**2
        held = squares[..., :1] * templates.norms[luma]
        held += squares[..., 1:].sum(axis=-1, keepdims=True) * templates.norms[chroma]
        error = energy - 2.0 * product + held
        by_shape = error.reshape(*error.shape[:2], len(SHAPES), -1)
        template = by_shape.argmin(axis=-1)
        template += np.arange(len(SHAPES)) * by_shape.shape[-1]
        error, held = (
            np.take_along_axis(values, template, axis=-1) for values in (error, held)
        )
        fits.append(Fit(error, held, template, np.full_like(template, blur)))
    best = np.argmin([f.error for f in fits], axis=0)[None]
    stacked = (np.stack(values) for values in zip(*fits, strict=True))
    return Fit(*(np.take_along_axis(values, best, axis=0)[0] for values in stacked))


def fitting_colour(
    window: Float32[np.ndarray, "s s 3"], *, template: int, blur: int
) -> Float32[np.ndarray, "3"]:
    """Find the colour with which a template explains a window best.

    Args:
      window: As for `fit`.
      template: Row of the bank.
      blur: Index of `BLURS`.

    Returns:
      How that colour differs from the background.
    """
    templates = bank()
    luma, chroma = (DEVIATIONS.index(deviation) for deviation in BLURS[blur])
    rows = templates.blurred[[luma, chroma, chroma], template]
    norms = templates.norms[[luma, chroma, chroma], template]
    return np.einsum("cp,pc->c", rows, window.reshape(-1, 3)) / norms
