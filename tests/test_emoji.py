"""Emoji: found in a colour font, named, drawn, and kept apart from training."""

import matplotlib
import numpy as np
import pytest
from fontTools.ttLib import TTFont

from ldm_jax.data.color_fonts import FONT_VARIABLE, ColorFont, find_font
from ldm_jax.data.emoji import JOINER, PEOPLE, ROLES, TONES, list_emoji
from ldm_jax.data.sources import open_source, read_captions
from ldm_jax.types import InputError
from tests.color_font import write_color_font

BALLOON, HAND, DIGIT = "\U0001f388", "\U0001f44b", "7"
WOMAN = PEOPLE["woman"]
PILOT = WOMAN + JOINER + ROLES["pilot"]
RED, BLUE = (220, 10, 20, 255), (10, 30, 200, 255)


@pytest.fixture(scope="module")
def font_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("font") / "squares.ttf"
    toned = {
        HAND + tone: (200, 40 * i, 0, 255) for i, tone in enumerate(TONES.values())
    }
    write_color_font(
        path,
        {
            **{BALLOON: RED, HAND: BLUE, DIGIT: RED, WOMAN: RED, PILOT: BLUE},
            **{ROLES["pilot"]: RED, **toned},
        },
    )
    return path


def test_pictures_are_those_of_the_font_on_white(font_path):
    picture = ColorFont(font_path).draw(BALLOON, pixels=20)
    assert picture.shape == (20, 20, 3)
    assert np.all(picture[4:16] == RED[:3])  # 20 wide and 16 high, in the middle
    assert np.all(picture[:1] == 255) and np.all(picture[-1:] == 255)


@pytest.mark.parametrize("lost", ["characters", "table"])
def test_a_font_without_characters_is_told(font_path, tmp_path, lost):
    path = tmp_path / "damaged.ttf"
    with TTFont(font_path) as font:
        if lost == "table":
            del font["cmap"]
        else:
            font["cmap"].tables = []
        font.save(path)
    with pytest.raises(InputError, match=r"damaged\.ttf is no font that can be read"):
        ColorFont(path)


def test_sequences_are_one_picture_or_none(font_path):
    font = ColorFont(font_path)
    assert font.joins(BALLOON) and font.joins(PILOT)
    assert font.joins(HAND + TONES["dark skin tone"])
    assert not font.joins(BALLOON + TONES["dark skin tone"])
    picture = font.draw(HAND + TONES["medium skin tone"], pixels=16)
    assert np.all(picture[4:12] == (200, 80, 0))


def test_names_are_unicodes_and_one_tone_of_five_is_held_out(font_path):
    found = {emoji.caption: emoji for emoji in list_emoji(ColorFont(font_path))}
    tones = [f"waving hand sign, {tone}" for tone in TONES]
    others = {"airplane", "balloon", "waving hand sign", "woman", "woman pilot"}
    assert set(found) == others | set(tones)
    assert [found[name].split for name in tones].count("held_out") == 1
    assert found["balloon"].split == found["waving hand sign"].split == "train"
    assert found["woman pilot"].sequence == PILOT
    assert {found[name].subject for name in tones} == {"waving hand sign"}


def test_a_data_set_is_made_of_the_font(font_path, tmp_path, monkeypatch):
    monkeypatch.setenv(FONT_VARIABLE, str(font_path))
    directory = str(tmp_path)
    train = open_source("tfds:emoji/32", "train", directory=directory)
    captions = read_captions("tfds:emoji/32", "train", directory=directory)
    held_out = read_captions("tfds:emoji/32", "held_out", directory=directory)
    assert len(train.examples) == len(captions) == 9
    assert len(held_out) == 1 and not set(held_out) & set(captions)
    shown = train.examples[captions.index("balloon")]["image"]
    assert np.array_equal(shown, ColorFont(font_path).draw(BALLOON, pixels=32))
    # What is prepared needs no font any more.
    monkeypatch.setenv(FONT_VARIABLE, str(tmp_path / "gone.ttf"))
    again = open_source("tfds:emoji/32", "train", directory=directory)
    assert len(again.examples) == 9


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("missing", r"EMOJI_FONT: no file .*gone\.ttf; try: apt-get install"),
        ("text", r"EMOJI_FONT: .* is no font that can be read \(.*\); try:"),
        ("plain", r"EMOJI_FONT: .*DejaVuSans\.ttf has no colour bitmaps"),
    ],
)
def test_a_font_that_will_not_do_is_named(kind, told, tmp_path, monkeypatch):
    (tmp_path / "text.ttf").write_text("no font at all")
    plain = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"
    paths = {"missing": tmp_path / "gone.ttf", "text": tmp_path / "text.ttf"}
    monkeypatch.setenv(FONT_VARIABLE, str(paths.get(kind, plain)))
    with pytest.raises(InputError, match=told):
        open_source("tfds:emoji/32", "train", directory=str(tmp_path))


def test_a_machine_without_the_font_is_told_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.delenv(FONT_VARIABLE, raising=False)
    folder = str(tmp_path)
    monkeypatch.setattr("ldm_jax.data.color_fonts.FONT_FOLDERS", (folder,))
    with pytest.raises(
        InputError, match=r"no font NotoColorEmoji\.ttf in .*; try: apt"
    ):
        find_font()
