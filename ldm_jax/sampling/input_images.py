"""Images and masks of a user, read and checked."""

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from ldm_jax.data import image_files
from ldm_jax.data.image_files import (
    BLACK,
    MAX_ASPECT,
    MAX_PIXELS,
    MAX_SIDE,
    WHITE,
    BrokenImageError,
    to_channels,
)
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.sampling.sampling_config import SamplingConfig
from ldm_jax.types import InputError


class InputImages(NamedTuple):
    """Image and mask of an edit, and the size of the images to make."""

    height: int
    """Height of the images to make, in pixels."""
    width: int
    """Width of the images to make, in pixels."""
    image: UInt8[np.ndarray, "h w c"] | None
    """The image, or None."""
    mask: UInt8[np.ndarray, "h w 1"] | None
    """255 where the image is sampled, 0 elsewhere; or None."""
    digests: dict[str, str]
    """sha256 of each file that was read, for the metadata."""


def read_input_images(model: LatentDiffusion, settings: SamplingConfig) -> InputImages:
    """Read the image and mask that settings name.

    Raises:
      InputError: If a file cannot be read, or has the wrong mode or size.
    """
    if settings.image is None:
        height, width = settings.size or model.image_shape[:2]
        check_size(model, height, width, flag="--size")
        return InputImages(height, width, None, None, {})
    image = read_image(Path(settings.image), flag="--image")
    image = to_channels(image, model.image_shape[-1])
    digests = {"image_sha256": digest(image)}
    if model.condition.concat == "low_resolution":
        factor = model.condition.low_resolution_factor
        height, width = image.shape[0] * factor, image.shape[1] * factor
        check_size(model, height, width, flag="--image, upscaled")
        return InputImages(height, width, image, None, digests)
    mask = None
    if settings.mask is not None:
        path = Path(settings.mask)
        with reading(path, flag="--mask"):
            levels = image_files.read_mask(path)
        digests["mask_sha256"] = digest(levels)
        if levels.shape[:2] != image.shape[:2]:
            raise InputError(
                f"--mask: got {size_text(levels)} pixels, wanted {size_text(image)} as "
                "the image"
            )
        mask = binary_mask(levels, path)
    left, above, right, below = settings.outpaint or (0, 0, 0, 0)
    height, width = image.shape[0] + above + below, image.shape[1] + left + right
    flag = "--image" if settings.outpaint is None else "--image, outpainted"
    check_size(model, height, width, flag=flag)
    if settings.outpaint is not None:
        added = ((above, below), (left, right), (0, 0))
        mask = np.pad(np.zeros_like(image[..., :1]), added, constant_values=WHITE)
        image = np.pad(image, added, mode="edge")
    return InputImages(height, width, image, mask, digests)


def binary_mask(
    levels: UInt8[np.ndarray, "h w 1"], path: Path
) -> UInt8[np.ndarray, "h w 1"]:
    """Return 255 where a mask is white and 0 elsewhere.

    White is what is brighter than half. Of a mask of black and one other level, such as
    0 and 1, that level is white, however dark.

    Args:
      levels: Grey levels of the mask.
      path: Its file, for the message.

    Raises:
      InputError: If nothing is white.
    """
    found = np.unique(levels)
    two = found.tolist() == [1] or (found.size == 2 and found[0] == BLACK)
    white = levels > (BLACK if two else WHITE // 2)
    if not white.any():
        raise InputError(
            f"--mask: {path} has grey levels of {found[0]} to {found[-1]}, so that "
            "nothing would be made anew, wanted white (255, or 1 beside 0) there"
        )
    return np.where(white, WHITE, BLACK).astype(np.uint8)


def read_image(
    path: Path, *, flag: str, most_aspect: float = MAX_ASPECT
) -> UInt8[np.ndarray, "h w c"]:
    """Read an image as training reads it, grey or RGB.

    Args:
      flag: The flag that named it, for messages.
      most_aspect: Largest ratio of its sides; infinite for images that a model made.

    Raises:
      InputError: If it cannot be read.
    """
    with reading(path, flag=flag):
        return image_files.read_image(path, most_aspect=most_aspect)


@contextmanager
def reading(path: Path, *, flag: str) -> Iterator[None]:
    """Turn the errors of `image_files` into an `InputError` that names the flag."""
    try:
        with warnings.catch_warnings():
            # Its own size limit is stricter than the one that Pillow warns of.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    except FileNotFoundError:
        raise InputError(f"{flag}: no file {path}") from None
    except BrokenImageError as error:
        raise InputError(f"{flag}: {path} cannot be read: {error}") from None
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{flag}: {path} cannot be read: {reason}") from None


def check_size(model: LatentDiffusion, height: int, width: int, *, flag: str) -> None:
    """Raise `InputError` if a model cannot make images of a size."""
    unit = model.size_unit
    if height % unit or width % unit or min(height, width) < unit:
        near = [max(unit, round(x / unit) * unit) for x in (height, width)]
        raise InputError(
            f"{flag}: got {height}x{width} pixels, wanted multiples of {unit}; try "
            f"{near[0]}x{near[1]}"
        )
    if height * width > MAX_PIXELS or max(height, width) > MAX_SIDE:
        raise InputError(
            f"{flag}: got {height}x{width} pixels, wanted at most {MAX_PIXELS:,} in "
            f"all and {MAX_SIDE:,} a side: larger images are not read"
        )


def digest(pixels: np.ndarray) -> str:
    """Return the sha256 of an image's shape and pixels."""
    return hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).hexdigest()


def size_text(pixels: np.ndarray) -> str:
    """Write an image's height and width."""
    return f"{pixels.shape[0]}x{pixels.shape[1]}"
