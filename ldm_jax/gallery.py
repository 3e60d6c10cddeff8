"""A run's images on disk: every label with every seed, each with its recipe."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from ldm_jax.cli import SampleRequest
from ldm_jax.generate import make_sample_fn, recipe
from ldm_jax.images import grid, to_uint8, write_png
from ldm_jax.rng import image_keys
from ldm_jax.run import Run, load_run

MAX_GRID_SIDE = 20
NUM_FRAMES = 10
UNGUIDED_SCALE = 1.0


class Item(NamedTuple):
    """One image to make.

    Attributes:
      label: Its class.
      seed: Its seed.
    """

    label: int
    seed: int


class Picture(NamedTuple):
    """One image made.

    Attributes:
      image: Its pixels.
      frames: Its latents on the way, decoded; empty when none were asked for.
    """

    image: UInt8[np.ndarray, "h w c"]
    frames: UInt8[np.ndarray, "f h w c"]


def write_gallery(request: SampleRequest) -> list[Path]:
    """Make every label with every seed, label by label, and write them.

    Args:
      request: What to make.

    Returns:
      What was written that a person wants to look at: the first image, the grid, and
      the trajectory if it was asked for.

    Raises:
      InputError: If the run has no finished checkpoint.
      RunError: If no checkpoint is intact.
      OSError: If an image cannot be written; those before it stay.
    """
    run = load_run(request.workdir)
    request.out.mkdir(parents=True, exist_ok=True)
    items = [Item(label, seed) for label in request.labels for seed in request.seeds]
    shown: list[Picture] = []
    columns = min(len(request.seeds), MAX_GRID_SIDE)
    for i, picture in enumerate(make_pictures(run, request, items)):
        texts = recipe(
            seed=items[i].seed,
            label=items[i].label,
            sampler=request.sampler,
            num_steps=request.num_steps,
            eta=request.eta,
            guidance_scale=request.guidance_scale,
            checkpoint=run.digest,
        )
        write_png(request.out / f"{i:06d}.png", picture.image, texts)
        row, column = divmod(i, len(request.seeds))
        if row < MAX_GRID_SIDE and column < columns:
            shown.append(picture)
    written = [request.out / "000000.png", request.out / "grid.png"]
    images = np.stack([picture.image for picture in shown])
    write_png(written[-1], grid(images, columns=columns))
    if request.trajectory:
        written.append(request.out / "trajectory.png")
        frames = np.concatenate([picture.frames for picture in shown])
        strip = grid(frames, columns=len(shown[0].frames))
        write_png(written[-1], strip)
    return written


def make_pictures(
    run: Run, request: SampleRequest, items: list[Item]
) -> Iterator[Picture]:
    """Make images chunk by chunk, in the order of `items`, with a progress bar.

    Args:
      run: What to sample with.
      request: How.
      items: What.

    Yields:
      One picture per item.
    """
    sample_fn = make_sample_fn(
        run.networks,
        sampler=request.sampler,
        num_steps=request.num_steps,
        guided=request.guidance_scale != UNGUIDED_SCALE,
        num_frames=min(NUM_FRAMES, request.num_steps + 1) * request.trajectory,
    )
    chunk = run.networks.chunk
    with tqdm(total=len(items), unit=" images", mininterval=1.0) as bar:
        for start in range(0, len(items), chunk):
            part = items[start : start + chunk]
            samples = sample_fn(
                run.params,
                image_keys([item.seed for item in part]),
                jnp.asarray([item.label for item in part], jnp.int32),
                request.guidance_scale,
                request.eta,
            )
            images = to_uint8(np.asarray(samples.images))
            frames = to_uint8(np.asarray(samples.frames))
            for i, image in enumerate(images):
                yield Picture(image, frames[:, i])
            bar.update(len(part))
