"""How many sampling steps? Quality against steps and seconds, for several samplers.

    python -m ldm_jax.evaluation.steps --workdir runs/digits

Prints a table and names the cheapest setting within 5 % of the best; writes steps.json
and steps.png. Quality is the Fréchet distance to the training split between principal
components of small averaged images. That is a stand-in which needs nothing from
outside: it sees layout and contrast, not texture, and is not the FID of a feature
network.
"""

import argparse
import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from ldm_jax.cli import OneLineParser, run_main
from ldm_jax.config import Config, read_config
from ldm_jax.evaluation.components import (
    fit_projection,
    moments_of,
    small_images,
)
from ldm_jax.evaluation.frechet import frechet_distance
from ldm_jax.evaluation.trade_off import (
    TOLERANCE,
    Measured,
    cheapest,
    in_words,
    plot,
    to_table,
)
from ldm_jax.types import (
    SAMPLER_NAMES,
    SPACING_NAMES,
    InputError,
    SamplerName,
    SpacingName,
    choices,
)

PROG = "python -m ldm_jax.evaluation.steps"
MAX_REAL_IMAGES = 10_000
LIMIT_SAMPLER: SamplerName = "dpmpp_2m"
GREY_LEVELS = 127.5
"""From -1 to 1 lie 255 grey levels."""
SECONDS_BETWEEN_LINES = 5.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepsRequest:
    """What is to be compared.

    Attributes:
      workdir: Folder of the run.
      samplers: Which samplers.
      steps: Numbers of denoising steps, each in [1, T].
      spacing: How they are spaced; None for the schedule's default.
      num_images: Images of each setting, at least 2.
      guidance_scale: At least 0; 1 guides nothing.
      limit_steps: Steps of the images that stand for the converged ones; the most
        there are where that is more.
      out: Folder of what is written.
    """

    workdir: Path
    samplers: tuple[SamplerName, ...]
    steps: tuple[int, ...]
    spacing: SpacingName | None
    num_images: int
    guidance_scale: float
    limit_steps: int
    out: Path


def parse(args: list[str]) -> StepsRequest:
    """Read the command line, as far as the run's config tells without JAX.

    Raises:
      InputError: If it is wrong.
      SystemExit: After printing the help.
    """
    parser = OneLineParser(
        prog=PROG,
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--workdir", type=Path, required=True, help="folder of the run")
    add(
        "--samplers",
        nargs="+",
        default=["ddim", "heun", "dpmpp_2m", "unipc"],
        help=f"some of {', '.join(SAMPLER_NAMES)}",
    )
    add("--steps", type=int, nargs="+", default=[5, 10, 20, 50], help="numbers of them")
    add("--spacing", help=f"one of {', '.join(SPACING_NAMES)}; the run's by default")
    add("--num-images", type=int, default=500, help="images of each setting")
    add("--guidance-scale", type=float, default=1.0, help="1, the default, is none")
    add(
        "--limit-steps",
        type=int,
        default=200,
        help=f"steps of {LIMIT_SAMPLER} whose images stand for the converged ones",
    )
    add("--out", type=Path, help="folder of steps.json and steps.png; WORKDIR/steps")
    given = parser.parse_args(args)
    for sampler in given.samplers:
        if sampler not in SAMPLER_NAMES:
            raise InputError(f"--samplers: {choices(sampler, SAMPLER_NAMES)}")
    if given.spacing is not None and given.spacing not in SPACING_NAMES:
        raise InputError(f"--spacing: {choices(given.spacing, SPACING_NAMES)}")
    if given.limit_steps < 1:
        raise InputError(f"--limit-steps: got {given.limit_steps}, wanted 1 or more")
    if given.num_images < 2:
        raise InputError(f"--num-images: got {given.num_images}, wanted 2 or more")
    if not 0.0 <= given.guidance_scale < math.inf:
        raise InputError(
            f"--guidance-scale: got {given.guidance_scale}, wanted 0 or more"
        )
    out = given.out or given.workdir / "steps"
    if out.exists() and not out.is_dir():
        raise InputError(f"--out: {out} is a file, wanted a folder")
    check_run(read_config(given.workdir), given)
    return StepsRequest(
        workdir=given.workdir,
        samplers=tuple(dict.fromkeys(given.samplers)),
        steps=tuple(dict.fromkeys(given.steps)),
        spacing=given.spacing,
        num_images=given.num_images,
        guidance_scale=given.guidance_scale,
        limit_steps=given.limit_steps,
        out=out,
    )


def check_run(config: Config, given: argparse.Namespace) -> None:
    """Raise `InputError` if a run cannot be asked this."""
    if "diffusion" not in config.stages:
        raise InputError(
            f"--workdir: {given.workdir} is a run of an autoencoder alone, wanted one "
            "with a diffusion stage"
        )
    second = config.diffusion
    condition, top = second.condition, second.num_timesteps
    if outside := [steps for steps in given.steps if not 1 <= steps <= top]:
        raise InputError(f"--steps: got {outside[0]}, wanted 1 to {top}")
    reads_more = condition.uses_tokens or condition.context == "embedding"
    if reads_more or condition.concat != "none":
        raise InputError(
            f"--workdir: {given.workdir} is conditioned on texts, vectors or pictures; "
            "wanted a model of classes, or without condition"
        )
    if given.guidance_scale != 1.0 and not condition.uses_classes:
        raise InputError(
            f"--guidance-scale: got {given.guidance_scale}, but this model has no "
            "condition; leave it at 1"
        )


class Comparison(NamedTuple):
    """All that was measured.

    Attributes:
      rows: The settings.
      floor: Fréchet distance of the held-out split to the training split.
      num_held_out: Images of the held-out split.
      digest: Of the checkpoint.
      platform: What it ran on.
      limit_steps: Steps of the converged images.
    """

    rows: list[Measured]
    floor: float
    num_held_out: int
    digest: str
    platform: str
    limit_steps: int


class Setting(NamedTuple):
    """A sampler with a number of steps, ready to draw.

    Attributes:
      sampler: Which sampler.
      steps: Denoising steps.
      calls: Network calls of an image.
      draws_noise: Whether it draws noise on the way.
      draw: From where to begin among the seeds to the images of a call, in [-1, 1].
    """

    sampler: SamplerName
    steps: int
    calls: int
    draws_noise: bool
    draw: Callable[[int], np.ndarray]


def compare(request: StepsRequest) -> Comparison:
    """Draw the same seeds with every setting, and measure.

    Raises:
      InputError: If the run cannot be read, or a spacing has no meaning for it.
      RunError: If no checkpoint is intact.
    """
    # Only now: help and bad input need not wait for JAX.
    import jax

    from ldm_jax.build import load_split
    from ldm_jax.images import to_uint8
    from ldm_jax.run import load_run

    run = load_run(request.workdir)
    limit_steps = min(request.limit_steps, run.networks.schedule.num_timesteps)
    try:
        limit = make_setting(request, run, LIMIT_SAMPLER, limit_steps)
        settings = [
            make_setting(request, run, sampler, steps)
            for sampler in request.samplers
            for steps in request.steps
        ]
    except ValueError as error:
        raise InputError(f"--{error}") from None
    train, test = (
        small_images(load_split(run.config, split, limit=MAX_REAL_IMAGES).image)
        for split in ("train", "test")
    )
    projection = fit_projection(train)
    real = moments_of(projection, train)
    starts = list(range(0, request.num_images, run.networks.chunk))
    total = sum(setting.calls for setting in [limit, *settings]) * len(starts)
    rows: list[Measured] = []
    with tqdm(total=total, unit="calls", mininterval=SECONDS_BETWEEN_LINES) as bar:
        converged, _ = draw_all(limit, starts, bar)
        for setting in settings:
            images, seconds = draw_all(setting, starts, bar)
            found = moments_of(projection, small_images(to_uint8(images)))
            error = GREY_LEVELS * math.sqrt(np.square(images - converged).mean())
            rows.append(
                Measured(
                    sampler=setting.sampler,
                    steps=setting.steps,
                    calls=setting.calls,
                    seconds=seconds / min(run.networks.chunk, request.num_images),
                    distance=frechet_distance(found, real),
                    error=None if setting.draws_noise else error,
                )
            )
    floor = frechet_distance(moments_of(projection, test), real)
    platform = jax.default_backend()
    return Comparison(rows, floor, len(test), run.digest, platform, limit_steps)


def make_setting(
    request: StepsRequest, run: Any, sampler: SamplerName, steps: int
) -> Setting:
    """Make what draws the seeds of a request with a sampler.

    Args:
      request: Which seeds, and how.
      run: A `Run`, whose module loads JAX.
      sampler: Which sampler.
      steps: Denoising steps.

    Returns:
      The setting.

    Raises:
      ValueError: If the spacing has no meaning for the run.
    """
    import jax.numpy as jnp

    from ldm_jax.diffusion.levels import make_levels
    from ldm_jax.diffusion.solvers import make_table
    from ldm_jax.generate import make_sample_fn
    from ldm_jax.nn.conditioning import ConditionInputs
    from ldm_jax.rng import image_keys

    networks, config = run.networks, run.config
    levels = make_levels(networks.schedule, steps, spacing=request.spacing)
    table = make_table(sampler, levels, prediction=networks.prediction)
    sample_fn = make_sample_fn(
        networks,
        sampler=sampler,
        num_steps=steps,
        spacing=request.spacing,
        guided=request.guidance_scale != 1.0,
    )

    def draw(start: int) -> np.ndarray:
        seeds = list(range(start, min(start + networks.chunk, request.num_images)))
        cond, scale = ConditionInputs(), request.guidance_scale
        if config.diffusion.condition.uses_classes:
            label = [seed % config.data.num_classes for seed in seeds]
            cond = ConditionInputs(label=jnp.asarray(label, jnp.int32))
        return np.asarray(sample_fn(run.params, image_keys(seeds), cond, scale).images)

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


def main(args: list[str]) -> None:
    """Parse, measure, say what was found."""
    request = parse(args)
    request.out.mkdir(parents=True, exist_ok=True)
    found = compare(request)
    chosen = cheapest(found.rows)
    report = {
        "checkpoint": found.digest,
        "platform": found.platform,
        "num_images": request.num_images,
        "guidance_scale": request.guidance_scale,
        "spacing": request.spacing,
        "limit": {"sampler": LIMIT_SAMPLER, "steps": found.limit_steps},
        "held_out_distance": found.floor,
        "num_held_out": found.num_held_out,
        "cheapest": chosen._asdict(),
        "settings": [row._asdict() for row in found.rows],
    }
    text = json.dumps(report, indent=2, allow_nan=False) + "\n"
    (request.out / "steps.json").write_text(text)
    plot(found.rows, chosen, request.out / "steps.png", floor=found.floor)
    print(to_table(found.rows, chosen))  # noqa: T201
    real = f"{found.num_held_out} held-out images: {found.floor:.4g}"
    print(f"\n{real}; fewer images lie further off, drawn or real")  # noqa: T201
    print(f"cheapest within {TOLERANCE:.0%} of the best: {in_words(chosen)}")  # noqa: T201


if __name__ == "__main__":
    run_main(main, PROG)
