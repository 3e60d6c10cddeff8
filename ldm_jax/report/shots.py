"""Pictures that a report draws itself: denoising, and who stands next to a sample."""

from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
from jaxtyping import Float, UInt8

from ldm_jax.build import load_split
from ldm_jax.config import Config
from ldm_jax.drawing import draw
from ldm_jax.evaluation.components import small_images
from ldm_jax.requests import SampleRequest, parse_sample
from ldm_jax.scoring.samples import shown_by_seed
from ldm_jax.studio import open_studio
from ldm_jax.subjects import Subject

NUM_DENOISED, NUM_FRAMES = 4, 9
NUM_NEIGHBOURS = 10
"""Samples whose nearest training images are shown."""
NUM_HELD_OUT = 200
MOST_BYTES = 2**28
"""Of training images that are looked through."""


class Shots(NamedTuple):
    """What was drawn.

    Attributes:
      denoising: Latents on the way, decoded: images by frames.
      shown: What each of them shows.
      neighbours: Samples above their nearest training images.
      closeness: Median distance of samples to their nearest training images, over that
        of held-out images: 1 where they are as near as new real images are.
      num_searched: Training images that were looked through.
      steps: Denoising steps.
      scale: Guidance scale.
      seeds: Of the samples.
    """

    denoising: UInt8[np.ndarray, "n f h w c"]
    shown: list[str]
    neighbours: UInt8[np.ndarray, "2 n h w c"]
    closeness: float
    num_searched: int
    steps: int
    scale: float
    seeds: int


def shoot(workdir: Path, config: Config) -> Shots:
    """Draw samples of a run, and look for them among the images it was trained on.

    Args:
      workdir: Of the run.
      config: Its config.

    Raises:
      InputError: If there is no checkpoint yet, or the data cannot be read.
      RunError: If no checkpoint is intact.
    """
    sampling = config.sampling
    words = {
        "workdir": workdir,
        "steps": sampling.grid_steps,
        "guidance-scale": sampling.grid_guidance_scale,
    }
    flags = [f"--{name}={value}" for name, value in words.items()]
    settings = cast(SampleRequest, parse_sample(flags)).settings
    studio = open_studio(settings)
    shown = shown_by_seed(config, NUM_NEIGHBOURS)
    subjects = [Subject(shown[i % len(shown)], i) for i in range(NUM_NEIGHBOURS)]
    frames = min(NUM_FRAMES, settings.steps + 1)
    pictures = list(draw(studio, subjects, num_frames=frames))
    samples = np.stack([picture.image for picture in pictures])
    data = config.data
    one = data.image_size**2 * data.image_channels
    train = load_split(config, "train", limit=max(MOST_BYTES // one, 1)).image
    test = load_split(config, "test", limit=NUM_HELD_OUT).image
    features = small_images(train)
    near, distances = _nearest(small_images(samples), features)
    _, usual = _nearest(small_images(test), features)
    return Shots(
        denoising=np.stack([p.frames for p in pictures[:NUM_DENOISED]]),
        shown=[
            ", ".join(subject.shown.values()) or f"seed {subject.seed}"
            for subject in subjects
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
