"""Samples of a report: their denoising, and the nearest training images."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from ldm_jax.build import load_split
from ldm_jax.evaluation.components import small_images
from ldm_jax.evaluation.samples import conditions_by_seed
from ldm_jax.sampling.conditions import ImageSpec
from ldm_jax.sampling.pipeline import open_pipeline, sample_images
from ldm_jax.sampling.sampling_config import SamplingConfig
from ldm_jax.tools.report.run_summary import RunSummary

NUM_DENOISED, NUM_FRAMES = 4, 9
NUM_NEIGHBOURS = 10
"""Samples that are compared with training images."""
NUM_HELD_OUT = 200
MAX_BYTES = 2**28
"""Bytes of training images that are searched."""


class ReportSamples(NamedTuple):
    """Samples made for a report."""

    denoising: UInt8[np.ndarray, "n f h w c"]
    """Decoded latents during sampling, images by frames."""
    captions: list[str]
    """Class, text or seed of each image."""
    neighbours: UInt8[np.ndarray, "2 n h w c"]
    """Samples above their nearest training images."""
    closeness: float
    """Median distance of samples to their nearest training images, over that of
    held-out images: 1 where samples are as near as new real images."""
    num_searched: int
    """Training images that were searched."""
    steps: int
    """Denoising steps."""
    scale: float
    """Guidance scale."""
    seeds: int
    """Number of seeds."""


def make_samples(summary: RunSummary) -> ReportSamples:
    """Make samples of a run, and find the nearest training images.

    Raises:
      InputError: If there is no checkpoint yet, or the data cannot be read.
      RunError: If no checkpoint is intact.
    """
    config, sampling = summary.config, summary.config.sampling
    settings = SamplingConfig(
        workdir=str(summary.workdir),
        steps=sampling.grid_steps,
        guidance_scale=(sampling.grid_guidance_scale,),
    )
    pipeline = open_pipeline(settings)
    rows = conditions_by_seed(pipeline.model, config.data, NUM_NEIGHBOURS)
    specs = [ImageSpec(rows[i % len(rows)], i) for i in range(NUM_NEIGHBOURS)]
    frames = min(NUM_FRAMES, settings.steps + 1)
    made = list(sample_images(pipeline, specs, num_frames=frames))
    samples = np.stack([one.image for one in made])
    data = config.data
    limit = max(MAX_BYTES // (data.image_size**2 * data.image_channels), 1)
    train = load_split(config, "train", limit=limit).image
    test = load_split(config, "test", limit=NUM_HELD_OUT).image
    features = small_images(train)
    near, distances = _nearest(small_images(samples), features)
    _, usual = _nearest(small_images(test), features)
    return ReportSamples(
        denoising=np.stack([one.frames for one in made[:NUM_DENOISED]]),
        captions=[
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
    """Return which of `y` is nearest to each of `x`, and its distance."""
    squares = np.square(x).sum(1)[:, None] + np.square(y).sum(1)[None]
    distances = np.sqrt(np.maximum(squares - 2.0 * x @ y.T, 0.0))
    return distances.argmin(axis=1), distances.min(axis=1)
