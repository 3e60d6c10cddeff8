"""Image quality of reconstructions: PSNR and SSIM of 8-bit images."""

import numpy as np
from jaxtyping import Float, UInt8
from scipy.ndimage import correlate1d

from ldm_jax.types import InputError

LEVELS = 255.0
WINDOW, WINDOW_SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03


def psnr(
    images: UInt8[np.ndarray, "b h w c"], others: UInt8[np.ndarray, "b h w c"]
) -> Float[np.ndarray, " b"]:
    """Return the peak signal-to-noise ratio of each pair in dB; infinite if equal."""
    error = np.square(images.astype(np.float64) - others).mean(axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        return 10.0 * np.log10(LEVELS**2 / error)


def ssim(
    images: UInt8[np.ndarray, "b h w c"], others: UInt8[np.ndarray, "b h w c"]
) -> Float[np.ndarray, " b"]:
    """Return the structural similarity of each pair, channel by channel, in [-1, 1].

    The mean over all places where the whole window lies inside the image.

    Raises:
      InputError: If a side of the images is less than 11 pixels.

    Source:
      Wang et al., "Image quality assessment: from error visibility to structural
      similarity" (2004), eq. 13; its window is Gaussian, 11 x 11, sigma 1.5.
    """
    if min(images.shape[1:3]) < WINDOW:
        raise InputError(
            f"SSIM: got {images.shape[1]}x{images.shape[2]} pixels, wanted sides of at "
            f"least {WINDOW}"
        )
    x, y = images.astype(np.float64), others.astype(np.float64)
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    both = _blur(x * y) - mean_x * mean_y
    c1, c2 = (K1 * LEVELS) ** 2, (K2 * LEVELS) ** 2
    similar = (2.0 * mean_x * mean_y + c1) * (2.0 * both + c2)
    similar /= (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    return similar.mean(axis=(1, 2, 3))


def _blur(x: Float[np.ndarray, "b h w c"]) -> Float[np.ndarray, "b h2 w2 c"]:
    places = np.arange(WINDOW) - WINDOW // 2
    window = np.exp(-0.5 * np.square(places / WINDOW_SIGMA))
    window /= window.sum()
    half = WINDOW // 2
    x = correlate1d(x, window, axis=1)[:, half : x.shape[1] - half]
    return correlate1d(x, window, axis=2)[:, :, half : x.shape[2] - half]
