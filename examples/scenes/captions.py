"""What a caption asks of a picture: as a structure, as English, and back.

Text and structure come from the same tables, so whatever is written can be read.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar, cast

from examples.scenes.things import (
    COLOURS,
    MOST_THINGS,
    SHAPES,
    ColourName,
    PairName,
    PlaceName,
    RelationName,
    ShapeName,
    SizeName,
)
from ldm_jax.types import InputError

SIZE_WORDS: dict[SizeName, tuple[str, ...]] = {
    "small": ("small", "little"),
    "large": ("large", "big"),
}
PLACE_WORDS: dict[PlaceName, tuple[str, ...]] = {
    "left": ("on the left", "on the left side"),
    "right": ("on the right", "on the right side"),
    "top": ("at the top", "near the top"),
    "bottom": ("at the bottom", "near the bottom"),
    "middle": ("in the middle", "in the centre"),
    "top left": ("in the top left corner", "at the top left"),
    "top right": ("in the top right corner", "at the top right"),
    "bottom left": ("in the bottom left corner", "at the bottom left"),
    "bottom right": ("in the bottom right corner", "at the bottom right"),
}
RELATION_WORDS: dict[RelationName, tuple[str, ...]] = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
CONVERSE: dict[RelationName, RelationName] = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
}
OPENINGS = ("", "", "", "a picture of ", "there is ", "here is ", "a drawing of ")
COUNTS = ("one shape: ", "two shapes: ", "three shapes: ")

_Name = TypeVar("_Name", SizeName, PlaceName, RelationName)

Pick = Callable[[int], int]
"""Picks one of n ways to say a thing: an index in [0, n)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WantedThing:
    """A thing that a caption asks for."""

    shape: ShapeName
    """Its shape."""
    colour: ColourName
    """Its colour."""
    size: SizeName | None = None
    """Small or large; None if any will do."""
    place: PlaceName | None = None
    """Where; None if anywhere will do."""

    @property
    def pair(self) -> PairName:
        """Return its colour and shape."""
        return self.colour, self.shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a caption asks for: these things and no others."""

    things: tuple[WantedThing, ...]
    """One to three, in the order of the sentence's sense, subject first."""
    relation: RelationName | None = None
    """How the first of two things lies to the second; None if not said."""

    def __post_init__(self) -> None:
        """Check the number of things."""
        if not 1 <= len(self.things) <= MOST_THINGS:
            raise InputError(
                f"scene: got {len(self.things)} things, wanted 1 to {MOST_THINGS}"
            )
        if self.relation is not None and len(self.things) != 2:
            raise InputError(
                f"scene: got {self.relation!r} between {len(self.things)} things, "
                "wanted a relation between two"
            )


def write_caption(wanted: Wanted, pick: Pick) -> str:
    """Say in English what is wanted.

    Args:
      wanted: Things, and how they relate.
      pick: Chooses among the ways to say it.

    Returns:
      One line, without a full stop.
    """
    if wanted.relation is not None:
        return _write_relation(wanted, wanted.relation, pick)
    phrases = [_phrase(thing, pick) for thing in wanted.things]
    *before, last = phrases
    listed = f"{', '.join(before)} and {last}" if before else last
    first = wanted.things[0]
    if not before and first.place is not None:
        where = _one(PLACE_WORDS[first.place], pick)
        noun = _noun(first, pick)
        ways = (
            f"{_opening(wanted, pick)}{listed}",
            f"{where}, {_article(noun)}",
            f"{where} there is {_article(noun)}",
            f"the {noun} is {where}",
        )
        return _one((ways[0], ways[0], *ways), pick)
    return f"{_opening(wanted, pick)}{listed}"


def _write_relation(wanted: Wanted, relation: RelationName, pick: Pick) -> str:
    first, second = wanted.things
    spec, other = _phrase(first, pick), _phrase(second, pick)
    words = _one(RELATION_WORDS[relation], pick)
    if first.place is not None or second.place is not None:
        return f"{_opening(wanted, pick)}{spec} {words} {other}"
    ways = (
        f"{_opening(wanted, pick)}{spec} {words} {other}",
        f"{words} {other} there is {spec}",
        f"the {_noun(first, pick)} is {words} the {_noun(second, pick)}",
    )
    return _one((ways[0], ways[0], *ways), pick)


def _opening(wanted: Wanted, pick: Pick) -> str:
    return _one((*OPENINGS, COUNTS[len(wanted.things) - 1]), pick)


def _phrase(thing: WantedThing, pick: Pick) -> str:
    place = "" if thing.place is None else f" {_one(PLACE_WORDS[thing.place], pick)}"
    return f"{_article(_noun(thing, pick))}{place}"


def _noun(thing: WantedThing, pick: Pick) -> str:
    size = "" if thing.size is None else f"{_one(SIZE_WORDS[thing.size], pick)} "
    return f"{size}{thing.colour} {thing.shape}"


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _one(ways: Sequence[str], pick: Pick) -> str:
    return ways[pick(len(ways))]


def parse_caption(text: str) -> Wanted:
    """Read what a caption asks for.

    Args:
      text: Any caption of `write_caption`; case, spaces, articles and a full stop at
        the end are free.

    Returns:
      The things and their relation, as they were before they were said.

    Raises:
      InputError: If it says anything else, naming the part that is not understood.
    """
    plain = " ".join(text.lower().split()).removesuffix(".")
    plain = plain.replace("center", "centre")
    for opening in (*OPENINGS, *COUNTS):
        if opening and plain.startswith(opening):
            rest = plain.removeprefix(opening)
            wanted = _parse_body(rest, text)
            if opening in COUNTS and COUNTS.index(opening) + 1 != len(wanted.things):
                raise _unknown(text, plain)
            return wanted
    return _parse_body(plain, text)


def _parse_body(body: str, text: str) -> Wanted:
    if found := FRONT_PLACE.fullmatch(body):
        thing = _parse_phrase(found["noun"], text)
        if thing.place is not None:
            raise _unknown(text, body)
        place = _name_of(found["place"], PLACE_WORDS)
        return Wanted(things=(dataclasses.replace(thing, place=place),))
    if found := FRONT_RELATION.fullmatch(body) or RELATED.fullmatch(body):
        return Wanted(
            things=(
                _parse_phrase(found["subject"], text),
                _parse_phrase(found["other"], text),
            ),
            relation=_name_of(found["relation"], RELATION_WORDS),
        )
    parts = re.split(r"\s*,\s*and\s+|\s*,\s*|\s+and\s+", body)
    if len(parts) > MOST_THINGS:
        raise InputError(
            f"caption: got {len(parts)} things in {text!r}, wanted 1 to {MOST_THINGS}"
        )
    return Wanted(things=tuple(_parse_phrase(part, text) for part in parts))


def _parse_phrase(phrase: str, text: str) -> WantedThing:
    found = PHRASE.fullmatch(phrase)
    if found is None:
        raise _unknown(text, phrase)
    size, place = found["size"], found["place"]
    return WantedThing(
        shape=cast(ShapeName, found["shape"]),
        colour=cast(ColourName, found["colour"]),
        size=None if size is None else _name_of(size, SIZE_WORDS),
        place=None if place is None else _name_of(place, PLACE_WORDS),
    )


def _name_of(words: str, words_by_name: Mapping[_Name, tuple[str, ...]]) -> _Name:
    return next(name for name, ways in words_by_name.items() if words in ways)


def _unknown(text: str, part: str) -> InputError:
    of = "" if part == text else f" of {text!r}"
    return InputError(
        f"caption: cannot read {part!r}{of}, wanted up to {MOST_THINGS} things such as "
        "'a small red circle on the left' or 'a red circle above a blue square'; "
        f"colours {', '.join(COLOURS)}; shapes {', '.join(SHAPES)}"
    )


def _any(words_by_name: Mapping[_Name, tuple[str, ...]]) -> str:
    return "|".join(word for ways in words_by_name.values() for word in ways)


_PLACE = rf"(?P<place>{_any(PLACE_WORDS)})"
_RELATION = rf"(?P<relation>{_any(RELATION_WORDS)})"
PHRASE = re.compile(
    rf"(?:(?:an?|one|the) )?(?:(?P<size>{_any(SIZE_WORDS)}) )?"
    rf"(?P<colour>{'|'.join(COLOURS)}) (?P<shape>{'|'.join(SHAPES)})"
    rf"(?: (?:is )?{_PLACE})?"
)
FRONT_PLACE = re.compile(rf"{_PLACE}(?:,| there is) (?P<noun>.+)")
FRONT_RELATION = re.compile(rf"{_RELATION} (?P<other>.+) there is (?P<subject>.+)")
RELATED = re.compile(rf"(?P<subject>.+?) (?:is )?{_RELATION} (?P<other>.+)")
