"""The program that makes a chunk of images: what `make_sample_fn` compiles."""

import functools
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ldm_jax.diffusion.guidance import (
    UNGUIDED_SCALE,
    Predictor,
    autoguidance,
    classifier_free,
    scales_of_calls,
    unguided,
)
from ldm_jax.diffusion.sampling import sample, starting_noise
from ldm_jax.diffusion.solvers import Table, make_table
from ldm_jax.diffusion.tables import Padded
from ldm_jax.diffusion.timesteps import Levels
from ldm_jax.latent_diffusion import (
    LatentDiffusion,
    SampleParams,
    decode,
    denoiser_of,
    prepare,
)
from ldm_jax.models.conditioning import Condition, ConditionInputs
from ldm_jax.sampling.editing import Edit, mix_conditions, paste, soften, start_of
from ldm_jax.types import SamplerName


class Models(NamedTuple):
    """The arrays of the models that a sample function asks."""

    params: SampleParams
    """Of the model."""
    weak: SampleParams | None
    """Of the worse model of autoguidance, or None."""


class Knobs(NamedTuple):
    """What may be turned without compiling anew, for all images alike."""

    scale: Float[Array, " t"]
    """Guidance scale of each step."""
    rescale: Float[Array, ""]
    """Share of the contrast's correction, in [0, 1]."""
    interval: Float[Array, "2"]
    """Noise-to-signal ratios between which there is guidance."""
    eta: Float[Array, ""]
    """DDIM's share of renewed noise, in [0, 1]."""


class Inputs(NamedTuple):
    """What makes an image, for each image."""

    keys: Key[Array, " b"]
    """All of its randomness."""
    cond: ConditionInputs
    """What it shows."""
    uncond: ConditionInputs
    """What it is guided away from."""
    edit: Edit
    """What it starts from."""


class Plan(NamedTuple):
    """What is compiled into a sample function."""

    model: LatentDiffusion
    """What to sample with."""
    sampler: SamplerName
    """Which sampler."""
    levels: Levels
    """The noise levels it visits."""
    whole: bool
    """Whether those are all; False where an edit begins later."""
    guided: bool
    """Whether a sample is guided, by its condition or by a worse model."""
    weak: LatentDiffusion | None
    """The worse model of autoguidance, or None."""
    num_frames: int
    """Latents to keep on the way."""
    tile: int
    """Side of the decoder's tiles, in latents; 0 decodes at once."""


class Course(NamedTuple):
    """A sampler of any number of steps, as an input: see `any_steps`."""

    padded: Padded
    """The sampler, filled up to the most steps there may be."""
    spread: Float[Array, ""]
    """Deviation of the noise it starts from."""


def sample_chunk(
    plan: Plan, models: Models, knobs: Knobs, inputs: Inputs
) -> tuple[Float[Array, "b h w c"], Float[Array, "b f h w c"]]:
    """Make the images of one call, and their frames: the program that is compiled."""
    params, edit = models.params, inputs.edit
    model = plan.model
    table = make_table(
        plan.sampler,
        plan.levels,
        prediction=model.prediction,
        sigma_data=model.sigma_data,
        eta=knobs.eta,
    )
    start = start_of(
        model, params, inputs.keys, edit, levels=plan.levels, whole=plan.whole
    )
    trajectory = sample(
        _predictor(plan, models, knobs, inputs, table),
        start.x_start,
        inputs.keys,
        _prepare_mixed(model, params, inputs),
        table=table,
        known=start.known,
        num_frames=plan.num_frames,
    )
    images = paste(decode(model, params, trajectory.x_0, tile=plan.tile), edit)
    frames = jnp.zeros((0, *images.shape), images.dtype)
    if plan.num_frames:
        show = functools.partial(decode, model, params, tile=plan.tile)
        frames = jax.lax.map(show, trajectory.frames)
    return images, jnp.moveaxis(frames, 0, 1)


def sample_course(
    plan: Plan, models: Models, knobs: Knobs, course: Course, inputs: Inputs
) -> Float[Array, "b h w c"]:
    """Make the images of one call from noise alone, in as many steps as are asked for.

    `plan` is that of the most steps; what it says of levels is not looked at.
    """
    model, params = plan.model, models.params
    noise = starting_noise(inputs.keys, model.latent_shape)
    cond = _prepare_mixed(model, params, inputs)
    table, live = course.padded

    def follow(predict: Predictor) -> Float[Array, "b h w c"]:
        x_start, keys = course.spread * noise, inputs.keys
        return sample(predict, x_start, keys, cond, table=table, live=live).x_0

    predict = _predictor(plan, models, knobs, inputs, table)
    if not plan.guided:
        return decode(model, params, follow(predict), tile=plan.tile)
    # Of one scale for all steps. A program without guidance, half as long, makes other
    # last bits: so both are in here, whole, and what is drawn is what they draw.
    x_0 = jax.lax.cond(
        knobs.scale[0] == UNGUIDED_SCALE,
        lambda: follow(unguided(denoiser_of(model, params))),
        lambda: follow(predict),
    )
    return decode(model, params, x_0, tile=plan.tile)


def _predictor(
    plan: Plan, models: Models, knobs: Knobs, inputs: Inputs, table: Table
) -> Predictor:
    """Make what the sampler asks: the network, guided if it is to be."""
    model, params = plan.model, models.params
    denoise = denoiser_of(model, params)
    if not plan.guided:
        return unguided(denoise)
    scales = scales_of_calls(
        knobs.scale, step=table.step, ratio=table.ratio, interval=knobs.interval
    )
    if plan.weak is not None:
        weak = cast(SampleParams, models.weak)
        return autoguidance(
            denoise,
            denoiser_of(plan.weak, weak),
            weak_cond=_prepare_mixed(plan.weak, weak, inputs),
            scales=scales,
            rescale=knobs.rescale,
        )
    null_cond = prepare(model, params, inputs.uncond)
    if inputs.edit.other_cond is not None:
        null_cond = soften(null_cond, num_classes=model.num_classes)
    return classifier_free(
        denoise, null_cond=null_cond, scales=scales, rescale=knobs.rescale
    )


def _prepare_mixed(
    model: LatentDiffusion, params: SampleParams, inputs: Inputs
) -> Condition:
    """Prepare the condition, or one between two."""
    edit = inputs.edit
    prepared = prepare(model, params, inputs.cond)
    if edit.other_cond is None or edit.weight is None:
        return prepared
    other = prepare(model, params, edit.other_cond)
    return mix_conditions(prepared, other, edit.weight, num_classes=model.num_classes)
