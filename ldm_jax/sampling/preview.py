"""Grids of samples during the training of the diffusion stage."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.config import PreviewConfig
from ldm_jax.data.pipeline import Batch
from ldm_jax.images import grid, to_float, to_uint8, write_png
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.models.conditioning import ConditionInputs
from ldm_jax.rng import Stream, example_keys, image_keys, root_key
from ldm_jax.sampling.sample_fn import make_sample_fn
from ldm_jax.sampling.sampling_config import SamplingConfig
from ldm_jax.training.diffusion_stage import sample_params
from ldm_jax.training.diffusion_step import DiffusionParams, FrozenParams, inputs_of

GRID_SEEDS = 4
GRID_COLUMNS = 10


def make_preview(
    model: LatentDiffusion,
    frozen: FrozenParams,
    workdir: Path,
    *,
    preview: PreviewConfig,
    load_test: Callable[[int], Batch],
    seed: int,
) -> Callable[[DiffusionParams, int], None]:
    """Make a function that writes a grid of samples of averaged parameters.

    Args:
      frozen: What the diffusion stage does not train.
      workdir: Folder of the run; grids go to `diffusion/samples_<step>.png`.
      load_test: Loads a number of held-out examples, whose conditions are used if the
        model reads more than classes.
      seed: Seed of the run.

    Returns:
      A function of the averaged parameters and the step.
    """
    settings = SamplingConfig(
        steps=preview.grid_steps, guidance_scale=(preview.grid_guidance_scale,)
    )
    sample_fn = make_sample_fn(model, guided=settings.guided)

    def write_grid(ema: DiffusionParams, step_number: int) -> None:
        cond, columns = _grid_inputs(model, frozen, load_test=load_test, seed=seed)
        cond = jax.tree.map(lambda x: jnp.concatenate([x] * GRID_SEEDS), cond)
        samples = sample_fn(
            sample_params(frozen, ema),
            image_keys([row for row in range(GRID_SEEDS) for _ in range(columns)]),
            cond,
            settings,
        )
        name = f"samples_{step_number:06d}.png"
        images = grid(to_uint8(np.asarray(samples.images)), columns=columns)
        write_png(workdir / "diffusion" / name, images)

    return write_grid


def _grid_inputs(
    model: LatentDiffusion,
    frozen: FrozenParams,
    *,
    load_test: Callable[[int], Batch],
    seed: int,
) -> tuple[ConditionInputs, int]:
    """Return the conditions of a grid's row, and the number of its columns."""
    condition = model.condition
    if condition.context in ("none", "class") and condition.concat == "none":
        if not condition.uses_classes:
            return ConditionInputs(), GRID_COLUMNS
        columns = min(model.num_classes, GRID_COLUMNS)
        return ConditionInputs(label=jnp.arange(columns, dtype=jnp.int32)), columns
    loaded = load_test(GRID_COLUMNS)
    batch = Batch(*(None if x is None else jnp.asarray(x) for x in loaded))
    keys = example_keys(root_key(seed), Stream.HOLE, 0, batch.example_index)
    inputs = inputs_of(
        batch,
        to_float(batch.image),
        frozen,
        keys,
        model=model,
    )
    return inputs, len(batch.image)
