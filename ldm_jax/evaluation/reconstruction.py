"""A first stage scored: held-out images compared with their reconstructions."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from ldm_jax.config import DataConfig
from ldm_jax.evaluation.extractors import Extractor
from ldm_jax.evaluation.fid import frechet_distance, moments
from ldm_jax.evaluation.image_quality import WINDOW, psnr, ssim
from ldm_jax.evaluation.protocols import Protocol
from ldm_jax.files import write_json
from ldm_jax.images import to_float
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.models.discriminator_lpips import Lpips
from ldm_jax.pretrained.metric_networks import load_lpips
from ldm_jax.sampling.metadata import versions
from ldm_jax.training.autoencoder_stage import make_reconstruct
from ldm_jax.types import PrecisionName, PyTree

CHUNK = 64
MAX_DECIBELS = 100.0


class ImageQuality(NamedTuple):
    """Image quality of reconstructions, mean over images."""

    psnr: float
    """Peak signal-to-noise ratio in dB; an image without any error counts as 100."""
    psnr_std: float
    """Standard deviation over the images."""
    ssim: float | None
    """Structural similarity; None for images smaller than its window."""
    lpips: float | None
    """Perceptual distance; None without its weights."""
    rfid: float | None
    """Fréchet distance of the features; None for too few images."""
    num_images: int
    """Number of images."""


def score_reconstructions(
    model: LatentDiffusion,
    params: PyTree,
    images: UInt8[np.ndarray, "n h w c"],
    *,
    extractor: Extractor | None,
    lpips_files: tuple[str, ...],
) -> ImageQuality:
    """Reconstruct images, and compare.

    Args:
      params: Parameters of the autoencoder.
      extractor: Extracts features for rFID; None for no rFID.
      lpips_files: Weights of LPIPS; none for no LPIPS.

    Raises:
      InputError: If the weights cannot be read.
    """
    reconstruct = make_reconstruct(model)
    parts = [
        reconstruct(params, images[i : i + CHUNK]) for i in range(0, len(images), CHUNK)
    ]
    made = np.concatenate(parts)
    is_large = min(images.shape[1:3]) >= WINDOW
    decibels = np.minimum(psnr(images, made), MAX_DECIBELS)
    distance = None
    if lpips_files:
        distance = _lpips(load_lpips(lpips_files), images, made)
    rfid = None
    if extractor is not None:
        features = [extractor.extract(x).pooled for x in (images, made)]
        if len(images) > features[0].shape[1]:
            rfid = frechet_distance(*map(moments, features))
    return ImageQuality(
        psnr=float(decibels.mean()),
        psnr_std=float(decibels.std()),
        ssim=float(ssim(images, made).mean()) if is_large else None,
        lpips=distance,
        rfid=rfid,
        num_images=len(images),
    )


def _lpips(
    params: PyTree,
    images: UInt8[np.ndarray, "n h w c"],
    others: UInt8[np.ndarray, "n h w c"],
) -> float:
    @jax.jit
    def distance(
        params: PyTree, x: UInt8[Array, "b h w c"], y: UInt8[Array, "b h w c"]
    ) -> Float[Array, " b"]:
        found: Any = Lpips().apply({"params": params}, to_float(x), to_float(y))
        return found

    params = jax.tree.map(jnp.asarray, params)
    with jax.default_matmul_precision("highest"):  # as features
        parts = [
            np.asarray(distance(params, images[i : i + CHUNK], others[i : i + CHUNK]))
            for i in range(0, len(images), CHUNK)
        ]
    return float(np.concatenate(parts).mean())


def write_image_quality(
    path: Path,
    quality: ImageQuality,
    data: DataConfig,
    protocol: Protocol,
    extractor: Extractor | None,
    *,
    precision: PrecisionName,
) -> None:
    """Write image quality, with the data and the protocol.

    Args:
      precision: Precision of the products of the first stage.

    Raises:
      OSError: If it cannot be written.
    """
    report = {
        "reconstructions": quality._asdict(),
        "source": data.source,
        "split": data.test_split,
        "protocol": protocol._asdict(),
        "network": None if extractor is None else extractor.digest,
        "precision": precision,
        "versions": json.loads(versions()),
    }
    write_json(path, report)
