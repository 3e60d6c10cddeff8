"""The diffusion stage of a run."""

import functools
from pathlib import Path
from typing import Any

from jaxtyping import Array, Float, Key

from ldm_jax.config import Config, DiffusionConfig
from ldm_jax.diffusion.losses import DiffusionObjective
from ldm_jax.latent_diffusion import (
    LatentDiffusion,
    SampleParams,
    init_conditioner,
    init_unet,
    reading_embeddings,
)
from ldm_jax.rng import root_key
from ldm_jax.training.diffusion_step import (
    DiffusionParams,
    FrozenParams,
    diffusion_step,
)
from ldm_jax.training.ema import FOLDER, snapshot_steps, write_snapshot
from ldm_jax.training.loop import Stage
from ldm_jax.training.state import (
    TrainState,
    init_state,
    learning_rate_schedule,
    make_optimizer,
)
from ldm_jax.training.workdir import state_check


def diffusion_stage(
    config: Config,
    model: LatentDiffusion,
    frozen: FrozenParams,
    workdir: Path,
    *,
    null_embedding: Float[Any, "n d"] | None = None,
) -> Stage:
    """Build the diffusion stage on a finished first stage.

    Args:
      frozen: All parameters that sampling reads and this stage does not train. Where
        batches hold latents, the step does not read the first stage.
      null_embedding: Text embedding of the empty prompt, where batches hold text
        embeddings.
    """
    settings, trained_on = config.diffusion, frozen
    if config.data.latents is not None:
        trained_on = trained_on._replace(autoencoder={})
    step_model = model
    if null_embedding is not None:
        step_model = reading_embeddings(model)
        trained_on = trained_on._replace(conditioner={}, null_embedding=null_embedding)
    optimizer = make_optimizer(
        settings.optim,
        num_steps=settings.steps,
        average_lengths=settings.average_lengths,
    )
    step = functools.partial(
        diffusion_step,
        model=step_model,
        objective=make_objective(settings, model),
        optimizer=optimizer,
    )

    def init() -> TrainState:
        params = init_diffusion_params(model, root_key(config.seed))
        return init_state(params, optimizer)

    def write_averages(averages: tuple[DiffusionParams, ...], step_number: int) -> None:
        folder = averages_folder(workdir)
        lengths = settings.average_lengths
        write_snapshot(folder, lengths, averages, step_number, run=workdir)

    steps = snapshot_steps(settings.steps, snapshots=settings.average_snapshots)
    return Stage(
        name="diffusion",
        num_steps=settings.steps,
        batch_size=settings.batch_size,
        step=step,
        init=init,
        frozen=trained_on,
        extra={"latent_scale": frozen.latent_scale},
        learning_rate=learning_rate_schedule(settings.optim, num_steps=settings.steps),
        write_averages=write_averages,
        average_steps=tuple(steps) if settings.average_lengths else (),
        check=state_check(workdir, "diffusion"),
    )


def averages_folder(workdir: Path) -> Path:
    """Return the folder of a run's power-function averages."""
    return workdir / "diffusion" / FOLDER


def make_objective(
    settings: DiffusionConfig, model: LatentDiffusion
) -> DiffusionObjective:
    """Make the objective that a config describes for a model."""
    return DiffusionObjective(
        schedule=model.schedule,
        prediction=model.prediction,
        sigma_data=model.sigma_data,
        loss=settings.loss,
        weight=settings.loss_weight,
        weight_gamma=settings.gamma,
        offset_noise=settings.offset_noise,
        timestep_shift=settings.timestep_shift,
        condition_dropout=settings.condition_dropout,
    )


def init_diffusion_params(
    model: LatentDiffusion, key: Key[Array, ""]
) -> DiffusionParams:
    """Draw the trainable parameters from the root key of a run."""
    conditioner = init_conditioner(model, key) if model.condition.trained else {}
    return DiffusionParams(init_unet(model, key), conditioner)


def sample_params(frozen: FrozenParams, trained: DiffusionParams) -> SampleParams:
    """Join frozen and trained parameters for sampling."""
    return SampleParams(
        autoencoder=frozen.autoencoder,
        unet=trained.unet,
        conditioner={**frozen.conditioner, **trained.conditioner},
        latent_scale=frozen.latent_scale,
    )
