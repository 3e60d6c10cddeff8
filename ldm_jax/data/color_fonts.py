"""Colour bitmaps out of a font file: which code points it has, and their pictures."""

import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
from fontTools.ttLib import TTFont, TTLibError
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont, features

from ldm_jax.types import InputError

FONT_VARIABLE = "EMOJI_FONT"
FONT_NAME = "NotoColorEmoji.ttf"
FONT_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts")
SAMPLE = "\N{GRINNING FACE}"
"""As wide as every other picture."""
OF_DAMAGED_TABLES = (
    AssertionError,
    AttributeError,
    KeyError,
    ValueError,
    TypeError,
    struct.error,
)
"""What fontTools raises of them beside its own errors."""
HOW_TO_GET = f"try: apt-get install fonts-noto-color-emoji, or {FONT_VARIABLE}=FILE"


def find_font() -> Path:
    """Find the colour-emoji font of this machine.

    Returns:
      $EMOJI_FONT, or Noto Color Emoji where systems keep their fonts.

    Raises:
      InputError: If it is not there.
    """
    named = os.environ.get(FONT_VARIABLE)
    if named:
        if not Path(named).is_file():
            raise InputError(f"{FONT_VARIABLE}: no file {named}; {HOW_TO_GET}")
        return Path(named)
    for folder in FONT_FOLDERS:
        found = sorted(Path(folder).expanduser().rglob(FONT_NAME))
        if found:
            return found[0]
    raise InputError(
        f"data.source: no font {FONT_NAME} in {', '.join(FONT_FOLDERS)}; {HOW_TO_GET}"
    )


class ColorFont:
    """A font with colour bitmaps (tables CBDT and CBLC).

    Attributes:
      code_points: What it has a glyph for, alone.
    """

    def __init__(self, path: Path) -> None:
        """Open a font.

        Args:
          path: The file.

        Raises:
          InputError: If it is no font, has no colour bitmaps, or cannot be laid out.
        """
        if not features.check("raqm"):
            raise InputError(
                f"{FONT_VARIABLE}: this Pillow lays out no sequences of code points "
                "(no raqm); try pip install --force-reinstall pillow"
            )
        try:
            with path.open("rb") as file, TTFont(file, lazy=True) as opened:
                missing = [name for name in ("CBDT", "CBLC") if name not in opened]
                if missing:
                    raise InputError(
                        f"{FONT_VARIABLE}: {path} has no colour bitmaps (no table "
                        f"{' and '.join(missing)}); {HOW_TO_GET}"
                    )
                tables: Any = opened  # fontTools makes its tables' fields as it reads
                self.code_points = frozenset(tables["cmap"].getBestCmap())
                strikes = tables["CBLC"].strikes
                ppem = max(strike.bitmapSizeTable.ppemX for strike in strikes)
        except (TTLibError, OSError, *OF_DAMAGED_TABLES) as error:
            raise InputError(
                f"{FONT_VARIABLE}: {path} is no font that can be read ({error}); "
                f"{HOW_TO_GET}"
            ) from None
        raqm = ImageFont.Layout.RAQM
        self._font: Any = ImageFont.truetype(path, ppem, layout_engine=raqm)
        self._advance = self._font.getlength(SAMPLE)

    def joins(self, sequence: str) -> bool:
        """Say whether a sequence of code points is one picture."""
        return 0 < self._font.getlength(sequence) < 2 * self._advance

    def draw(self, sequence: str, *, pixels: int) -> UInt8[np.ndarray, "h h 3"]:
        """Draw a sequence that is one picture, on white.

        Args:
          sequence: Code points that `joins` joins.
          pixels: Side of the picture.

        Returns:
          The bitmap in the middle of a square, resized (Lanczos).
        """
        left, top, right, bottom = self._font.getbbox(sequence)
        width, height = int(right - left), int(bottom - top)
        side = max(width, height)
        canvas = Image.new("RGBA", (side, side), (255, 255, 255, 255))
        corner = (side - width) // 2 - left, (side - height) // 2 - top
        drawn = ImageDraw.Draw(canvas)
        drawn.text(corner, sequence, font=self._font, embedded_color=True)
        small = canvas.convert("RGB").resize((pixels, pixels), Image.Resampling.LANCZOS)
        return np.asarray(small, np.uint8)
