"""Pictures that a user gives: read, checked, and laid on their canvas."""

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from ldm_jax.config import Config
from ldm_jax.sampling.sampling_config import SamplingConfig
from ldm_jax.types import InputError

MODE_BY_CHANNELS = {1: "L", 3: "RGB"}
MASK_MODES = ("1", "L")
WHITE = 255


class Canvas(NamedTuple):
    """What an edit begins with."""

    height: int
    """Of the image to make, in pixels."""
    width: int
    """Of it."""
    image: UInt8[np.ndarray, "h w c"] | None
    """The picture, or None."""
    mask: UInt8[np.ndarray, "h w 1"] | None
    """255 where it is made anew, or None."""
    digests: dict[str, str]
    """Of what was read, for the recipe."""


def lay_canvas(config: Config, settings: SamplingConfig) -> Canvas:
    """Read the pictures of a request and decide the size of what is made.

    Returns:
      The canvas.

    Raises:
      InputError: If a picture cannot be read, or has the wrong mode or size.
    """
    side = config.data.image_size
    if settings.image is None:
        height, width = settings.size or (side, side)
        check_size(config, height, width, flag="--size")
        return Canvas(height, width, None, None, {})
    modes = modes_of(config)
    image = read_picture(Path(settings.image), modes, flag="--image")
    digests = {"image_sha256": digest(image)}
    condition = config.diffusion.condition
    if condition.concat == "low_resolution":
        factor = condition.low_resolution_factor
        height, width = image.shape[0] * factor, image.shape[1] * factor
        check_size(config, height, width, flag="--image, enlarged")
        return Canvas(height, width, image, None, digests)
    mask = None
    if settings.mask is not None:
        mask = read_picture(Path(settings.mask), MASK_MODES, flag="--mask")
        digests["mask_sha256"] = digest(mask)
        if mask.shape[:2] != image.shape[:2]:
            raise InputError(
                f"--mask: got {size_text(mask)} pixels, wanted {size_text(image)} as "
                "the image"
            )
        mask = np.where(mask > WHITE // 2, WHITE, 0).astype(np.uint8)
    if settings.outpaint is not None:
        left, above, right, below = settings.outpaint
        added = ((above, below), (left, right), (0, 0))
        mask = np.pad(np.zeros_like(image[..., :1]), added, constant_values=WHITE)
        image = np.pad(image, added, mode="edge")
    flag = "--image" if settings.outpaint is None else "--image, outpainted"
    height, width = image.shape[:2]
    check_size(config, height, width, flag=flag)
    return Canvas(height, width, image, mask, digests)


def modes_of(config: Config) -> tuple[str, ...]:
    """Return the modes of the pictures that a model makes and takes."""
    return (MODE_BY_CHANNELS[config.data.image_channels],)


def read_picture(
    path: Path, modes: tuple[str, ...], *, flag: str
) -> UInt8[np.ndarray, "h w c"]:
    """Read a picture of one of several modes.

    Raises:
      InputError: If it cannot be read, or has another mode.
    """
    with reading(path, flag=flag), Image.open(path) as picture:
        found = picture.mode
        if found in modes:
            pixels = np.asarray(picture.convert("L") if found == "1" else picture)
            return pixels[..., None] if pixels.ndim == 2 else pixels
    raise InputError(
        f"{flag}: {path} has mode {found}, wanted {' or '.join(modes)}; convert it "
        "first"
    )


@contextmanager
def reading(path: Path, *, flag: str) -> Iterator[None]:
    """Turn whatever a picture's file may do wrong into an `InputError`.

    Pillow raises nearly anything for a damaged file, and only warns of a picture that
    is so large that it may be meant to fill the memory.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except FileNotFoundError:
        raise InputError(f"{flag}: no file {path}") from None
    except UnidentifiedImageError:
        raise InputError(f"{flag}: {path} is no picture, or a damaged one") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise InputError(
            f"{flag}: {path} is too large, wanted at most {Image.MAX_IMAGE_PIXELS} "
            "pixels"
        ) from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise InputError(f"{flag}: {path} cannot be read: {error}") from None


def check_size(config: Config, height: int, width: int, *, flag: str) -> None:
    """Raise `InputError` if a model cannot make images of a size."""
    depth = len(config.diffusion.channel_multipliers) - 1
    unit = config.autoencoder.downsampling * 2**depth
    if height % unit or width % unit or min(height, width) < unit:
        near = [max(unit, round(x / unit) * unit) for x in (height, width)]
        raise InputError(
            f"{flag}: got {height}x{width} pixels, wanted multiples of {unit}; try "
            f"{near[0]}x{near[1]}"
        )


def digest(pixels: np.ndarray) -> str:
    """Return the sha256 of a picture's shape and pixels."""
    return hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).hexdigest()


def size_text(pixels: np.ndarray) -> str:
    """Write a picture's height and width."""
    return f"{pixels.shape[0]}x{pixels.shape[1]}"
