"""Samplers and numbers of steps compared on a run: timed and scored on the same seeds.

OUT/steps.json    scores, times and the cheapest setting
OUT/steps.png     their plot
"""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, UInt8
from tqdm import tqdm

from ldm_jax.diffusion.solvers import make_table
from ldm_jax.diffusion.timesteps import make_levels
from ldm_jax.evaluation.components import (
    fit_projection,
    moments_of,
    small_images,
)
from ldm_jax.evaluation.dataset import Dataset, dataset_of, load_images
from ldm_jax.evaluation.evaluate import FOLDER, make_scorer
from ldm_jax.evaluation.fid import Moments, frechet_distance, moments
from ldm_jax.evaluation.samples import conditions_by_seed
from ldm_jax.evaluation.trade_off import (
    REFERENCE_SAMPLER,
    StepsRequest,
    SweepRow,
    cheapest,
    plot,
)
from ldm_jax.files import write_json
from ldm_jax.images import to_uint8
from ldm_jax.pretrained.load_run import Run, load_run
from ldm_jax.rng import image_keys
from ldm_jax.sampling.conditions import ConditionTexts, condition_inputs
from ldm_jax.sampling.sample_fn import SampleFn, make_sample_fn
from ldm_jax.sampling.sampling_config import SamplingConfig
from ldm_jax.types import InputError, PrecisionName

MAX_REAL_IMAGES = 10_000
GREY_LEVELS = 127.5
"""Grey levels of 255 per unit, from -1 to 1."""
SECONDS_BETWEEN_LINES = 5.0


class Sweep(NamedTuple):
    """Measurements of all settings."""

    rows: list[SweepRow]
    """A row for each setting."""
    held_out_distance: float | None
    """Fréchet distance of the held-out split to the training split; None where it has
    too few images."""
    num_held_out: int
    """Images of the held-out split."""
    digest: str
    """Digest of the checkpoint."""
    platform: str
    """JAX's name of the platform."""
    precision: PrecisionName
    """Products of float32 on GPUs and TPUs."""
    limit_steps: int
    """Steps of the converged images."""


class FeatureSpace(NamedTuple):
    """The features whose Fréchet distances are measured."""

    moments: Callable[[UInt8[np.ndarray, "n h w c"]], Moments]
    """From images to the moments of their features."""
    real: Moments
    """Moments of the training split."""
    held_out_distance: float | None
    """Distance of the held-out split; None where it has too few images."""
    num_held_out: int
    """Images of the held-out split."""


class Setting(NamedTuple):
    """A sampler with a number of steps."""

    settings: SamplingConfig
    """Sampler, steps, spacing and guidance."""
    calls: int
    """Network calls of an image."""
    is_stochastic: bool
    """Whether it adds noise at each step."""
    sample: Callable[[int], np.ndarray]
    """From the first seed of a call to its images, in [-1, 1]."""


def sweep_steps(request: StepsRequest) -> Sweep:
    """Sample the same seeds with every setting, and measure.

    Raises:
      InputError: If the run cannot be read, or a spacing has no meaning for it.
      OSError: If the folder for the results cannot be made.
      RunError: If no checkpoint is intact.
    """
    run = load_run(request.workdir)
    precision = request.precision or run.model.precision
    run = run._replace(model=run.model._replace(precision=precision))
    limit_steps = min(request.limit_steps, run.model.schedule.num_timesteps)
    # One program for all: samplers and steps are its inputs.
    sample_fn = make_sample_fn(run.model, guided=request.guidance_scale != 1.0)
    rows_by_seed = conditions_by_seed(run.model, run.config.data, request.num_images)
    setting_of = functools.partial(
        _setting, run, sample_fn, rows_by_seed, request.num_images
    )
    plain = SamplingConfig(
        spacing=request.spacing, guidance_scale=(request.guidance_scale,)
    )
    with_steps = functools.partial(dataclasses.replace, plain)
    try:
        limit = setting_of(with_steps(sampler=REFERENCE_SAMPLER, steps=limit_steps))
        settings = [
            setting_of(with_steps(sampler=sampler, steps=steps))
            for sampler in request.samplers
            for steps in request.steps
        ]
    except ValueError as error:
        raise InputError(f"--{error}") from None
    space = _feature_space(request, dataset_of(run.config))
    request.out.mkdir(parents=True, exist_ok=True)  # to fail before sampling, not after
    starts = list(range(0, request.num_images, run.model.chunk))
    total = sum(setting.calls for setting in [limit, *settings]) * len(starts)
    rows: list[SweepRow] = []
    with tqdm(total=total, unit="calls", mininterval=SECONDS_BETWEEN_LINES) as bar:
        converged, _ = _sample_all(limit, starts, bar)
        for setting in settings:
            images, seconds = _sample_all(setting, starts, bar)
            found = space.moments(to_uint8(images))
            error = GREY_LEVELS * math.sqrt(np.square(images - converged).mean())
            rows.append(
                SweepRow(
                    sampler=setting.settings.sampler,
                    steps=setting.settings.steps,
                    calls=setting.calls,
                    seconds=seconds / min(run.model.chunk, request.num_images),
                    distance=frechet_distance(found, space.real),
                    error=None if setting.is_stochastic else error,
                )
            )
    return Sweep(
        rows,
        space.held_out_distance,
        space.num_held_out,
        run.digest,
        jax.default_backend(),
        precision,
        limit_steps,
    )


def write_sweep(sweep: Sweep, request: StepsRequest) -> SweepRow:
    """Write steps.json and steps.png.

    Returns:
      The cheapest setting that is as good as the best.

    Raises:
      OSError: If they cannot be written.
    """
    chosen = cheapest(sweep.rows)
    tree = {
        "checkpoint": sweep.digest,
        "platform": sweep.platform,
        "precision": sweep.precision,
        "num_images": request.num_images,
        "guidance_scale": request.guidance_scale,
        "protocol": request.protocol and request.protocol.name,
        "spacing": request.spacing,
        "limit": {"sampler": REFERENCE_SAMPLER, "steps": sweep.limit_steps},
        "held_out_distance": sweep.held_out_distance,
        "num_held_out": sweep.num_held_out,
        "cheapest": chosen._asdict(),
        "settings": [row._asdict() for row in sweep.rows],
    }
    write_json(request.out / "steps.json", tree)
    path = request.out / "steps.png"
    plot(sweep.rows, chosen, path, held_out_distance=sweep.held_out_distance)
    return chosen


def _feature_space(request: StepsRequest, dataset: Dataset) -> FeatureSpace:
    """Make the features of a protocol, or those of small images.

    Raises:
      InputError: If data or weights cannot be read, or there are too few images.
      OSError: If statistics of real images cannot be written.
    """
    if request.protocol is None:
        train, test = (
            small_images(load_images(dataset, split, limit=MAX_REAL_IMAGES).image)
            for split in ("train", "test")
        )
        projection = fit_projection(train)
        real = moments_of(projection, train)
        held_out = frechet_distance(moments_of(projection, test), real)

        def of_small(images: UInt8[np.ndarray, "n h w c"]) -> Moments:
            return moments_of(projection, small_images(images))

        return FeatureSpace(of_small, real, held_out, len(test))
    scorer = make_scorer(
        dataset,
        request.protocol,
        inception=request.inception,
        reference=None,
        folder=request.workdir / FOLDER,
        num_images=request.num_images,
        what="--num-images",
    )

    def of_protocol(images: UInt8[np.ndarray, "n h w c"]) -> Moments:
        return moments(scorer.extractor.extract(images).pooled)

    held_out = None if scorer.held_out is None else scorer.held_out["fid"]
    return FeatureSpace(
        of_protocol, scorer.reference.pooled, held_out, scorer.num_held_out
    )


def _setting(
    run: Run,
    sample_fn: SampleFn,
    rows: list[ConditionTexts],
    num_images: int,
    settings: SamplingConfig,
) -> Setting:
    """Prepare a setting.

    Raises:
      ValueError: If the spacing has no meaning for the run.
    """
    model = run.model
    levels = make_levels(model.schedule, settings.steps, spacing=settings.spacing)
    table = make_table(settings.sampler, levels, prediction=model.prediction)

    def sample(start: int) -> np.ndarray:
        seeds = list(range(start, min(start + model.chunk, num_images)))
        cond, uncond = condition_inputs(model, [rows[i % len(rows)] for i in seeds])
        made = sample_fn(run.params, image_keys(seeds), cond, settings, uncond=uncond)
        return np.asarray(made.images)

    return Setting(settings, table.num_calls, bool(table.noise.any()), sample)


def _sample_all(
    setting: Setting, starts: list[int], bar: tqdm
) -> tuple[Float[np.ndarray, "n h w c"], float]:
    """Make every call of a setting.

    Args:
      starts: First seed of each call.
      bar: Progress, in network calls.

    Returns:
      The images in [-1, 1], and the median seconds of a call.
    """
    bar.set_description(f"{setting.settings.sampler} {setting.settings.steps}")
    setting.sample(starts[0])  # the first call of a program compiles it
    images, seconds = [], []
    for start in starts:
        began = time.perf_counter()
        images.append(setting.sample(start))
        seconds.append(time.perf_counter() - began)
        bar.update(setting.calls)
    return np.concatenate(images), statistics.median(seconds)
