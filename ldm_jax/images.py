"""Images as arrays, grids and PNG files."""

import io
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image, PngImagePlugin

from ldm_jax.files import write_file

GAP = 2
BACKGROUND = 32
MIN_TILE = 64


def to_float(images: UInt8[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Map uint8 to float32 in [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(images: Float[np.ndarray, "b h w c"]) -> UInt8[np.ndarray, "b h w c"]:
    """Map [-1, 1] to uint8, clipped and rounded (never truncated), on the host."""
    levels = (np.clip(images, -1.0, 1.0) + 1.0) * 127.5
    return np.rint(levels).astype(np.uint8)


def grid(
    images: UInt8[np.ndarray, "b h w c"], *, columns: int
) -> UInt8[np.ndarray, "h2 w2 c"]:
    """Lay images out in rows, left to right; small ones are enlarged pixel by pixel.

    Args:
      images: All of one size.
      columns: Images a row; the last row may be short.

    Returns:
      One image with a thin gap around every cell.
    """
    num, height, width, channels = images.shape
    scale = max(1, -(-MIN_TILE // max(height, width)))
    tiles = images.repeat(scale, axis=1).repeat(scale, axis=2)
    rows = -(-num // columns)
    cell_h, cell_w = height * scale + GAP, width * scale + GAP
    shape = (rows * cell_h + GAP, columns * cell_w + GAP, channels)
    canvas = np.full(shape, BACKGROUND, np.uint8)
    for i, tile in enumerate(tiles):
        top, left = GAP + i // columns * cell_h, GAP + i % columns * cell_w
        canvas[top : top + height * scale, left : left + width * scale] = tile
    return canvas


def write_png(
    path: Path,
    image: UInt8[np.ndarray, "h w c"],
    texts: Mapping[str, str] | None = None,
) -> None:
    """Write a PNG with text chunks atomically.

    Args:
      path: The file; replaced if it exists.
      image: Grey or RGB.
      texts: Text chunks by keyword.

    Raises:
      OSError: If it cannot be written.
    """
    content = encode_png(image, texts)
    write_file(path, lambda file: file.write(content))


def encode_png(
    image: UInt8[np.ndarray, "h w c"], texts: Mapping[str, str] | None = None
) -> bytes:
    """Encode an image as a PNG with text chunks, as `write_png` writes it."""
    info = PngImagePlugin.PngInfo()
    for keyword, text in (texts or {}).items():
        info.add_text(keyword, text)
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    encoded = io.BytesIO()
    picture.save(encoded, format="PNG", pnginfo=info)
    return encoded.getvalue()


def read_png(path: Path) -> UInt8[np.ndarray, "h w c"]:
    """Read a PNG that `write_png` wrote; others are read by `data.image_files`."""
    with Image.open(path, formats=("PNG",)) as picture:
        pixels = np.asarray(picture, np.uint8)
    return pixels[..., None] if pixels.ndim == 2 else pixels
