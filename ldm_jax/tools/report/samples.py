"""Pictures that a report draws itself: denoising, and who stands next to a sample."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from ldm_jax.build import load_split
from ldm_jax.config import Config
from ldm_jax.evaluation.components import small_images
from ldm_jax.evaluation.samples import conditions_by_seed
from ldm_jax.sampling.conditions import ImageSpec
from ldm_jax.sampling.pipeline import open_pipeline, sample_images
from ldm_jax.sampling.sampling_config import SamplingConfig

NUM_DENOISED, NUM_FRAMES = 4, 9
NUM_NEIGHBOURS = 10
"""Samples whose nearest training images are shown."""
NUM_HELD_OUT = 200
MOST_BYTES = 2**28
"""Of training images that are looked through."""


class ReportSamples(NamedTuple):
    """What was drawn."""

    denoising: UInt8[np.ndarray, "n f h w c"]
    """Latents on the way, decoded: images by frames."""
    condition_texts: list[str]
    """What each of them shows."""
    neighbours: UInt8[np.ndarray, "2 n h w c"]
    """Samples above their nearest training images."""
    closeness: float
    """Median distance of samples to their nearest training images, over that of
    held-out images: 1 where they are as near as new real images are."""
    num_searched: int
    """Training images that were looked through."""
    steps: int
    """Denoising steps."""
    scale: float
    """Guidance scale."""
    seeds: int
    """Of the samples."""


def shoot(workdir: Path, config: Config) -> ReportSamples:
    """Draw samples of a run, and look for them among the images it was trained on.

    Raises:
      InputError: If there is no checkpoint yet, or the data cannot be read.
      RunError: If no checkpoint is intact.
    """
    sampling = config.sampling
    settings = SamplingConfig(
        workdir=str(workdir),
        steps=sampling.grid_steps,
        guidance_scale=(sampling.grid_guidance_scale,),
    )
    pipeline = open_pipeline(settings)
    condition_texts = conditions_by_seed(pipeline.model, config.data, NUM_NEIGHBOURS)
    specs = [
        ImageSpec(condition_texts[i % len(condition_texts)], i)
        for i in range(NUM_NEIGHBOURS)
    ]
    frames = min(NUM_FRAMES, settings.steps + 1)
    pictures = list(sample_images(pipeline, specs, num_frames=frames))
    samples = np.stack([picture.image for picture in pictures])
    data = config.data
    one = data.image_size**2 * data.image_channels
    train = load_split(config, "train", limit=max(MOST_BYTES // one, 1)).image
    test = load_split(config, "test", limit=NUM_HELD_OUT).image
    features = small_images(train)
    near, distances = _nearest(small_images(samples), features)
    _, usual = _nearest(small_images(test), features)
    return ReportSamples(
        denoising=np.stack([p.frames for p in pictures[:NUM_DENOISED]]),
        condition_texts=[
            ", ".join(spec.condition_texts.values()) or f"seed {spec.seed}"
            for spec in specs
        ],
        neighbours=np.stack([samples, train[near]]),
        closeness=float(np.median(distances) / np.median(usual)),
        num_searched=len(train),
        steps=settings.steps,
        scale=sampling.grid_guidance_scale,
        seeds=NUM_NEIGHBOURS,
    )


def _nearest(
    x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"]
) -> tuple[np.ndarray, np.ndarray]:
    """Return which of `y` is nearest to each of `x`, and how far it is."""
    squares = np.square(x).sum(1)[:, None] + np.square(y).sum(1)[None]
    distances = np.sqrt(np.maximum(squares - 2.0 * x @ y.T, 0.0))
    return distances.argmin(axis=1), distances.min(axis=1)
