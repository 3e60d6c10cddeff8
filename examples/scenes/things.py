"""Things in a scene: their names, their colours, where they are, and how they relate.

Lengths are in points: 256ths of the picture's side, whatever its number of pixels.
x grows to the right and y down.
"""

import dataclasses
from typing import Literal, get_args

ShapeName = Literal[
    "circle", "square", "triangle", "diamond", "star", "cross", "ring", "heart"
]
ColourName = Literal[
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "black"
]
SizeName = Literal["small", "large"]
PlaceName = Literal[
    "left",
    "right",
    "top",
    "bottom",
    "middle",
    "top left",
    "top right",
    "bottom left",
    "bottom right",
]
RelationName = Literal["left of", "right of", "above", "below"]

SHAPES: tuple[ShapeName, ...] = get_args(ShapeName)
COLOURS: tuple[ColourName, ...] = get_args(ColourName)
SIZES: tuple[SizeName, ...] = get_args(SizeName)
PLACES: tuple[PlaceName, ...] = get_args(PlaceName)
RELATIONS: tuple[RelationName, ...] = get_args(RelationName)

RGB: dict[ColourName, tuple[int, int, int]] = {
    "red": (214, 40, 48),
    "orange": (247, 134, 24),
    "yellow": (246, 206, 40),
    "green": (46, 158, 82),
    "blue": (38, 104, 216),
    "purple": (134, 66, 180),
    "pink": (243, 100, 184),
    "black": (44, 44, 54),
}
"""sRGB, in [0, 255]."""

POINTS = 256
MOST_THINGS = 3
RADII: dict[SizeName, tuple[int, ...]] = {"small": (27, 29, 31), "large": (43, 45, 47)}
"""Nominal radii of each size, in points."""

EDGE = 102
"""A thing is at the left if its x is at most this many points; at the top likewise."""
CORNER = 94
"""The same for a corner, in both directions."""
MIDDLE = 22
"""A thing is in the middle if it is at most this far from it in either direction."""
APART = 48
"""Things that stand in a relation are at least this many points apart."""
STEEPNESS = 0.7
"""Across the direction of a relation, at most this part of the distance along it."""

PairName = tuple[ColourName, ShapeName]
PAIRS: tuple[PairName, ...] = tuple((c, s) for s in SHAPES for c in COLOURS)
"""Every colour of the first shape, then of the next; its index is the class label."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Thing:
    """A thing in a picture."""

    shape: ShapeName
    """Its shape."""
    colour: ColourName
    """Its colour."""
    size: SizeName
    """Small or large."""
    x: float
    """Middle of its bounding box, in points from the left edge."""
    y: float
    """The same, from the top edge."""

    @property
    def pair(self) -> PairName:
        """Return its colour and shape."""
        return self.colour, self.shape


def is_at(place: PlaceName, thing: Thing, *, slack: float) -> bool:
    """Say whether a thing is at a place.

    Args:
      place: Half of the picture, corner or middle; a corner is also in two halves.
      thing: The thing.
      slack: By how many points the place is wider than where captions say it.

    Returns:
      Whether the middle of the thing is there.
    """
    if place == "middle":
        return (
            max(abs(thing.x - POINTS / 2), abs(thing.y - POINTS / 2)) <= MIDDLE + slack
        )
    words = place.split()
    limit = (EDGE if len(words) == 1 else CORNER) + slack
    distance_by_side = {
        "left": thing.x,
        "right": POINTS - thing.x,
        "top": thing.y,
        "bottom": POINTS - thing.y,
    }
    return all(distance_by_side[word] <= limit for word in words)


def stands(
    first: Thing, relation: RelationName, second: Thing, *, slack: float
) -> bool:
    """Say whether the first thing is left of, right of, above or below the second.

    Args:
      first: The subject.
      relation: The direction in which it lies.
      second: What it is compared with.
      slack: How much is forgiven, in points.

    Returns:
      Whether it lies clearly in that direction, and more so than across it.
    """
    dx, dy = second.x - first.x, second.y - first.y
    along, across = {
        "left of": (dx, dy),
        "right of": (-dx, dy),
        "above": (dy, dx),
        "below": (-dy, dx),
    }[relation]
    return along >= APART - slack and abs(across) <= STEEPNESS * along + slack
