"""Images and masks of a user, read and checked."""

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.sampling.sampling_config import SamplingConfig
from ldm_jax.types import InputError

MODE_BY_CHANNELS = {1: "L", 3: "RGB"}
MASK_MODES = ("1", "L")
WHITE = 255


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
    modes = modes_of(model)
    image = read_image(Path(settings.image), modes, flag="--image")
    digests = {"image_sha256": digest(image)}
    if model.condition.concat == "low_resolution":
        factor = model.condition.low_resolution_factor
        height, width = image.shape[0] * factor, image.shape[1] * factor
        check_size(model, height, width, flag="--image, upscaled")
        return InputImages(height, width, image, None, digests)
    mask = None
    if settings.mask is not None:
        mask = read_image(Path(settings.mask), MASK_MODES, flag="--mask")
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
    check_size(model, height, width, flag=flag)
    return InputImages(height, width, image, mask, digests)


def modes_of(model: LatentDiffusion) -> tuple[str, ...]:
    """Return Pillow's modes of the images that a model makes and reads."""
    return (MODE_BY_CHANNELS[model.image_shape[-1]],)


def read_image(
    path: Path, modes: tuple[str, ...], *, flag: str
) -> UInt8[np.ndarray, "h w c"]:
    """Read an image of one of several modes.

    Raises:
      InputError: If it cannot be read, or has another mode.
    """
    with reading(path, flag=flag), Image.open(path) as image:
        found = image.mode
        if found in modes:
            pixels = np.asarray(image.convert("L") if found == "1" else image)
            return pixels[..., None] if pixels.ndim == 2 else pixels
    raise InputError(
        f"{flag}: {path} has mode {found}, wanted {' or '.join(modes)}; convert it "
        "first"
    )


@contextmanager
def reading(path: Path, *, flag: str) -> Iterator[None]:
    """Turn every exception of Pillow into an `InputError`.

    Pillow raises nearly any exception for a damaged file, and only warns of an image
    whose size may be meant to fill the memory.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except FileNotFoundError:
        raise InputError(f"{flag}: no file {path}") from None
    except UnidentifiedImageError:
        raise InputError(f"{flag}: {path} is no image, or a damaged one") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise InputError(
            f"{flag}: {path} is too large, wanted at most {Image.MAX_IMAGE_PIXELS} "
            "pixels"
        ) from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise InputError(f"{flag}: {path} cannot be read: {error}") from None


def check_size(model: LatentDiffusion, height: int, width: int, *, flag: str) -> None:
    """Raise `InputError` if a model cannot make images of a size."""
    unit = model.size_unit
    if height % unit or width % unit or min(height, width) < unit:
        near = [max(unit, round(x / unit) * unit) for x in (height, width)]
        raise InputError(
            f"{flag}: got {height}x{width} pixels, wanted multiples of {unit}; try "
            f"{near[0]}x{near[1]}"
        )


def digest(pixels: np.ndarray) -> str:
    """Return the sha256 of an image's shape and pixels."""
    return hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).hexdigest()


def size_text(pixels: np.ndarray) -> str:
    """Write an image's height and width."""
    return f"{pixels.shape[0]}x{pixels.shape[1]}"
