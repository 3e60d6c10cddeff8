"""A run's images on disk: every label with every seed, each with its recipe."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from ldm_jax.build import open_tokenizer
from ldm_jax.cli import SampleRequest, parse_list
from ldm_jax.config import ConditionConfig, Config
from ldm_jax.data.tokenizer import Tokenizer
from ldm_jax.generate import make_sample_fn, recipe
from ldm_jax.images import grid, to_uint8, write_png
from ldm_jax.nn.conditioning import ConditionInputs
from ldm_jax.rng import image_keys
from ldm_jax.run import Run, load_run, load_weights
from ldm_jax.types import InputError

MAX_GRID_SIDE = 20
NUM_FRAMES = 10
UNGUIDED_SCALE = 1.0


class Item(NamedTuple):
    """One image to make.

    Attributes:
      row: Which condition: the position of its label or prompt.
      seed: Its seed.
    """

    row: int
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
      InputError: If the run has no finished checkpoint, the weights cannot be read, or
        the model needs what was not asked for.
      RunError: If no checkpoint is intact.
      OSError: If an image cannot be written; those before it stay.
    """
    run = open_run(request)
    conditions = describe_conditions(run.config, request)
    if request.num_steps > run.config.diffusion.num_timesteps:
        raise InputError(
            f"--steps: got {request.num_steps}, wanted 1 to "
            f"{run.config.diffusion.num_timesteps}, the model's noise levels"
        )
    condition_inputs(run.config, conditions)  # a missing tokenizer is told first
    request.out.mkdir(parents=True, exist_ok=True)
    rows = range(len(conditions))
    items = [Item(row, seed) for row in rows for seed in request.seeds]
    shown: list[Picture] = []
    columns = min(len(request.seeds), MAX_GRID_SIDE)
    for i, picture in enumerate(make_pictures(run, request, items, conditions)):
        texts = recipe(
            seed=items[i].seed,
            condition=conditions[items[i].row],
            sampler=request.sampler,
            num_steps=request.num_steps,
            eta=request.eta,
            guidance_scale=request.guidance_scale if any(conditions) else 1.0,
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


def open_run(request: SampleRequest) -> Run:
    """Load the run or the weights that a request names."""
    if request.workdir is not None:
        return load_run(request.workdir, tokenizer=request.tokenizer)
    return load_weights(
        Path(str(request.weights)),
        config_file=request.config_file,
        tokenizer=request.tokenizer,
    )


def describe_conditions(config: Config, request: SampleRequest) -> list[dict[str, str]]:
    """Say what each row of a request shows, as its recipe has it.

    Raises:
      InputError: If the model needs a label, a prompt or a picture that the request
        does not give, or the request gives what the model does not read.
    """
    condition = config.diffusion.condition
    if condition.concat != "none" or condition.context == "embedding":
        needs = condition.concat if condition.concat != "none" else "embedding"
        raise InputError(
            f"sample.py: this model needs a {needs} beside each image, which has no "
            "flag; try ldm_jax.generate.make_sample_fn from Python"
        )
    if request.negative_prompt and not condition.uses_tokens:
        raise InputError("--negative-prompt: this model reads no text; try without it")
    if request.prompts and not condition.uses_tokens:
        raise InputError("--prompt: this model reads no text; try --labels, or nothing")
    if request.labels and not condition.uses_classes:
        raise InputError(
            "--labels: this model has no classes; try --prompt, or nothing"
        )
    if condition.uses_tokens:
        if not request.prompts:
            raise InputError(
                '--prompt: not given, but this model draws texts; try --prompt "a cat"'
            )
        negative = {"negative_prompt": request.negative_prompt}
        guided = request.guidance_scale != UNGUIDED_SCALE
        shown = negative if request.negative_prompt and guided else {}
        return [{"prompt": prompt, **shown} for prompt in request.prompts]
    if condition.uses_classes:
        top = config.data.num_classes - 1
        labels = parse_list(
            request.labels or f"0-{top}", name="--labels", low=0, high=top
        )
        return [{"label": str(label)} for label in labels]
    return [{}]


@functools.cache
def _tokenizer(condition: ConditionConfig) -> Tokenizer:
    """Open a tokenizer once, not once for every chunk of images."""
    return open_tokenizer(condition)


def condition_inputs(
    config: Config, rows: list[dict[str, str]]
) -> tuple[ConditionInputs, ConditionInputs | None]:
    """Turn rows of recipes into what the conditioner reads.

    Args:
      config: Of the model.
      rows: As `describe_conditions` gives them, one per image.

    Returns:
      The inputs, and what they are guided away from; None for "no condition".

    Raises:
      InputError: If the tokenizer cannot be read.
    """
    condition = config.diffusion.condition
    if condition.uses_tokens:
        tokenizer = _tokenizer(condition)

        def inputs(keyword: str) -> ConditionInputs:
            texts = [row.get(keyword, "") for row in rows]
            return ConditionInputs(tokens=jnp.asarray(tokenizer.encode(texts)))

        return inputs("prompt"), inputs("negative_prompt")
    if condition.uses_classes:
        labels = [int(row["label"]) for row in rows]
        return ConditionInputs(label=jnp.asarray(labels, jnp.int32)), None
    return ConditionInputs(), None


def make_pictures(
    run: Run,
    request: SampleRequest,
    items: list[Item],
    conditions: list[dict[str, str]],
) -> Iterator[Picture]:
    """Make images chunk by chunk, in the order of `items`, with a progress bar.

    Args:
      run: What to sample with.
      request: How.
      items: What.
      conditions: What each row shows.

    Yields:
      One picture per item.
    """
    sample_fn = make_sample_fn(
        run.networks,
        sampler=request.sampler,
        num_steps=request.num_steps,
        guided=request.guidance_scale != UNGUIDED_SCALE and any(conditions),
        num_frames=min(NUM_FRAMES, request.num_steps + 1) * request.trajectory,
    )
    chunk = run.networks.chunk
    with tqdm(total=len(items), unit=" images", mininterval=1.0) as bar:
        for start in range(0, len(items), chunk):
            part = items[start : start + chunk]
            rows = [conditions[item.row] for item in part]
            cond, uncond = condition_inputs(run.config, rows)
            samples = sample_fn(
                run.params,
                image_keys([item.seed for item in part]),
                cond,
                request.guidance_scale,
                request.eta,
                uncond,
            )
            images = to_uint8(np.asarray(samples.images))
            frames = to_uint8(np.asarray(samples.frames))
            for i, image in enumerate(images):
                yield Picture(image, frames[:, i])
            bar.update(len(part))
