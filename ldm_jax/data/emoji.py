"""Which emoji there are, what they are called, and which are kept from training.

A name is Unicode's own for the first code point, in small letters, and words for what
modifies it: "waving hand sign, dark skin tone", "woman astronaut, light skin tone".
"""

import unicodedata
from collections.abc import Iterator
from typing import Literal, NamedTuple

from ldm_jax.data.color_fonts import ColorFont

Split = Literal["train", "held_out"]

JOINER, AS_PICTURE = "\u200d", "\ufe0f"
TONES = {
    "light skin tone": "\U0001f3fb",
    "medium-light skin tone": "\U0001f3fc",
    "medium skin tone": "\U0001f3fd",
    "medium-dark skin tone": "\U0001f3fe",
    "dark skin tone": "\U0001f3ff",
}
SIGNS = {"woman": "\u2640", "man": "\u2642"}
PEOPLE = {"man": "\U0001f468", "woman": "\U0001f469", "person": "\U0001f9d1"}
ROLES = {
    "health worker": "\u2695",
    "judge": "\u2696",
    "pilot": "\u2708",
    "farmer": "\U0001f33e",
    "cook": "\U0001f373",
    "student": "\U0001f393",
    "singer": "\U0001f3a4",
    "artist": "\U0001f3a8",
    "teacher": "\U0001f3eb",
    "factory worker": "\U0001f3ed",
    "technologist": "\U0001f4bb",
    "office worker": "\U0001f4bc",
    "mechanic": "\U0001f527",
    "scientist": "\U0001f52c",
    "astronaut": "\U0001f680",
    "firefighter": "\U0001f692",
    "with red hair": "\U0001f9b0",
    "with curly hair": "\U0001f9b1",
    "with no hair": "\U0001f9b2",
    "with white hair": "\U0001f9b3",
}
"""What a person is, by what is joined to it.

Source:
  Unicode Technical Standard 51, "Emoji ZWJ sequences"; names of the CLDR.
"""
RANGES = ((0x2100, 0xDFFF), (0x1F000, 0x1FFFF))
"""Where pictures are: no letters, digits, marks, or private code points."""
PARTS = frozenset(
    [
        *range(0x1F1E6, 0x1F200),  # letters of flags
        *(ord(tone) for tone in TONES.values()),
    ]
)
"""Code points that are no emoji of their own."""
HELD_OUT_ONE_IN = 5


class Emoji(NamedTuple):
    """One picture and its name.

    Attributes:
      sequence: Code points.
      caption: Name.
      subject: Name without the skin tone.
      split: `held_out` for combinations that training never sees, though it sees each
        part of them: a subject in one of five skin tones, and one kind of person of
        every fifth role.
    """

    sequence: str
    caption: str
    subject: str
    split: Split


class Subject(NamedTuple):
    """A sequence that skin tones may follow, and what follows them.

    Attributes:
      head: What a tone is put behind.
      tail: What is joined behind that.
      name: Of the whole.
      held_out: Whether training sees it in no tone.
    """

    head: str
    tail: str
    name: str
    held_out: bool = False


def list_emoji(font: ColorFont) -> list[Emoji]:
    """List the pictures of a font: single ones, toned, gendered, and people's roles.

    Flags and families are left out: their code points do not name them.

    Args:
      font: Where they are.

    Returns:
      The emoji, in an order that is a function of the font alone.
    """
    found: list[Emoji] = []
    for rank, subject in enumerate(_subjects(font)):
        plain = subject.head + subject.tail
        split: Split = "held_out" if subject.held_out else "train"
        found.append(Emoji(plain, subject.name, subject.name, split))
        for place, (name, tone) in enumerate(TONES.items()):
            sequence = subject.head.removesuffix(AS_PICTURE) + tone + subject.tail
            if not font.joins(sequence):
                break
            hidden = subject.held_out or (rank + place) % HELD_OUT_ONE_IN == 0
            split = "held_out" if hidden else "train"
            found.append(
                Emoji(sequence, f"{subject.name}, {name}", subject.name, split)
            )
    return found


def _subjects(font: ColorFont) -> Iterator[Subject]:
    for code in sorted(font.code_points):
        name = unicodedata.name(chr(code), "").lower()
        within = any(first <= code <= last for first, last in RANGES)
        # A newer font has code points that this Python has no name for.
        if not within or code in PARTS or not name:
            continue
        yield Subject(chr(code), "", name)
        for sign, mark in SIGNS.items():
            tail = JOINER + mark + AS_PICTURE
            if font.joins(chr(code) + tail):
                yield Subject(chr(code), tail, f"{name}, {sign}")
    for rank, (role, mark) in enumerate(ROLES.items()):
        for place, (person, head) in enumerate(PEOPLE.items()):
            for tail in (JOINER + mark, JOINER + mark + AS_PICTURE):
                if font.joins(head + tail):
                    hidden = rank % HELD_OUT_ONE_IN == place
                    yield Subject(head, tail, f"{person} {role}", hidden)
                    break
