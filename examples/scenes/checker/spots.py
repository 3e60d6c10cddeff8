"""Spots of colour on a pale background: cut out of pictures, to be named elsewhere."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, UInt8
from scipy import ndimage

PIXELS = 32
"""Pictures are averaged down to so many pixels a side."""
# Less weight for chroma: it is smeared more, and luma tells shapes apart.
LUMA_CHROMA = np.asarray(
    [[0.299, 0.587, 0.114], [-0.101, -0.199, 0.3], [0.3, -0.251, -0.049]], np.float32
)
"""From RGB in [0, 1]: luma, and blue and red less luma. Distances are between these."""
PALE = 0.8
"""Luma of a background, at least."""
NEAR, FAR, FAINT = 0.08, 0.13, 0.07
"""Distances from the background: it, a spot, a smooth trace."""
MOST_COVERED = 0.6
"""Part of a picture that is not background, at most."""
LEAST_MASS = 0.1
"""Less than this, in squared distance summed over pixels, is a speck and no spot."""
CORE = 0.75
"""The core of a spot is what is at least so far as its farthest pixel."""
AROUND = np.ones((3, 3), int)


class Spot(NamedTuple):
    """A connected part of a picture that is not background."""

    picture: int
    """Index of its picture."""
    row: int
    """Of the pixel in the middle of its bounding box."""
    column: int
    """Of that pixel."""
    window: Float32[np.ndarray, "s s 3"]
    """Around that pixel, what differs from the background and is of this spot."""
    background: Float32[np.ndarray, "3"]
    """Colour behind it."""
    colour: Float32[np.ndarray, "3"]
    """How its core differs from that."""


def to_luma_chroma(images: UInt8[np.ndarray, "*n 3"]) -> Float32[np.ndarray, "*n 3"]:
    """Map RGB levels to luma and chroma."""
    return images.astype(np.float32) / np.float32(255.0) @ LUMA_CHROMA.T


def average(images: UInt8[np.ndarray, "b h h 3"]) -> Float32[np.ndarray, "b s s 3"]:
    """Average blocks of pixels, in luma and chroma; the side is a multiple of 32."""
    block = images.shape[1] // PIXELS
    blocks = images.reshape(len(images), PIXELS, block, PIXELS, block, 3)
    levels = blocks.mean(axis=(2, 4), dtype=np.float32)
    return levels / np.float32(255.0) @ LUMA_CHROMA.T


def fit_background(
    images: Float32[np.ndarray, "b s s 3"],
) -> Float32[np.ndarray, "b s s 3"]:
    """Fit a plane to each channel of what is near the colour of the picture's frame."""
    axis = np.linspace(-1.0, 1.0, PIXELS, dtype=np.float32)
    columns = np.ones((PIXELS, PIXELS, 3), np.float32)
    columns[..., 1], columns[..., 2] = axis[None, :], axis[:, None]
    frame = np.concatenate(
        [images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]], axis=1
    )
    planes = np.median(frame, axis=1)[:, None, None]
    for _ in range(2):
        near = np.linalg.norm(images - planes, axis=-1) < NEAR
        weighted = columns * near[..., None]
        gram = np.einsum("bhwi,hwj->bij", weighted, columns)
        gram += np.float32(1e-3) * np.eye(3, dtype=np.float32)
        moments = np.einsum("bhwi,bhwc->bic", weighted, images)
        planes = np.einsum("hwi,bic->bhwc", columns, np.linalg.solve(gram, moments))
    return planes.astype(np.float32)


def is_background(
    plane: Float32[np.ndarray, "s s 3"], difference: Float32[np.ndarray, "s s 3"]
) -> bool:
    """Say whether a plane is pale, and most of the picture is near it."""
    covered = np.linalg.norm(difference, axis=-1) >= NEAR
    return bool(plane[..., 0].min() >= PALE and covered.mean() <= MOST_COVERED)


def find_spots(
    picture: int,
    difference: Float32[np.ndarray, "s s 3"],
    plane: Float32[np.ndarray, "s s 3"],
    *,
    side: int,
) -> tuple[list[Spot], Bool[np.ndarray, "s s"]]:
    """Cut out what is no background, with a margin of two pixels.

    Args:
      picture: Index of the picture.
      difference: Its difference from its background.
      plane: Its background.
      side: Pixels of the windows' side; odd.

    Returns:
      The spots, and where they and their margins are.
    """
    distance = np.linalg.norm(difference, axis=-1)
    labels: Any = ndimage.label(distance > FAR, AROUND)
    labels, zones = labels[0], labels[0]
    for _ in range(2):
        zones = np.where(zones > 0, zones, ndimage.grey_dilation(zones, size=(3, 3)))
    reach = side // 2
    padded = np.pad(difference, ((reach, reach), (reach, reach), (0, 0)))
    spots: list[Spot] = []
    for i, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        inside = labels == i
        if np.sum(distance[inside] ** 2) < LEAST_MASS:
            continue
        row, column = (rows.start + rows.stop) // 2, (columns.start + columns.stop) // 2
        place = np.s_[row : row + side, column : column + side]
        core = inside & (distance >= CORE * distance[inside].max())
        spots.append(
            Spot(
                picture=picture,
                row=row,
                column=column,
                window=padded[place] * np.pad(zones == i, reach)[place][..., None],
                background=plane[inside].mean(axis=0),
                colour=difference[core].mean(axis=0),
            )
        )
    return spots, zones > 0


def count_traces(
    difference: Float32[np.ndarray, "s s 3"], zones: Bool[np.ndarray, "s s"]
) -> int:
    """Count what is too faint for a spot, and too smooth and too large for noise."""
    rest = np.where(zones[..., None], np.float32(0.0), difference)
    smooth = np.stack(
        [ndimage.uniform_filter(rest[..., channel], 3) for channel in range(3)], axis=-1
    )
    filled = ndimage.binary_fill_holes(zones)
    beside = np.logical_not(ndimage.binary_dilation(filled, AROUND))
    traces: Any = ndimage.label(
        (np.linalg.norm(smooth, axis=-1) > FAINT) & beside, AROUND
    )
    return int(traces[1])
