"""Grids of samples drawn while the diffusion stage trains."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.build import load_split
from ldm_jax.config import Config
from ldm_jax.data.pipeline import Batch
from ldm_jax.images import grid, to_float, to_uint8, write_png
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.models.conditioning import ConditionInputs
from ldm_jax.rng import Stream, example_keys, image_keys, root_key
from ldm_jax.sampling.sample_fn import make_sample_fn
from ldm_jax.training.diffusion_stage import sample_params
from ldm_jax.training.diffusion_step import Denoising, Frozen, inputs_of

GRID_SEEDS = 4
GRID_COLUMNS = 10


def make_preview(
    config: Config, model: LatentDiffusion, frozen: Frozen, workdir: Path
) -> Callable[[Denoising, int], None]:
    """Make a function that draws a grid of samples of averaged parameters.

    Args:
      frozen: What the diffusion stage does not train.
      workdir: Folder of the run; grids go to `diffusion/samples_<step>.png`.

    Returns:
      A function of the averaged parameters and the step.
    """
    sample_fn = make_sample_fn(
        model, sampler="ddim", num_steps=config.sampling.grid_steps
    )

    def draw(ema: Denoising, step_number: int) -> None:
        cond, columns = grid_inputs(config, model, frozen)
        cond = jax.tree.map(lambda x: jnp.concatenate([x] * GRID_SEEDS), cond)
        samples = sample_fn(
            sample_params(frozen, ema),
            image_keys([seed for seed in range(GRID_SEEDS) for _ in range(columns)]),
            cond,
            config.sampling.grid_guidance_scale,
            0.0,
        )
        name = f"samples_{step_number:06d}.png"
        picture = grid(to_uint8(np.asarray(samples.images)), columns=columns)
        write_png(workdir / "diffusion" / name, picture)

    return draw


def grid_inputs(
    config: Config, model: LatentDiffusion, frozen: Frozen
) -> tuple[ConditionInputs, int]:
    """Choose what a grid shows: classes, or what held-out examples are conditioned on.

    Args:
      frozen: The first stage, which encodes images with holes.

    Returns:
      The inputs of one row, and the number of its columns.

    Raises:
      InputError: If the held-out split cannot be read.
    """
    condition = config.diffusion.condition
    if condition.context in ("none", "class") and condition.concat == "none":
        if not condition.uses_classes:
            return ConditionInputs(), GRID_COLUMNS
        columns = min(model.num_classes, GRID_COLUMNS)
        return ConditionInputs(label=jnp.arange(columns, dtype=jnp.int32)), columns
    loaded = load_split(config, "test", limit=GRID_COLUMNS)
    batch = Batch(*(None if x is None else jnp.asarray(x) for x in loaded))
    keys = example_keys(root_key(config.seed), Stream.HOLE, 0, batch.example_index)
    inputs = inputs_of(
        batch,
        to_float(batch.image),
        frozen,
        keys,
        autoencoder=model.autoencoder,
        condition=condition,
    )
    return inputs, len(batch.image)
