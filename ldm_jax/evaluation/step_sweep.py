"""Samplers compared on a run: the same seeds drawn by each, timed and measured."""

import functools
import json
import math
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, UInt8
from tqdm import tqdm

from ldm_jax.build import load_split
from ldm_jax.config import Config
from ldm_jax.diffusion.solvers import make_table
from ldm_jax.diffusion.timesteps import make_levels
from ldm_jax.evaluation.components import (
    fit_projection,
    moments_of,
    small_images,
)
from ldm_jax.evaluation.evaluate import FOLDER, score_samples
from ldm_jax.evaluation.extractors import extract_all
from ldm_jax.evaluation.fid import Moments, frechet_distance, moments
from ldm_jax.evaluation.measure_dataset import ROWS
from ldm_jax.evaluation.samples import conditions_by_seed
from ldm_jax.evaluation.trade_off import (
    LIMIT_SAMPLER,
    Measured,
    StepsRequest,
    cheapest,
    plot,
)
from ldm_jax.images import to_uint8
from ldm_jax.pretrained.load_run import Run, load_run
from ldm_jax.rng import image_keys
from ldm_jax.sampling.conditions import condition_inputs
from ldm_jax.sampling.sample_fn import SampleFn, make_sample_fn
from ldm_jax.sampling.sampling_config import SamplingConfig
from ldm_jax.types import InputError, SamplerName

MAX_REAL_IMAGES = 10_000
GREY_LEVELS = 127.5
"""From -1 to 1 lie 255 grey levels."""
SECONDS_BETWEEN_LINES = 5.0


class Comparison(NamedTuple):
    """All that was measured."""

    rows: list[Measured]
    """The settings."""
    floor: float | None
    """Fréchet distance of the held-out split to the training split; None where it has
    too few images."""
    num_held_out: int
    """Images of the held-out split."""
    digest: str
    """Of the checkpoint."""
    platform: str
    """What it ran on."""
    limit_steps: int
    """Steps of the converged images."""


class Space(NamedTuple):
    """Where distances are measured."""

    moments: Callable[[UInt8[np.ndarray, "n h w c"]], Moments]
    """From images to those of their features."""
    real: Moments
    """Those of the training split."""
    floor: float | None
    """Distance of the held-out split; None where it has too few images."""
    num_held_out: int
    """Images of the held-out split."""


class Setting(NamedTuple):
    """A sampler with a number of steps, ready to draw."""

    sampler: SamplerName
    """Which sampler."""
    steps: int
    """Denoising steps."""
    calls: int
    """Network calls of an image."""
    draws_noise: bool
    """Whether it draws noise on the way."""
    draw: Callable[[int], np.ndarray]
    """From where to begin among the seeds to the images of a call, in [-1, 1]."""


def compare(request: StepsRequest) -> Comparison:
    """Draw the same seeds with every setting, and measure.

    Raises:
      InputError: If the run cannot be read, or a spacing has no meaning for it.
      OSError: If the folder for the results cannot be made.
      RunError: If no checkpoint is intact.
    """
    run = load_run(request.workdir)
    limit_steps = min(request.limit_steps, run.model.schedule.num_timesteps)
    # One program for all: samplers and steps are its inputs.
    sample_fn = make_sample_fn(run.model, guided=request.guidance_scale != 1.0)
    setting_of = functools.partial(make_setting, request, run, sample_fn)
    try:
        limit = setting_of(LIMIT_SAMPLER, limit_steps)
        settings = [
            setting_of(sampler, steps)
            for sampler in request.samplers
            for steps in request.steps
        ]
    except ValueError as error:
        raise InputError(f"--{error}") from None
    space = open_space(request, run.config)
    request.out.mkdir(parents=True, exist_ok=True)  # before the work, not after it
    starts = list(range(0, request.num_images, run.model.chunk))
    total = sum(setting.calls for setting in [limit, *settings]) * len(starts)
    rows: list[Measured] = []
    with tqdm(total=total, unit="calls", mininterval=SECONDS_BETWEEN_LINES) as bar:
        converged, _ = draw_all(limit, starts, bar)
        for setting in settings:
            images, seconds = draw_all(setting, starts, bar)
            found = space.moments(to_uint8(images))
            error = GREY_LEVELS * math.sqrt(np.square(images - converged).mean())
            rows.append(
                Measured(
                    sampler=setting.sampler,
                    steps=setting.steps,
                    calls=setting.calls,
                    seconds=seconds / min(run.model.chunk, request.num_images),
                    distance=frechet_distance(found, space.real),
                    error=None if setting.draws_noise else error,
                )
            )
    return Comparison(
        rows,
        space.floor,
        space.num_held_out,
        run.digest,
        jax.default_backend(),
        limit_steps,
    )


def write_comparison(found: Comparison, request: StepsRequest) -> Measured:
    """Write steps.json and steps.png.

    Returns:
      The cheapest setting that is as good as the best.

    Raises:
      OSError: If they cannot be written.
    """
    chosen = cheapest(found.rows)
    tree = {
        "checkpoint": found.digest,
        "platform": found.platform,
        "num_images": request.num_images,
        "guidance_scale": request.guidance_scale,
        "protocol": request.protocol and request.protocol.name,
        "spacing": request.spacing,
        "limit": {"sampler": LIMIT_SAMPLER, "steps": found.limit_steps},
        "held_out_distance": found.floor,
        "num_held_out": found.num_held_out,
        "cheapest": chosen._asdict(),
        "settings": [row._asdict() for row in found.rows],
    }
    text = json.dumps(tree, indent=2, allow_nan=False) + "\n"
    (request.out / "steps.json").write_text(text)
    plot(found.rows, chosen, request.out / "steps.png", floor=found.floor)
    return chosen


def open_space(request: StepsRequest, config: Config) -> Space:
    """Make where distances are measured: by a protocol, or by small images.

    Raises:
      InputError: If data or weights cannot be read, or there are too few images.
      OSError: If statistics of real images cannot be kept.
    """
    if request.protocol is None:
        train, test = (
            small_images(load_split(config, split, limit=MAX_REAL_IMAGES).image)
            for split in ("train", "test")
        )
        projection = fit_projection(train)
        real = moments_of(projection, train)
        floor = frechet_distance(moments_of(projection, test), real)
        seen = lambda images: moments_of(projection, small_images(images))  # noqa: E731
        return Space(seen, real, floor, len(test))
    measured = score_samples(
        config,
        request.protocol,
        inception=request.inception,
        reference=None,
        folder=request.workdir / FOLDER,
        num_images=request.num_images,
        what="--num-images",
    )

    def look(images: UInt8[np.ndarray, "n h w c"]) -> Moments:
        return moments(extract_all(measured.extractor, images, size=ROWS).pooled)

    floor = None if measured.held_out is None else measured.held_out["fid"]
    return Space(look, measured.reference.pooled, floor, measured.num_held_out)


def make_setting(
    request: StepsRequest,
    run: Run,
    sample_fn: SampleFn,
    sampler: SamplerName,
    steps: int,
) -> Setting:
    """Make what draws the seeds of a request with a sampler.

    Args:
      request: Which seeds, and how.
      sampler: Which sampler.
      steps: Denoising steps.

    Returns:
      The setting.

    Raises:
      ValueError: If the spacing has no meaning for the run.
    """
    model = run.model
    levels = make_levels(model.schedule, steps, spacing=request.spacing)
    table = make_table(sampler, levels, prediction=model.prediction)
    config = SamplingConfig(
        sampler=sampler,
        steps=steps,
        spacing=request.spacing,
        guidance_scale=(request.guidance_scale,),
    )
    condition_texts = conditions_by_seed(model, run.config.data, request.num_images)

    def draw(start: int) -> np.ndarray:
        seeds = list(range(start, min(start + model.chunk, request.num_images)))
        cond, uncond = condition_inputs(
            model, [condition_texts[i % len(condition_texts)] for i in seeds]
        )
        made = sample_fn(run.params, image_keys(seeds), cond, config, uncond=uncond)
        return np.asarray(made.images)

    return Setting(sampler, steps, table.num_calls, bool(table.noise.any()), draw)


def draw_all(
    setting: Setting, starts: list[int], bar: tqdm
) -> tuple[Float[np.ndarray, "n h w c"], float]:
    """Draw every call of a setting.

    Args:
      setting: Of whom.
      starts: Where each call begins among the seeds.
      bar: Progress, in network calls.

    Returns:
      The images in [-1, 1], and the median seconds of a call.
    """
    bar.set_description(f"{setting.sampler} {setting.steps}")
    setting.draw(starts[0])  # compiles
    images, seconds = [], []
    for start in starts:
        began = time.perf_counter()
        images.append(setting.draw(start))
        seconds.append(time.perf_counter() - began)
        bar.update(setting.calls)
    return np.concatenate(images), statistics.median(seconds)
