"""The shapes of a scene: which points they cover, and how much of each pixel."""

import functools

import numpy as np
from jaxtyping import Bool, Float

from examples.scenes.things import POINTS, SHAPES, ShapeName

SUPERSAMPLING = 8
"""Samples a pixel, in each direction."""

SQUARE = 0.88
DIAMOND = 1.2
TRIANGLE = (1.25, 1.08)
CROSS = (1.08, 0.38)
RING = (1.1, 0.56)
STAR = (1.3, 0.52)
HEART = (0.57, 0.6, 1.05)

# Of a star of unit outer radius.
STAR_HALF_WIDTH = np.sin(np.radians(72.0))
STAR_BOTTOM = np.cos(np.radians(36.0))

HALF_EXTENTS: dict[ShapeName, tuple[float, float]] = {
    "circle": (1.0, 1.0),
    "square": (SQUARE, SQUARE),
    "triangle": TRIANGLE,
    "diamond": (DIAMOND, DIAMOND),
    "star": (STAR[0] * STAR_HALF_WIDTH, STAR[0] * (1.0 + STAR_BOTTOM) / 2.0),
    "cross": (CROSS[0], CROSS[0]),
    "ring": (RING[0], RING[0]),
    "heart": (HEART[0] + HEART[1], HEART[2]),
}
"""Half the width and the height of each shape, in nominal radii."""


def is_inside(
    shape: ShapeName, x: Float[np.ndarray, "*n"], y: Float[np.ndarray, "*n"]
) -> Bool[np.ndarray, "*n"]:
    """Say which points a shape covers.

    Args:
      shape: The shape; its area is about that of a circle of nominal radius, but for
        the cross and the ring, which are of the same width.
      x: Right of the middle of its bounding box, in nominal radii.
      y: Below that middle, in nominal radii.

    Returns:
      True inside.
    """
    match shape:
        case "circle":
            return np.hypot(x, y) <= 1.0
        case "square":
            return np.maximum(np.abs(x), np.abs(y)) <= SQUARE
        case "triangle":
            width, height = TRIANGLE
            return (y <= height) & (np.abs(x) <= width * (y + height) / (2.0 * height))
        case "diamond":
            return np.abs(x) + np.abs(y) <= DIAMOND
        case "star":
            return _in_star(x, y)
        case "cross":
            length, width = CROSS
            longer = np.maximum(np.abs(x), np.abs(y))
            return (longer <= length) & (np.minimum(np.abs(x), np.abs(y)) <= width)
        case "ring":
            distance = np.hypot(x, y)
            return (distance <= RING[0]) & (distance >= RING[1])
        case "heart":
            return _in_heart(x, y)


def _in_star(
    x: Float[np.ndarray, "*n"], y: Float[np.ndarray, "*n"]
) -> Bool[np.ndarray, "*n"]:
    """Say what a five-pointed star covers: one straight line, ten times mirrored."""
    outer, waist = STAR
    y = y - outer * (1.0 - STAR_BOTTOM) / 2.0
    turn = np.mod(np.arctan2(x, -y), np.radians(72.0))
    angle = np.minimum(turn, np.radians(72.0) - turn)  # from the nearest tip, 0 to 36
    along, across = np.hypot(x, y) * np.cos(angle), np.hypot(x, y) * np.sin(angle)
    inner = outer * waist
    dent = inner * np.cos(np.radians(36.0)), inner * np.sin(np.radians(36.0))
    return (outer - along) * dent[1] >= across * (outer - dent[0])


def _in_heart(
    x: Float[np.ndarray, "*n"], y: Float[np.ndarray, "*n"]
) -> Bool[np.ndarray, "*n"]:
    """Say what a heart covers: two circles, and what its tip sees of them below."""
    aside, radius, tip = HEART
    height = radius - tip  # of the middles of the circles
    x = np.abs(x)
    in_circle = np.hypot(x - aside, y - height) <= radius
    distance = np.hypot(aside, tip - height)
    angle = np.arctan2(aside, tip - height) + np.arcsin(radius / distance)
    along = x * np.sin(angle) + (tip - y) * np.cos(angle)
    aside_of_tangent = x * np.cos(angle) - (tip - y) * np.sin(angle)
    reach = np.sqrt(distance**2 - radius**2)
    return in_circle | ((aside_of_tangent <= 0.0) & (along <= reach) & (y >= height))


@functools.lru_cache(maxsize=8192)
def coverage(
    shape: ShapeName, *, radius: int, shift: tuple[int, int], pixels: int
) -> Float[np.ndarray, "h w"]:
    """Measure how much of each pixel around a shape is covered.

    Args:
      shape: The shape.
      radius: Its nominal radius, in points.
      shift: How far its middle lies right of and below the top left corner of the
        pixel in the middle of the result, in points.
      pixels: Of the picture's side; divides the number of points.

    Returns:
      Parts in [0, 1] of an odd number of pixels a side; read-only, as it is kept.
    """
    points = POINTS // pixels
    reach = max(max(HALF_EXTENTS[name]) for name in SHAPES) * radius
    margin = int(reach // points) + 2
    samples = SUPERSAMPLING * (2 * margin + 1)
    axis = (np.arange(samples) + 0.5) * points / SUPERSAMPLING - margin * points
    x, y = (axis - shift[0]) / radius, (axis - shift[1]) / radius
    fine = is_inside(shape, *np.meshgrid(x, y))
    blocks = fine.reshape(2 * margin + 1, SUPERSAMPLING, -1, SUPERSAMPLING)
    parts = blocks.mean(axis=(1, 3))
    parts.setflags(write=False)
    return parts
