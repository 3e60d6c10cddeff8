"""A contact sheet: images of a folder on one page, each with its label.

Images are whole, and dimmed outside of their middle square, which training crops by
default.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from ldm_jax.data.image_files import read_image

COLUMNS, ROWS = 8, 8
TILE = 144
"""Longest side of a thumbnail, in pixels."""
GAP, MARGIN = 12, 20
FONT_SIZE, LINE = 12, 16
LABEL_LINES = 2
PAPER, FRAME = (250, 250, 248), (225, 225, 225)
INK, PALE_INK = (40, 40, 40), (130, 130, 130)
DIMMED = 0.35
"""Opacity outside of the square."""


Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def choose(names: Sequence[str], num: int = COLUMNS * ROWS) -> list[str]:
    """Choose at most `num` images, evenly spread over a list."""
    if len(names) <= num:
        return list(names)
    return [names[int(place)] for place in np.linspace(0, len(names) - 1, num).round()]


def draw_sheet(
    root: Path, names: Sequence[str], *, title: str, labels: Mapping[str, str]
) -> UInt8[np.ndarray, "h w 3"]:
    """Draw a contact sheet.

    Args:
      root: Folder of the images.
      names: Readable images.
      title: Heading.
      labels: Text below each image, cut after two lines.
    """
    columns = max(1, min(COLUMNS, len(names)))
    rows = -(-len(names) // columns)
    cell_w, cell_h = TILE + GAP, TILE + (LABEL_LINES + 1) * LINE + GAP
    head = MARGIN + LINE + GAP
    size = (2 * MARGIN + columns * cell_w - GAP, head + rows * cell_h - GAP + MARGIN)
    page = Image.new("RGB", size, PAPER)
    font = ImageFont.load_default(FONT_SIZE)
    heading = _fitted(_drawable(title), font, size[0] - 2 * MARGIN)
    ImageDraw.Draw(page).text((MARGIN, MARGIN), heading, INK, font)
    for i, name in enumerate(names):
        left = MARGIN + i % columns * cell_w
        top = head + i // columns * cell_h
        image, label = read_image(root / name), labels.get(name) or name
        _draw_cell(page, (left, top), image, label, font)
    return np.asarray(page)


def _draw_cell(
    page: Image.Image,
    corner: tuple[int, int],
    image: UInt8[np.ndarray, "h w c"],
    label: str,
    font: Font,
) -> None:
    draw, (left, top) = ImageDraw.Draw(page), corner
    thumbnail = _thumbnail(image)
    width, height = thumbnail.size
    x, y = left + (TILE - width) // 2, top + (TILE - height) // 2
    page.paste(thumbnail, (x, y))
    draw.rectangle((x - 1, y - 1, x + width, y + height), outline=FRAME)
    lines = [(line, INK) for line in _wrapped(label, font)]
    lines.append((f"{image.shape[1]} x {image.shape[0]}", PALE_INK))
    for i, (text, ink) in enumerate(lines):
        draw.text((left, top + TILE + 3 + i * LINE), text, ink, font)


def _thumbnail(image: UInt8[np.ndarray, "h w c"]) -> Image.Image:
    """Resize an image to a tile, by whole pixels if enlarged; dim it off the square."""
    grey = image.shape[-1] == 1
    picture = Image.fromarray(image[..., 0] if grey else image).convert("RGB")
    scale = TILE / max(picture.size)
    if scale >= 1:
        width, height = (int(scale) * side for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.NEAREST)
    else:
        width, height = (max(1, round(side * scale)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    square = (left, top, left + side, top + side)
    paper = Image.new("RGB", picture.size, PAPER)
    sheet = Image.blend(paper, picture, DIMMED)
    sheet.paste(picture.crop(square), square)
    return sheet


def _wrapped(text: str, font: Font) -> list[str]:
    """Break a text into lines of a tile's width; the last one is cut to fit."""
    lines = [""]
    for word in _drawable(text).split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= TILE or len(lines) == LABEL_LINES:
            lines[-1] = longer
        else:
            lines.append(word)
    return [_fitted(line, font, TILE) for line in lines]


def _fitted(text: str, font: Font, width: int) -> str:
    """Cut a text to a width, with dots at its end."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text.rstrip()}..."


def _drawable(text: str) -> str:
    """Replace bytes of a file name that are not text, which no font has."""
    return text.encode("utf-8", "replace").decode()
