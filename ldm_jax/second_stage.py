"""Stage 2, built: its step and its pictures."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from ldm_jax.build import init_conditioner, init_unet, load_split
from ldm_jax.config import Config
from ldm_jax.data.pipeline import Batch
from ldm_jax.generate import make_sample_fn
from ldm_jax.images import grid, to_float, to_uint8, write_png
from ldm_jax.networks import Networks, SampleParams
from ldm_jax.nn.conditioning import ConditionInputs
from ldm_jax.rng import Stream, example_keys, image_keys, root_key
from ldm_jax.training.diffusion_step import (
    Denoising,
    DiffusionState,
    Frozen,
    Objective,
    diffusion_step,
    inputs_of,
)
from ldm_jax.training.loop import Stage
from ldm_jax.training.profiles import snapshot_steps
from ldm_jax.training.snapshots import FOLDER, write_snapshot
from ldm_jax.training.state import (
    init_state,
    learning_rate_schedule,
    make_optimizer,
    with_averages,
)

GRID_SEEDS = 4
GRID_COLUMNS = 10


def diffusion_stage(
    config: Config,
    networks: Networks,
    frozen: Frozen,
    workdir: Path,
    *,
    null_state: Float[Any, "n d"] | None = None,
) -> Stage:
    """Build stage 2 on a finished stage 1.

    Args:
      config: The run's.
      networks: The run's.
      frozen: What its pictures need and it does not train.
      workdir: Its folder.
      null_state: What the frozen text encoder says of the empty prompt, where batches
        hold what it says of captions.

    Returns:
      The stage; where batches hold latents, its step needs no first stage.
    """
    settings = config.diffusion
    conditioner, condition = networks.conditioner, settings.condition
    learned_on = frozen
    if config.data.latents is not None:
        learned_on = learned_on._replace(autoencoder={})
    if null_state is not None:
        conditioner = conditioner.clone(reads="embedding", encoder=None)
        condition = condition.as_vectors()
        learned_on = learned_on._replace(conditioner={}, null_embedding=null_state)
    optimizer = make_optimizer(settings.optim, num_steps=settings.steps)
    step = functools.partial(
        diffusion_step,
        autoencoder=networks.autoencoder,
        unet=networks.unet,
        conditioner=conditioner,
        optimizer=optimizer,
        objective=objective_of(config, networks),
        latent_shape=networks.latent_shape,
        condition=condition,
        num_classes=networks.num_classes,
        null_tokens=networks.null_tokens,
        condition_dropout=settings.condition_dropout,
        ema_decay=settings.optim.ema_decay,
        accumulate=config.parallel.accumulate,
        average_lengths=settings.average_lengths,
    )
    sample_fn = make_sample_fn(
        networks, sampler="ddim", num_steps=config.sampling.grid_steps
    )

    def draw(ema: Denoising, step_number: int) -> None:
        cond, columns = grid_inputs(config, networks, frozen)
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

    def init() -> DiffusionState:
        state = init_state(init_denoising(config, networks), optimizer)
        return with_averages(state, num=len(settings.average_lengths))

    def keep(averages: tuple[Denoising, ...], step_number: int) -> None:
        folder = averages_folder(workdir)
        write_snapshot(folder, settings.average_lengths, averages, step_number)

    kept = snapshot_steps(settings.steps, snapshots=settings.average_snapshots)
    return Stage(
        name="diffusion",
        num_steps=settings.steps,
        batch_size=settings.batch_size,
        step=step,
        init=init,
        frozen=learned_on,
        extra={"latent_scale": frozen.latent_scale},
        learning_rate=learning_rate_schedule(settings.optim, num_steps=settings.steps),
        draw=draw,
        keep=keep,
        kept_steps=tuple(kept) if settings.average_lengths else (),
    )


def averages_folder(workdir: Path) -> Path:
    """Return where a run keeps averages of its weights."""
    return workdir / "diffusion" / FOLDER


def objective_of(config: Config, networks: Networks) -> Objective:
    """Collect what stage 2 learns, and at which noise levels."""
    settings = config.diffusion
    return Objective(
        schedule=networks.schedule,
        prediction=networks.prediction,
        loss=settings.loss,
        weight=settings.loss_weight,
        weight_gamma=settings.gamma,
        sigma_data=networks.sigma_data,
        offset_noise=settings.offset_noise,
        timestep_shift=settings.timestep_shift,
    )


def init_denoising(config: Config, networks: Networks) -> Denoising:
    """Draw the parameters that stage 2 trains."""
    trained = config.diffusion.condition.trained
    conditioner = init_conditioner(config, networks) if trained else {}
    return Denoising(init_unet(config, networks), conditioner)


def sample_params(frozen: Frozen, trained: Denoising) -> SampleParams:
    """Join what stage 2 trained and what it did not for sampling."""
    return SampleParams(
        autoencoder=frozen.autoencoder,
        unet=trained.unet,
        conditioner={**frozen.conditioner, **trained.conditioner},
        latent_scale=frozen.latent_scale,
    )


def grid_inputs(
    config: Config, networks: Networks, frozen: Frozen
) -> tuple[ConditionInputs, int]:
    """Choose what a grid shows: classes, or what held-out examples are conditioned on.

    Args:
      config: Of the run.
      networks: Of the run.
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
        columns = min(networks.num_classes, GRID_COLUMNS)
        return ConditionInputs(label=jnp.arange(columns, dtype=jnp.int32)), columns
    loaded = load_split(config, "test", limit=GRID_COLUMNS)
    batch = Batch(*(None if x is None else jnp.asarray(x) for x in loaded))
    keys = example_keys(root_key(config.seed), Stream.HOLE, 0, batch.example_index)
    inputs = inputs_of(
        batch,
        to_float(batch.image),
        frozen,
        keys,
        autoencoder=networks.autoencoder,
        condition=condition,
    )
    return inputs, len(batch.image)
