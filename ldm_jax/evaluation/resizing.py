"""Images made as large as a feature network wants them, as each protocol does it."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image


def resize_bilinearly(
    images: Float[Array, "b h w c"], *, side: int
) -> Float[Array, "b s s c"]:
    """Resize as TensorFlow 1 did: corners meet, nothing is averaged on the way down.

    Pixel i of the result is at `i * (size / side)` in the image, not at the middle of
    what it stands for, so images move up and left by part of a pixel.

    Args:
      images: Levels of any range.
      side: Height and width of the result.

    Returns:
      The images, in the dtype they came in.

    Source:
      TensorFlow 1's `ResizeBilinear` with `align_corners` and `half_pixel_centers` off;
      Parmar et al., arXiv:2104.11222, sec. 3.1, on what it does to figures.
    """
    for axis in (1, 2):
        size = images.shape[axis]
        place = jnp.arange(side, dtype=jnp.float32) * jnp.float32(size / side)
        floor = jnp.floor(place)
        low = floor.astype(jnp.int32)
        shape = [1] * images.ndim
        shape[axis] = side
        weight = (place - floor).astype(images.dtype).reshape(shape)
        before = jnp.take(images, low, axis=axis)
        after = jnp.take(images, jnp.minimum(low + 1, size - 1), axis=axis)
        images = before + (after - before) * weight
    return images


def resize_cleanly(
    images: UInt8[np.ndarray, "b h w c"], *, side: int
) -> Float[np.ndarray, "b s s c"]:
    """Resize as clean-fid does: cubic, averaged on the way down, never rounded.

    Args:
      images: 8-bit levels.
      side: Height and width of the result.

    Returns:
      Levels clipped to [0, 255], float32.

    Source:
      Parmar et al., arXiv:2104.11222, sec. 3.1 and 4; by Pillow, on the host.
    """
    size, cubic = (side, side), Image.Resampling.BICUBIC

    def one(channel: Float[np.ndarray, "h w"]) -> Float[np.ndarray, "s s"]:
        return np.asarray(Image.fromarray(channel).resize(size, cubic))

    planes = images.astype(np.float32)
    resized = [
        np.stack([one(image[..., c]) for c in range(image.shape[-1])], axis=-1)
        for image in planes
    ]
    return np.clip(np.stack(resized), 0.0, 255.0)
