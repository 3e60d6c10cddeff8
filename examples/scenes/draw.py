"""Captioned scenes: pictures of a few coloured shapes, with captions true of them.

Nothing is downloaded: example i of a split is drawn from (seed, config, split, i).
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Float, Int, UInt8

from examples.scenes.captions import Wanted, WantedThing, write_caption
from examples.scenes.outlines import HALF_EXTENTS, coverage
from examples.scenes.things import (
    COLOURS,
    MOST_THINGS,
    PAIRS,
    PLACES,
    POINTS,
    RADII,
    RELATIONS,
    RGB,
    SHAPES,
    SIZES,
    PairName,
    PlaceName,
    RelationName,
    ShapeName,
    SizeName,
    Thing,
    is_at,
    stands,
)
from ldm_jax.types import InputError

SplitName = Literal["train", "test", "held_out"]
SPLITS: tuple[SplitName, ...] = get_args(SplitName)
SEED = 20260

HELD_OUT: frozenset[PairName] = frozenset(
    (COLOURS[(3 * i + 1) % len(COLOURS)], shape) for i, shape in enumerate(SHAPES)
)
"""One pair of each shape and of each colour: an eighth of them all."""
TRAINED: tuple[PairName, ...] = tuple(pair for pair in PAIRS if pair not in HELD_OUT)

MARGIN = 8
"""From a thing to the edge of the picture, at least, in points."""
GAP = 20
"""Between the bounding boxes of two things, at least, in points."""
TRIES = 40
"""Places tried for things of given sizes, before they get other sizes."""
PALE, TINT, SLOPE = 244.0, 6.0, 4.0
"""Level of the background, and how far its colour and its slope take it from there."""

WEIGHTS: dict[int, tuple[float, ...]] = {
    1: (1.0,),
    2: (0.35, 0.65),
    3: (0.2, 0.4, 0.4),
}
"""How often a picture has one, two and three things, by the most it may have."""
SAYS_SIZE = 0.45
SAYS_PLACE = {1: 0.55, 2: 0.45, 3: 0.3}
SAYS_RELATION = 0.75
AIMS_AT_PLACE, AIMS_AT_RELATION = 0.6, 0.7
HAS_LARGE = 0.75
"""How often one of three things is large; two would leave no room."""


class Placed(NamedTuple):
    """A thing as it is drawn."""

    thing: Thing
    """The thing, its middle on whole points."""
    radius: int
    """Its nominal radius, in points: one of its size's."""


class Scene(NamedTuple):
    """A picture and what is in it."""

    image: UInt8[np.ndarray, "h w 3"]
    """RGB."""
    caption: str
    """One true sentence about all of its things."""
    wanted: Wanted
    """The same as a structure."""
    things: tuple[Thing, ...]
    """All things, in the order of `wanted`."""

    @property
    def label(self) -> int:
        """Return the class: the pair of the first thing, as an index of `PAIRS`."""
        return PAIRS.index(self.things[0].pair)

    @property
    def rows(self) -> Int[np.ndarray, "3 5"]:
        """Return shape, colour, size (as indices), x and y of each; -1 where none."""
        rows = np.full((MOST_THINGS, 5), -1, np.int32)
        for row, thing in zip(rows, self.things, strict=False):
            row[:3] = (
                SHAPES.index(thing.shape),
                COLOURS.index(thing.colour),
                SIZES.index(thing.size),
            )
            row[3:] = thing.x, thing.y
        return rows


def make_scene(
    split: SplitName, index: int, *, most: int, pixels: int, seed: int = SEED
) -> Scene:
    """Make one example of a split.

    Args:
      split: Pictures of `train` and `test` have no held-out pair; those of `held_out`
        have at least one.
      index: Which example, in [0, 2**32).
      most: Things in a picture, at most; in [1, 3].
      pixels: Of the picture's side, a divisor of 256; the scene is the same for all.
      seed: Of the whole data set, in [0, 2**32).

    Returns:
      The example, a function of these arguments alone.

    Raises:
      InputError: If `most` or `pixels` is out of range.
    """
    if most not in WEIGHTS:
        raise InputError(
            f"scenes: got {most} things at most, wanted 1 to {MOST_THINGS}"
        )
    if pixels < 1 or POINTS % pixels:
        raise InputError(f"scenes: got {pixels} pixels, wanted a divisor of {POINTS}")
    # The old generator: NumPy promises that its numbers stay the same.
    random = np.random.RandomState([seed, most, SPLITS.index(split), index])
    number = 1 + _choose(random, WEIGHTS[most])
    placed = _arrange(random, _draw_pairs(random, number, split))
    wanted, things = _describe(random, [p.thing for p in placed])
    caption = write_caption(wanted, random.randint)
    image = paint(_background(random, pixels), placed)
    return Scene(image, caption, wanted, things)


def paint(
    background: Float[np.ndarray, "h h 3"], placed: Sequence[Placed]
) -> UInt8[np.ndarray, "h h 3"]:
    """Draw things on a background, antialiased.

    Args:
      background: RGB levels in [0, 255]; a square whose side divides 256.
      placed: Things that lie inside.

    Returns:
      The picture.
    """
    pixels = len(background)
    points = POINTS // pixels
    canvas = np.array(background)
    for thing, radius in placed:
        column, right = divmod(int(thing.x), points)
        row, down = divmod(int(thing.y), points)
        parts = coverage(thing.shape, radius=radius, shift=(right, down), pixels=pixels)
        reach = len(parts) // 2
        top, left = max(row - reach, 0), max(column - reach, 0)
        spot = canvas[top : row + reach + 1, left : column + reach + 1]
        cut = parts[top - row + reach :, left - column + reach :]
        cut = cut[: spot.shape[0], : spot.shape[1], None]
        spot += cut * (np.asarray(RGB[thing.colour], np.float64) - spot)
    return np.rint(np.clip(canvas, 0.0, 255.0)).astype(np.uint8)


def _choose(random: np.random.RandomState, weights: tuple[float, ...]) -> int:
    return int(
        np.searchsorted(np.cumsum(weights[:-1]), random.random_sample(), "right")
    )


def _draw_pairs(
    random: np.random.RandomState, number: int, split: SplitName
) -> list[PairName]:
    """Draw different pairs: none of them held out, or at least one."""
    if split != "held_out":
        return [TRAINED[i] for i in random.permutation(len(TRAINED))[:number]]
    held_out = [pair for pair in PAIRS if pair in HELD_OUT]
    first = held_out[random.randint(len(held_out))]
    others = [pair for pair in PAIRS if pair != first]
    rest = random.permutation(len(others))[: number - 1]
    return [first, *(others[i] for i in rest)]


def _arrange(random: np.random.RandomState, pairs: list[PairName]) -> list[Placed]:
    """Give each pair a size and a place, so that all of them have room.

    Many pictures aim at one of the places, or at one of the relations: left to
    chance, few things would be in a corner, and few would be above another.
    """
    is_as_aimed = _draw_aim(random, len(pairs))
    while True:
        sizes = _draw_sizes(random, len(pairs))
        radii = [RADII[size][random.randint(len(RADII[size]))] for size in sizes]
        for middles in _draw_middles(random, [shape for _, shape in pairs], radii):
            things = [
                Thing(shape=shape, colour=colour, size=size, x=x, y=y)
                for (colour, shape), size, (x, y) in zip(
                    pairs, sizes, middles.tolist(), strict=True
                )
            ]
            if is_as_aimed(things):
                return [Placed(*both) for both in zip(things, radii, strict=True)]


def _draw_middles(
    random: np.random.RandomState, shapes: list[ShapeName], radii: list[int]
) -> Float[np.ndarray, "tries n 2"]:
    """Try whole points for the middles; keep those whose boxes are inside and apart."""
    half = np.asarray([HALF_EXTENTS[shape] for shape in shapes])
    half = half * np.asarray(radii)[:, None]
    lowest = np.ceil(MARGIN + half)
    spread = random.random_sample((TRIES, len(shapes), 2)) * (POINTS - 2 * lowest + 1)
    middles = np.floor(lowest + spread)
    are_apart = np.ones(TRIES, bool)
    for i, j in itertools.combinations(range(len(shapes)), 2):
        between = np.abs(middles[:, i] - middles[:, j]) - half[i] - half[j]
        are_apart &= between.max(axis=-1) >= GAP
    return middles[are_apart]


def _draw_aim(
    random: np.random.RandomState, number: int
) -> Callable[[list[Thing]], bool]:
    """Draw what must be true of the things in the end; often nothing."""
    if number == 1 and random.random_sample() < AIMS_AT_PLACE:
        place = PLACES[random.randint(len(PLACES))]
        return lambda things: is_at(place, things[0], slack=0.0)
    if number == 2 and random.random_sample() < AIMS_AT_RELATION:
        relation = RELATIONS[random.randint(len(RELATIONS))]
        return lambda things: stands(things[0], relation, things[1], slack=0.0)
    return lambda things: True


def _draw_sizes(random: np.random.RandomState, number: int) -> list[SizeName]:
    if number < MOST_THINGS:
        return [SIZES[random.randint(2)] for _ in range(number)]
    large = random.randint(number) if random.random_sample() < HAS_LARGE else None
    return ["large" if i == large else "small" for i in range(number)]


def _describe(
    random: np.random.RandomState, things: list[Thing]
) -> tuple[Wanted, tuple[Thing, ...]]:
    """Choose what to say of the things, all of it true, and in which order."""
    ordered = tuple(things[i] for i in random.permutation(len(things)))
    relation: RelationName | None = None
    if len(things) == 2 and random.random_sample() < SAYS_RELATION:
        relation = _relation(*ordered)
    says_place = 0.0 if relation else SAYS_PLACE[len(things)]
    said = tuple(_describe_one(random, thing, says_place) for thing in ordered)
    return Wanted(things=said, relation=relation), ordered


def _relation(first: Thing, second: Thing) -> RelationName | None:
    """Return how a thing lies to another, if that is clear."""
    for relation in RELATIONS:
        if stands(first, relation, second, slack=0.0):
            return relation
    return None


def _describe_one(
    random: np.random.RandomState, thing: Thing, says_place: float
) -> WantedThing:
    size = thing.size if random.random_sample() < SAYS_SIZE else None
    places: list[PlaceName] = [p for p in PLACES if is_at(p, thing, slack=0.0)]
    says = random.random_sample() < says_place and bool(places)
    return WantedThing(
        shape=thing.shape,
        colour=thing.colour,
        size=size,
        place=places[random.randint(len(places))] if says else None,
    )


def _background(
    random: np.random.RandomState, pixels: int
) -> Float[np.ndarray, "h h 3"]:
    """Draw a pale background: one colour, a little lighter towards one side."""
    colour = PALE + TINT * (2.0 * random.random_sample(3) - 1.0)
    angle, steepness = 2.0 * np.pi * random.random_sample(), random.random_sample()
    axis = (np.arange(pixels) + 0.5) / pixels * 2.0 - 1.0
    slope = np.cos(angle) * axis[None, :] + np.sin(angle) * axis[:, None]
    return colour + SLOPE * steepness * slope[..., None]
