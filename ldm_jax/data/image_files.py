"""Files of images: looked at before they are decoded, then read as plain pixels.

A header tells format, mode and size, so that a decompression bomb is refused before
memory is given to it. What is read is what a viewer shows: turned as its EXIF says,
transparency on white, eight bits a channel. Colour profiles are not applied.
"""

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""What a file may be, whatever it is called."""

MAX_PIXELS = 2**26
"""Of an image: 192 MiB as RGB."""
MAX_SIDE = 16_384
MAX_ASPECT = 20
"""Longer side over the shorter: what is left of a longer strip is no image of it."""

GREY_MODES = ("1", "L", "LA", "La")
WIDE_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")
"""Grey of 16 bits."""
WHITE = 255
WIDE_WHITE = 65_535
WIDE_STEP = WIDE_WHITE // WHITE

ORIENTATION = 0x0112
ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each orientation of EXIF; 1 is upright."""

PNG_SIGNATURE, JPEG_END = 8, b"\xff\xd9"


class BrokenImageError(Exception):
    """An image that cannot be read, or is refused: why, in a few words."""


class Stamp(NamedTuple):
    """What tells that a file was written anew."""

    size: int
    """In bytes."""
    changed: int
    """Time of its last change, in nanoseconds."""


class Header(NamedTuple):
    """What is known of an image before it is decoded."""

    height: int
    """In pixels, as stored: before its EXIF turns it."""
    width: int
    """Likewise."""
    mode: str
    """Pillow's name for its channels."""
    format: str
    """Of the file, by its content."""

    @property
    def num_bytes(self) -> int:
        """Bytes of its pixels once they are read."""
        return self.height * self.width * (1 if self.is_grey else 3)

    @property
    def is_grey(self) -> bool:
        """Whether it is read as one channel."""
        return self.mode in GREY_MODES + WIDE_MODES


@functools.lru_cache(maxsize=2**20)
def read_header(path: Path, stamp: Stamp) -> Header:
    """Read an image's header and see that its file does not end early.

    Args:
      path: The file.
      stamp: Of it; a file is looked at again only once this has changed.

    Returns:
      The header.

    Raises:
      BrokenImageError: If it is no image, is too large, or ends early.
      OSError: If the file cannot be opened.
    """
    with _opened(path) as picture:
        width, height = picture.size
        header = Header(height, width, picture.mode, str(picture.format))
    with path.open("rb") as file:
        ends = _ends(file, header.format, stamp.size)
    if not ends:  # it may still be whole: the decoder knows
        read_image(path)
    return header


@functools.lru_cache(maxsize=2**20)
def check_image(path: Path, stamp: Stamp) -> None:
    """Decode an image, to see that it can be.

    Args:
      path: The file.
      stamp: Of it; a file is looked at again only once this has changed.

    Raises:
      BrokenImageError: If it cannot.
      OSError: If the file cannot be opened.
    """
    read_image(path)


def read_image(path: Path) -> UInt8[np.ndarray, "h w c"]:
    """Read an image as a viewer shows it.

    Args:
      path: The file; of an animation, the first frame is read.

    Returns:
      Grey or RGB. Sixteen bits of grey are scaled to eight and rounded.

    Raises:
      BrokenImageError: If it cannot be read, is too large, or has channels that have
        no colour by themselves.
      OSError: If the file cannot be opened.
    """
    with _opened(path) as picture:
        picture.load()
        rotate = ORIENTATIONS.get(_orientation(picture))
        return _pixels(picture if rotate is None else picture.transpose(rotate))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open an image of an allowed format and size; name whatever is wrong with it."""
    try:
        with Image.open(path, formats=FORMATS) as picture:
            _check_size(*picture.size)
            yield picture
    except BrokenImageError:
        raise
    except UnidentifiedImageError:
        empty = path.stat().st_size == 0
        reason = "an empty file" if empty else "not an image, or its head is damaged"
        raise BrokenImageError(reason) from None
    except Image.DecompressionBombError:
        raise BrokenImageError(f"more than {MAX_PIXELS:,} pixels") from None
    except Exception as error:  # Pillow raises nearly anything for a damaged file
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BrokenImageError(reason[:120]) from None


def _check_size(width: int, height: int) -> None:
    got = f"{width}x{height} pixels"
    if width * height > MAX_PIXELS:
        raise BrokenImageError(f"{got}, wanted at most {MAX_PIXELS:,} in all")
    if max(width, height) > MAX_SIDE:
        raise BrokenImageError(f"{got}, wanted at most {MAX_SIDE:,} a side")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BrokenImageError(f"{got}, wanted at most {MAX_ASPECT} to 1")


def _ends(file: BinaryIO, image_format: str, size: int) -> bool:
    """Say whether a file ends as its format does; False where that is not known."""
    match image_format:
        case "PNG":
            file.seek(PNG_SIGNATURE)
            while len(head := file.read(8)) == 8:
                if head[4:] == b"IEND":
                    return True
                after_checksum = int.from_bytes(head[:4], "big") + 4
                file.seek(after_checksum, os.SEEK_CUR)
            return False
        case "JPEG" | "MPO":
            file.seek(-len(JPEG_END), os.SEEK_END)
            return file.read() == JPEG_END
        case "WEBP":
            file.seek(4)
            return int.from_bytes(file.read(4), "little") + 8 <= size
        case _:
            return False


def _orientation(picture: Image.Image) -> int:
    try:
        return int(picture.getexif().get(ORIENTATION, 1))
    except Exception:  # an image with damaged EXIF is shown as it is stored
        return 1


def _pixels(picture: Image.Image) -> UInt8[np.ndarray, "h w c"]:
    if picture.mode in WIDE_MODES:
        levels = np.asarray(picture).astype(np.int64)
        if levels.min() < 0 or levels.max() > WIDE_WHITE:
            raise BrokenImageError(f"grey beyond 0 to {WIDE_WHITE}")
        return ((levels + WIDE_STEP // 2) // WIDE_STEP).astype(np.uint8)[..., None]
    if picture.mode == "F":
        raise BrokenImageError("grey as floats, wanted 8 or 16 bits")
    is_grey = picture.mode in GREY_MODES
    if picture.has_transparency_data:
        layers = np.asarray(picture.convert("RGBA")).astype(np.uint16)
        colour, alpha = layers[..., :3], layers[..., 3:]
        blend = colour * alpha + WHITE * (WHITE - alpha)  # at most 255**2
        pixels = ((blend + WHITE // 2) // WHITE).astype(np.uint8)
        return pixels[..., :1] if is_grey else pixels
    pixels = np.asarray(picture.convert("L" if is_grey else "RGB"), np.uint8)
    return pixels[..., None] if is_grey else pixels
