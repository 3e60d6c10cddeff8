"""The sample program, which is compiled once for all settings."""

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from ldm_jax.diffusion.guidance import (
    Predictor,
    autoguidance,
    classifier_free,
    unguided,
)
from ldm_jax.diffusion.parameterization import PredictionName
from ldm_jax.diffusion.sampling import Trajectory, sample
from ldm_jax.diffusion.schedules import Schedule
from ldm_jax.diffusion.tables import Padded
from ldm_jax.latent_diffusion import (
    LatentDiffusion,
    SampleParams,
    decode,
    denoiser_of,
    prepare,
)
from ldm_jax.models.conditioning import Condition, ConditionInputs
from ldm_jax.sampling.editing import (
    Edit,
    FirstLevel,
    mix_conditions,
    paste,
    soften,
    start_of,
)


class SolverSpec(NamedTuple):
    """The properties that tables of samplers depend on, besides the settings."""

    schedule: Schedule
    """The noise levels that the network was trained on."""
    prediction: PredictionName
    """Prediction of the network."""
    sigma_data: float
    """Standard deviation of the scaled latents, where it predicts EDM's F."""
    max_steps: int
    """Largest number of steps."""
    num_frames: int
    """Intermediate latents to keep."""
    asks_if_guided: bool
    """Whether the settings of each call decide if it is guided."""


class SampleProgram(NamedTuple):
    """The static part of a sample function."""

    model: LatentDiffusion
    """The model."""
    weak: LatentDiffusion | None
    """The worse model of autoguidance, or None."""
    guided: bool | None
    """Whether calls are guided; None if the settings of each call decide."""
    max_steps: int
    """Largest number of steps."""
    num_frames: int
    """Intermediate latents to keep."""
    tile: int
    """Side of the decoder's tiles, in latents; 0 decodes at once."""

    @property
    def solver(self) -> SolverSpec:
        """The properties that its tables depend on."""
        return SolverSpec(
            schedule=self.model.schedule,
            prediction=self.model.prediction,
            sigma_data=self.model.sigma_data,
            max_steps=self.max_steps,
            num_frames=self.num_frames,
            asks_if_guided=self.guided is None and self.weak is None,
        )


class Models(NamedTuple):
    """The arrays of the models that a sample function calls."""

    params: SampleParams
    """Parameters of the model."""
    weak: SampleParams | None
    """Parameters of the worse model of autoguidance, or None."""


class SolverInputs(NamedTuple):
    """Sampler, levels and guidance of all images."""

    table: Padded
    """The sampler."""
    first: FirstLevel
    """The level it starts at."""
    is_guided: Bool[Any, ""] | None
    """Whether any guidance scale is other than 1; None if the program does not read
    it."""
    scales: Float[Any, " n"]
    """Guidance scale of each network call."""
    rescale: Float[Any, ""]
    """Share of the contrast's correction, in [0, 1]."""


class ImageInputs(NamedTuple):
    """Inputs of each image."""

    keys: Key[Array, " b"]
    """Key of all its random draws."""
    cond: ConditionInputs
    """Its condition."""
    uncond: ConditionInputs
    """Condition that it is guided away from."""
    edit: Edit
    """Its start."""


def sample_chunk(
    program: SampleProgram, models: Models, solver: SolverInputs, inputs: ImageInputs
) -> tuple[Float[Array, "b h w c"], Float[Array, "b f h w c"]]:
    """Make the images of one call, and their frames."""
    model, params, edit = program.model, models.params, inputs.edit
    start = start_of(model, params, inputs.keys, edit, first=solver.first)
    cond = _prepare_mixed(model, params, inputs)

    def follow(predict: Predictor) -> Trajectory:
        return sample(
            predict,
            start.x_start,
            inputs.keys,
            cond,
            table=solver.table,
            known=start.known,
            num_frames=program.num_frames,
        )

    plain = functools.partial(follow, unguided(denoiser_of(model, params)))
    if program.guided is False:
        end = plain()
    elif solver.is_guided is None:
        end = follow(_guided(program, models, solver, inputs))
    else:
        # A scan without guidance calls the network on half as many latents.
        end = jax.lax.cond(
            solver.is_guided,
            lambda: follow(_guided(program, models, solver, inputs)),
            plain,
        )
    images = paste(decode(model, params, end.x_0, tile=program.tile), edit)
    frames = jnp.zeros((0, *images.shape), images.dtype)
    if program.num_frames:
        show = functools.partial(decode, model, params, tile=program.tile)
        frames = jax.lax.map(show, end.frames)
    return images, jnp.moveaxis(frames, 0, 1)


def _guided(
    program: SampleProgram, models: Models, solver: SolverInputs, inputs: ImageInputs
) -> Predictor:
    model, params = program.model, models.params
    denoise = denoiser_of(model, params)
    if program.weak is not None:
        weak = cast(SampleParams, models.weak)
        return autoguidance(
            denoise,
            denoiser_of(program.weak, weak),
            weak_cond=_prepare_mixed(program.weak, weak, inputs),
            scales=solver.scales,
            rescale=solver.rescale,
        )
    null_cond = prepare(model, params, inputs.uncond)
    if inputs.edit.other_cond is not None:
        null_cond = soften(null_cond, num_classes=model.num_classes)
    return classifier_free(
        denoise, null_cond=null_cond, scales=solver.scales, rescale=solver.rescale
    )


def _prepare_mixed(
    model: LatentDiffusion, params: SampleParams, inputs: ImageInputs
) -> Condition:
    """Prepare the condition, or an interpolation of two."""
    edit = inputs.edit
    prepared = prepare(model, params, inputs.cond)
    if edit.other_cond is None or edit.weight is None:
        return prepared
    other = prepare(model, params, edit.other_cond)
    return mix_conditions(prepared, other, edit.weight, num_classes=model.num_classes)
