"""Image files: their headers, and their pixels as an image viewer shows them.

Every image that a user, a data set or metadata names is opened here. It must be a
regular file of an accepted format, and its header states the size, so that a pipe, a
device and a decompression bomb are refused before anything waits or memory is
allocated. Pixels are oriented by EXIF, with transparency on white, in eight bits a
channel. Colour profiles are not applied.
"""

import contextlib
import functools
import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError, features

SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif"),
    *(".gif", ".bmp", ".tif", ".tiff"),
)
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF")
"""Accepted formats, by content, not by name."""

MAX_PIXELS = 2**26
"""Largest image: 192 MiB as RGB."""
MAX_SIDE = 16_384
MAX_ASPECT = 20.0
"""Largest ratio of the sides: of longer strips, the square crop keeps too little."""

GREY_MODES = ("1", "L", "LA", "La")
WIDE_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")
"""Modes of 16-bit grey."""
BLACK, WHITE = 0, 255
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
"""Transposition that undoes each EXIF orientation; 1 is upright."""

PNG_SIGNATURE, JPEG_END = 8, b"\xff\xd9"


class BrokenImageError(Exception):
    """An image that is unreadable or refused; the message is the reason."""


class Stamp(NamedTuple):
    """Size and time of a file, which change when it is rewritten."""

    size: int
    """Bytes."""
    changed: int
    """Time of the last change, in nanoseconds."""


class Header(NamedTuple):
    """Header of an image file."""

    height: int
    """Stored height in pixels, before the EXIF orientation."""
    width: int
    """Stored width in pixels."""
    mode: str
    """Pillow's name of the channels."""
    format: str
    """Pillow's name of the file format."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the pixels as `read_image` returns them."""
        return self.height * self.width * (1 if self.is_grey else 3)

    @property
    def is_grey(self) -> bool:
        """Whether the image has one channel."""
        return self.mode in GREY_MODES + WIDE_MODES


@functools.lru_cache(maxsize=2**20)
def read_header(path: Path, stamp: Stamp) -> Header:
    """Read an image's header, and check that its file is not truncated.

    Args:
      stamp: Stamp of the file: the result is cached until it changes.

    Raises:
      BrokenImageError: If it is no image, too large, or truncated.
      OSError: If the file cannot be opened.
    """
    with open_image(path, most_aspect=MAX_ASPECT) as picture:
        width, height = picture.size
        header = Header(height, width, picture.mode, str(picture.format))
    with path.open("rb") as file:
        ends = _ends(file, header.format, stamp.size)
    if not ends:  # may still be whole: the decoder decides
        read_image(path)
    return header


@functools.lru_cache(maxsize=2**20)
def check_image(path: Path, stamp: Stamp) -> None:
    """Check that an image can be decoded.

    Args:
      stamp: Stamp of the file: the result is cached until it changes.

    Raises:
      BrokenImageError: If it cannot.
      OSError: If the file cannot be opened.
    """
    read_image(path)


def read_image(
    path: Path, *, most_aspect: float = MAX_ASPECT
) -> UInt8[np.ndarray, "h w c"]:
    """Read an image as a viewer shows it; of an animation, the first frame.

    Args:
      most_aspect: Largest ratio of its sides.

    Returns:
      Grey or RGB. Sixteen-bit grey is scaled to eight bits and rounded.

    Raises:
      BrokenImageError: If it cannot be decoded, is too large, or has floating values.
      OSError: If the file cannot be opened.
    """
    with open_image(path, most_aspect=most_aspect) as picture:
        return _pixels(_upright(picture), background=WHITE)


def read_mask(path: Path) -> UInt8[np.ndarray, "h w 1"]:
    """Read a mask as grey levels, upright; transparent pixels are black.

    Sixteen-bit levels are scaled to eight bits, unless they are 0 and 1.

    Raises:
      BrokenImageError: As `read_image`.
      OSError: If the file cannot be opened.
    """
    with open_image(path, most_aspect=MAX_ASPECT) as picture:
        upright = _upright(picture)
        if picture.mode in WIDE_MODES and (levels := np.asarray(upright)).max() == 1:
            return levels.astype(np.uint8)[..., None]
        pixels = _pixels(upright, background=BLACK)
    return to_channels(pixels, 1)


def to_picture(image: UInt8[np.ndarray, "h w c"], channels: int) -> Image.Image:
    """Convert a grey or RGB array to a picture of 1 or 3 channels."""
    grey = image.shape[-1] == 1
    picture = Image.fromarray(image[..., 0] if grey else image)
    return picture.convert("L" if channels == 1 else "RGB")


def to_channels(
    image: UInt8[np.ndarray, "h w c"], channels: int
) -> UInt8[np.ndarray, "h w d"]:
    """Convert a grey or RGB array to 1 or 3 channels, as training images are."""
    if image.shape[-1] == channels:
        return image
    pixels = np.asarray(to_picture(image, channels), np.uint8)
    return pixels.reshape(*image.shape[:2], channels)


@contextlib.contextmanager
def open_image(path: Path, *, most_aspect: float = math.inf) -> Iterator[Image.Image]:
    """Open an image of an accepted format and size, not decoded yet.

    Args:
      most_aspect: Largest ratio of its sides.

    Raises:
      BrokenImageError: If it is no regular file, no such image, or is damaged where the
        caller reads it.
      OSError: If the file cannot be opened.
    """
    if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
        raise BrokenImageError("not a regular file")
    try:
        with Image.open(path, formats=FORMATS) as picture:
            _check_size(*picture.size, most_aspect=most_aspect)
            yield picture
    except BrokenImageError:
        raise
    except UnidentifiedImageError:
        raise BrokenImageError(_unidentified(path)) from None
    except Image.DecompressionBombError:
        raise BrokenImageError(f"more than {MAX_PIXELS:,} pixels") from None
    except Exception as error:  # Pillow raises many types for damaged files
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BrokenImageError(reason[:120]) from None


def _unidentified(path: Path) -> str:
    """Say why a file is not taken for an image."""
    if path.stat().st_size == 0:
        return "an empty file"
    if path.suffix.lower() == ".avif" and not features.check("avif"):
        return "AVIF, which this Pillow was built without"
    return "not an image, or its head is damaged"


def _check_size(width: int, height: int, *, most_aspect: float) -> None:
    got = f"{width}x{height} pixels"
    if width * height > MAX_PIXELS:
        raise BrokenImageError(f"{got}, wanted at most {MAX_PIXELS:,} in all")
    if max(width, height) > MAX_SIDE:
        raise BrokenImageError(f"{got}, wanted at most {MAX_SIDE:,} a side")
    if max(width, height) > most_aspect * min(width, height):
        raise BrokenImageError(f"{got}, wanted at most {most_aspect:g} to 1")


def _ends(file: BinaryIO, image_format: str, size: int) -> bool:
    """Return whether a file ends as its format does; False if that is not known."""
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
    except Exception:  # viewers ignore damaged EXIF
        return 1


def _upright(picture: Image.Image) -> Image.Image:
    """Decode a picture, and turn it as its EXIF says."""
    picture.load()
    rotate = ORIENTATIONS.get(_orientation(picture))
    return picture if rotate is None else picture.transpose(rotate)


def _pixels(picture: Image.Image, *, background: int) -> UInt8[np.ndarray, "h w c"]:
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
        blend = colour * alpha + background * (WHITE - alpha)  # at most 255**2
        pixels = ((blend + WHITE // 2) // WHITE).astype(np.uint8)
        return pixels[..., :1] if is_grey else pixels
    pixels = np.asarray(picture.convert("L" if is_grey else "RGB"), np.uint8)
    return pixels[..., None] if is_grey else pixels
