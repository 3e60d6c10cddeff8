"""The diffusion stage of a run: its step, its start, and what it keeps."""

import functools
from pathlib import Path
from typing import Any

from jaxtyping import Float

from ldm_jax.build import init_conditioner, init_unet
from ldm_jax.config import Config
from ldm_jax.latent_diffusion import LatentDiffusion, SampleParams
from ldm_jax.training.diffusion_step import (
    Denoising,
    Frozen,
    Objective,
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


def diffusion_stage(
    config: Config,
    model: LatentDiffusion,
    frozen: Frozen,
    workdir: Path,
    *,
    null_state: Float[Any, "n d"] | None = None,
) -> Stage:
    """Build stage 2 on a finished stage 1.

    Args:
      frozen: What its pictures need and it does not train.
      null_state: What the frozen text encoder says of the empty prompt, where batches
        hold what it says of captions.

    Returns:
      The stage; where batches hold latents, its step needs no first stage.
    """
    settings = config.diffusion
    conditioner, condition = model.conditioner, settings.condition
    learned_on = frozen
    if config.data.latents is not None:
        learned_on = learned_on._replace(autoencoder={})
    if null_state is not None:
        conditioner = conditioner.clone(reads="embedding", encoder=None)
        condition = condition.as_vectors()
        learned_on = learned_on._replace(conditioner={}, null_embedding=null_state)
    optimizer = make_optimizer(
        settings.optim,
        num_steps=settings.steps,
        average_lengths=settings.average_lengths,
    )
    step = functools.partial(
        diffusion_step,
        autoencoder=model.autoencoder,
        unet=model.unet,
        conditioner=conditioner,
        optimizer=optimizer,
        objective=objective_of(config, model),
        latent_shape=model.latent_shape,
        condition=condition,
        num_classes=model.num_classes,
        null_tokens=model.null_tokens,
        condition_dropout=settings.condition_dropout,
        accumulate=config.parallel.accumulate,
    )

    def init() -> TrainState:
        return init_state(init_denoising(config, model), optimizer)

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
        keep=keep,
        kept_steps=tuple(kept) if settings.average_lengths else (),
    )


def averages_folder(workdir: Path) -> Path:
    """Return where a run keeps averages of its weights."""
    return workdir / "diffusion" / FOLDER


def objective_of(config: Config, model: LatentDiffusion) -> Objective:
    """Collect what stage 2 learns, and at which noise levels."""
    settings = config.diffusion
    return Objective(
        schedule=model.schedule,
        prediction=model.prediction,
        loss=settings.loss,
        weight=settings.loss_weight,
        weight_gamma=settings.gamma,
        sigma_data=model.sigma_data,
        offset_noise=settings.offset_noise,
        timestep_shift=settings.timestep_shift,
    )


def init_denoising(config: Config, model: LatentDiffusion) -> Denoising:
    """Draw the parameters that stage 2 trains."""
    trained = config.diffusion.condition.trained
    conditioner = init_conditioner(config, model) if trained else {}
    return Denoising(init_unet(config, model), conditioner)


def sample_params(frozen: Frozen, trained: Denoising) -> SampleParams:
    """Join what stage 2 trained and what it did not for sampling."""
    return SampleParams(
        autoencoder=frozen.autoencoder,
        unet=trained.unet,
        conditioner={**frozen.conditioner, **trained.conditioner},
        latent_scale=frozen.latent_scale,
    )
