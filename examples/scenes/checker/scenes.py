"""What a picture of a scene shows, read from its pixels, and whether it is as asked.

Every thing is compared with each shape of each size, in every colour near its own. What
fits none of them well is counted as unknown, and never guessed.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from examples.scenes.captions import Wanted, WantedThing, parse_caption
from examples.scenes.checker.spots import (
    PIXELS,
    Spot,
    average,
    count_traces,
    find_spots,
    fit_background,
    is_background,
    to_luma_chroma,
)
from examples.scenes.checker.templates import (
    POINTS_A_PIXEL,
    bank,
    fit,
    fitting_colour,
)
from examples.scenes.things import (
    COLOURS,
    RADII,
    RGB,
    ColourName,
    SizeName,
    Thing,
    is_at,
    stands,
)
from ldm_jax.types import InputError

WORST_FIT, UNSEEN = 0.055, 0.007
"""Squared error of the best template: as a part of what it holds, and in each pixel.

What is hardly seen is forgiven, so that pale colours may be as far off as dark ones.
"""
LEAST_GAP = 0.005
"""By how much the next best shape must be worse, as a part of the same."""
WORST_COLOUR = 0.08
"""Distance from the colour with that name."""

MIDDLING = (max(RADII["small"]) + min(RADII["large"])) / 2.0
"""Nominal radius between small and large, in points."""
PALEST_CORE = 0.6
"""The strongest colour of a thing is at least so much of its colour."""
FORGIVEN = 16.0
"""Points by which places and relations may be missed."""

NUM_COLOURS_TRIED = 3
FITS_AT_ONCE = 64


class Reading(NamedTuple):
    """What a picture shows."""

    things: tuple[Thing, ...]
    """What was recognised, from left to right."""
    unknown: int
    """How many other things there are; 1 for a picture that is no scene."""


class Verdict(NamedTuple):
    """Whether a picture is as asked, by attribute."""

    number: bool
    """As many things as wanted, all of them recognised."""
    shapes: bool
    """Every shape is there, as often as wanted."""
    colours: bool
    """Every colour is there, as often as wanted."""
    pairs: bool
    """Every shape is there in its own colour."""
    sizes: bool
    """So it is, and all are of the sizes that were said."""
    places: bool
    """So it is, and all are at the places that were said."""
    relation: bool
    """So it is, and the relation that was said is true."""
    all: bool
    """One reading of the picture has everything right at once."""


def matches(asked: Wanted | str, reading: Reading) -> bool:
    """Say whether a picture shows exactly what was asked.

    Args:
      asked: A caption, or what it asks for.
      reading: What the picture shows.

    Returns:
      Whether `check` finds everything right at once.

    Raises:
      InputError: If the caption says what captions of scenes do not say.
    """
    return check(asked, reading).all


def check(asked: Wanted | str, reading: Reading) -> Verdict:
    """Compare a picture with what was asked, attribute by attribute.

    What was not said is right. `number` tells of things too many; the others do not.

    Args:
      asked: A caption, or what it asks for.
      reading: What the picture shows.

    Returns:
      One boolean for each attribute, and for all at once.

    Raises:
      InputError: If the caption says what captions of scenes do not say.
    """
    wanted = parse_caption(asked) if isinstance(asked, str) else asked
    number = len(wanted.things) == len(reading.things) and reading.unknown == 0
    # Two things may have the same shape and colour: any way to tell them apart will do.
    verdicts = [
        _score_shape(wanted, found)
        for found in itertools.permutations(reading.things, len(wanted.things))
        if all(w.pair == f.pair for w, f in zip(wanted.things, found, strict=True))
    ]
    return Verdict(
        number=number,
        shapes=_holds(
            [t.shape for t in reading.things], [t.shape for t in wanted.things]
        ),
        colours=_holds(
            [t.colour for t in reading.things], [t.colour for t in wanted.things]
        ),
        pairs=bool(verdicts),
        sizes=any(sizes for sizes, _, _ in verdicts),
        places=any(places for _, places, _ in verdicts),
        relation=any(relation for _, _, relation in verdicts),
        all=number and any(all(verdict) for verdict in verdicts),
    )


def _score_shape(wanted: Wanted, found: Sequence[Thing]) -> tuple[bool, bool, bool]:
    """Say whether sizes, places and relation are right, thing by thing."""
    both: list[tuple[WantedThing, Thing]] = list(zip(wanted.things, found, strict=True))
    sizes = all(w.size in (None, f.size) for w, f in both)
    places = all(w.place is None or is_at(w.place, f, slack=FORGIVEN) for w, f in both)
    relation = wanted.relation is None or stands(
        found[0], wanted.relation, found[1], slack=FORGIVEN
    )
    return sizes, places, relation


def _holds(found: Sequence[str], wanted: Sequence[str]) -> bool:
    return all(found.count(name) >= wanted.count(name) for name in wanted)


def read_scene(image: UInt8[np.ndarray, "h h 3"]) -> Reading:
    """Read which things a picture shows; see `read_scenes`."""
    return read_scenes(image[None])[0]


def read_scenes(images: UInt8[np.ndarray, "b h h 3"]) -> list[Reading]:
    """Read which things pictures show.

    The background is a plane fitted to each channel. What differs from it is cut into
    connected spots, and each spot is compared with `colour * coverage` for every shape,
    radius and middle, sharp and slightly blurred, in its nearest colours. A spot is
    unknown if the least squared error is too large a part of the template, or if the
    colour that would fit best is not near the colour of the name; and so is what is
    left where no spot was.

    Args:
      images: RGB; the side is a multiple of 32.

    Returns:
      What each shows.

    Raises:
      InputError: If the pictures have another size.
    """
    height, width = images.shape[1:3]
    if height != width or height % PIXELS or height == 0:
        raise InputError(
            f"scenes: got pictures of {height}x{width} pixels, wanted squares whose "
            f"side is a multiple of {PIXELS}"
        )
    small = average(images)
    planes = fit_background(small)
    differences = small - planes
    readings: list[Reading] = []
    spots: list[Spot] = []
    unknown = np.zeros(len(images), int)
    for i, (difference, plane) in enumerate(zip(differences, planes, strict=True)):
        if is_background(plane, difference):
            found, zones = find_spots(i, difference, plane, side=bank().side)
            spots += found
            unknown[i] = count_traces(difference, zones)
        else:
            unknown[i] = 1
    things: list[list[Thing]] = [[] for _ in images]
    for start in range(0, len(spots), FITS_AT_ONCE):
        several = spots[start : start + FITS_AT_ONCE]
        for spot, thing in zip(several, _recognise(several), strict=True):
            if thing is None:
                unknown[spot.picture] += 1
            else:
                things[spot.picture].append(thing)
    for found, count in zip(things, unknown, strict=True):
        ordered = tuple(sorted(found, key=lambda thing: thing.x))
        readings.append(Reading(ordered, int(count)))
    return readings


def _recognise(spots: Sequence[Spot]) -> list[Thing | None]:
    """Name spots, or say None."""
    windows = np.stack([spot.window for spot in spots])
    backgrounds = np.stack([spot.background for spot in spots])
    seen = np.stack([spot.colour for spot in spots])
    palette = to_luma_chroma(np.asarray([RGB[name] for name in COLOURS], np.uint8))
    wanted = palette[None] - backgrounds[:, None]
    # A thin line that is blurred is nowhere of its full colour.
    parts = np.sum(seen[:, None] * wanted, axis=-1) / np.sum(wanted**2, axis=-1)
    paler = np.clip(parts, PALEST_CORE, 1.0)[..., None] * wanted
    distances = np.linalg.norm(seen[:, None] - paler, axis=-1)
    nearest = np.argsort(distances, axis=1)[:, :NUM_COLOURS_TRIED]
    tried = np.take_along_axis(wanted, nearest[..., None], axis=1)
    fits = fit(windows, tried)
    things: list[Thing | None] = []
    for i, spot in enumerate(spots):
        best, shape = np.unravel_index(fits.error[i].argmin(), fits.error[i].shape)
        error, next_error = np.partition(fits.error[i, best], 1)[:2]
        held, template = fits.held[i, best, shape], int(fits.template[i, best, shape])
        num_pixels = held / np.sum(tried[i, best] ** 2)
        limit = WORST_FIT * held + UNSEEN * num_pixels
        is_clear = error <= limit and next_error >= error + LEAST_GAP * held
        fitting = fitting_colour(
            spot.window, template=template, blur=int(fits.blur[i, best, shape])
        )
        is_near = np.linalg.norm(fitting - tried[i, best]) <= WORST_COLOUR
        name = COLOURS[nearest[i, best]]
        things.append(_name(spot, template, name) if is_clear and is_near else None)
    return things


def _name(spot: Spot, template: int, colour: ColourName) -> Thing:
    templates = bank()
    x, y = templates.middles[template]
    size: SizeName = "small" if templates.radii[template] < MIDDLING else "large"
    return Thing(
        shape=templates.shape(template),
        colour=colour,
        size=size,
        x=float(spot.column * POINTS_A_PIXEL + x),
        y=float(spot.row * POINTS_A_PIXEL + y),
    )
