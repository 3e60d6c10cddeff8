"""Images from keys: the sample function."""

import functools
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Key, Real

from ldm_jax.diffusion.denoiser import Predictor
from ldm_jax.diffusion.guidance import (
    autoguidance,
    classifier_free,
    scales_of_calls,
    unguided,
)
from ldm_jax.diffusion.levels import Levels, make_levels
from ldm_jax.diffusion.samplers import sample
from ldm_jax.diffusion.solvers import Table, make_table
from ldm_jax.edit import Edit, mix_conditions, paste, soften, start_of
from ldm_jax.networks import (
    Networks,
    SampleParams,
    decode,
    denoiser_of,
    in_chunks,
    null_condition,
    prepare,
)
from ldm_jax.nn.conditioning import Condition, ConditionInputs
from ldm_jax.nn.tiling import OVERLAP_SHARE
from ldm_jax.training.parallel import PmapLayout
from ldm_jax.types import TAKES_ETA, SamplerName, SpacingName

EVERYWHERE = (0.0, float("inf"))
GuideName = Literal["none", "classifier_free", "autoguidance"]


class Samples(NamedTuple):
    """What a sample function returns.

    Attributes:
      images: In [-1, 1], clipped.
      frames: The decoded latents on the way, `f` of them, the start first; empty when
        none were asked for.
    """

    images: Float[Array, "b h w c"]
    frames: Float[Array, "f b h w c"]


class Models(NamedTuple):
    """The arrays of the models that a sample function asks.

    Attributes:
      params: Of the model.
      weak: Of the worse model of autoguidance, or None.
    """

    params: SampleParams
    weak: SampleParams | None


class Knobs(NamedTuple):
    """What may be turned without compiling anew, for all images alike.

    Attributes:
      scale: Guidance scale: one for all steps; or several, spread over the steps with
        lines between.
      rescale: Share of the contrast's correction, in [0, 1].
      interval: Noise-to-signal ratios between which there is guidance.
      eta: DDIM's share of renewed noise, in [0, 1].
    """

    scale: Float[Array, "*k"]
    rescale: Float[Array, ""]
    interval: Float[Array, "2"]
    eta: Float[Array, ""]


class Inputs(NamedTuple):
    """What makes an image, for each image.

    Attributes:
      keys: All of its randomness.
      cond: What it shows.
      uncond: What it is guided away from.
      edit: What it starts from.
    """

    keys: Key[Array, " b"]
    cond: ConditionInputs
    uncond: ConditionInputs
    edit: Edit


class Plan(NamedTuple):
    """What is compiled into a sample function.

    Attributes:
      networks: What to sample with.
      sampler: Which sampler.
      levels: The noise levels it visits.
      whole: Whether those are all; False where an edit begins later.
      guide: Which kind of guidance.
      weak: The worse model of autoguidance, or None.
      num_frames: Latents to keep on the way.
      tile: Side of the decoder's tiles, in latents; 0 decodes at once.
    """

    networks: Networks
    sampler: SamplerName
    levels: Levels
    whole: bool
    guide: GuideName
    weak: Networks | None
    num_frames: int
    tile: int


@runtime_checkable
class SampleFn(Protocol):
    """A jitted sample function."""

    def __call__(
        self,
        params: SampleParams,
        keys: Key[Array, " b"],
        cond: ConditionInputs,
        guidance_scale: Real[Array, "*k"] | float | int = 1.0,
        eta: Float[Array, ""] | float | int = 0.0,
        uncond: ConditionInputs | None = None,
        *,
        guidance_rescale: Float[Array, ""] | float | int = 0.0,
        guidance_interval: tuple[float, float] | Float[Array, "2"] = EVERYWHERE,
        weak_params: SampleParams | None = None,
        edit: Edit | None = None,
    ) -> Samples:
        """Make one image for each key and condition."""
        ...


def make_sample_fn(
    networks: Networks,
    *,
    sampler: SamplerName,
    num_steps: int,
    spacing: SpacingName | None = None,
    guided: bool = True,
    weak: Networks | None = None,
    strength: float = 1.0,
    num_frames: int = 0,
    tile: int = 0,
    layout: PmapLayout | None = None,
) -> SampleFn:
    """Make a jitted `sample_fn(params, keys, cond, guidance_scale, eta, uncond, ...)`.

    Image i is a function of the parameters, key i, condition i and the settings alone,
    bit for bit: alone, in any batch, in any order, on any number of devices. (Programs
    of different batch sizes differ in their last bits. So one program of `chunk` images
    makes them all, the last chunk filled up.)

    Compiled once for each kind of edit, whatever the number of images; keys,
    conditions, guidance scale, rescale and interval, eta and pictures are inputs.

    Args:
      networks: What to sample with. With another `latent_shape` it makes images of
        other sizes than it was trained on.
      sampler: One of `SAMPLER_NAMES`.
      num_steps: Denoising steps, 1 to T, exactly (but for spacing `ldm`).
      spacing: One of `SPACING_NAMES`; None for the schedule's default.
      guided: Whether `guidance_scale` has effect. False saves half of the work; it is
        what scale 1 means.
      weak: A worse model to be guided away from, instead of "no condition".
      strength: Share of the steps that an edited picture goes through, in (0, 1].
      num_frames: Latents to keep on the way, 0 or 2 to the number of steps + 1.
      tile: Decode in tiles of this many latents; 0 decodes at once.
      layout: Split the images over its devices by `pmap`; `params` (and `weak_params`)
        are then given as `layout.replicate` makes them, once.

    Returns:
      The function. Its `cond` holds what the model reads, by image; `uncond` what it
      is guided away from, by default the null condition; `edit` what it starts from.

    Raises:
      ValueError: If a number is out of range, a name unknown, or the worse model was
        trained otherwise.
    """
    whole = make_levels(networks.schedule, num_steps, spacing=spacing)
    levels = whole.tail(steps_of_strength(strength, whole.num_steps))
    most = levels.num_steps + 1
    if num_frames and not 2 <= num_frames <= most:
        raise ValueError(f"num_frames: got {num_frames}, wanted 0 or 2 to {most}")
    if tile and tile < OVERLAP_SHARE:
        raise ValueError(f"tile: got {tile}, wanted 0, or at least 4 latents")
    if weak is not None:
        check_weak(networks, weak)
    make_table(sampler, levels, prediction=networks.prediction)  # refuses what is bad
    guide: GuideName = "classifier_free" if guided else "none"
    plan = Plan(
        networks=networks,
        sampler=sampler,
        levels=levels,
        whole=levels.num_steps == whole.num_steps,
        guide="autoguidance" if weak is not None else guide,
        weak=weak,
        num_frames=num_frames,
        tile=tile,
    )
    fn = functools.partial(sample_chunk, plan)
    run = jax.jit(fn) if layout is None else layout.map_images(fn)
    size = networks.chunk * (1 if layout is None else len(layout.devices))

    def sample_fn(
        params: SampleParams,
        keys: Key[Array, " b"],
        cond: ConditionInputs,
        guidance_scale: Real[Array, "*k"] | float | int = 1.0,
        eta: Float[Array, ""] | float | int = 0.0,
        uncond: ConditionInputs | None = None,
        *,
        guidance_rescale: Float[Array, ""] | float | int = 0.0,
        guidance_interval: tuple[float, float] | Float[Array, "2"] = EVERYWHERE,
        weak_params: SampleParams | None = None,
        edit: Edit | None = None,
    ) -> Samples:
        check_eta(sampler, eta)
        if uncond is None:
            uncond = null_condition(networks, cond)
        knobs = Knobs(
            scale=jnp.asarray(guidance_scale, jnp.float32),
            rescale=jnp.asarray(guidance_rescale, jnp.float32),
            interval=jnp.asarray(guidance_interval, jnp.float32),
            eta=jnp.asarray(eta, jnp.float32),
        )
        inputs = Inputs(keys, cond, uncond, edit or Edit())
        call = functools.partial(run, Models(params, weak_params), knobs)
        images, frames = in_chunks(call, inputs, size=size)
        return Samples(images, jnp.moveaxis(frames, 1, 0))

    return sample_fn


def steps_of_strength(strength: float, num_steps: int) -> int:
    """Return how many of the last steps a picture of an edit goes through.

    Raises:
      ValueError: If the strength is outside (0, 1].
    """
    if not 0.0 < strength <= 1.0:
        raise ValueError(f"strength: got {strength}, wanted above 0, at most 1")
    return max(1, round(strength * num_steps))


def check_eta(sampler: SamplerName, eta: Float[Array, ""] | float | int) -> None:
    """Raise `ValueError` if eta is out of range, or has no meaning for a sampler."""
    if isinstance(eta, Tracer):
        return
    if not 0.0 <= float(eta) <= 1.0:
        raise ValueError(f"eta: got {float(eta)}, wanted 0 to 1")
    if eta and sampler not in TAKES_ETA:
        raise ValueError(f"eta: got {float(eta)} with {sampler}, which has none")


def check_weak(networks: Networks, weak: Networks) -> None:
    """Raise `ValueError` if a model cannot guide another: it must be trained alike."""
    same = weak.prediction == networks.prediction
    same &= weak.sigma_data == networks.sigma_data
    same &= type(weak.schedule) is type(networks.schedule) and all(
        np.array_equal(a, b)
        for a, b in zip(weak.schedule, networks.schedule, strict=True)
    )
    if not same or weak.latent_shape[-1] != networks.latent_shape[-1]:
        raise ValueError(
            "autoguidance: the worse model has another schedule, prediction or latent, "
            "wanted one trained alike on the same first stage"
        )


def sample_chunk(
    plan: Plan, models: Models, knobs: Knobs, inputs: Inputs
) -> tuple[Float[Array, "b h w c"], Float[Array, "b f h w c"]]:
    """Make the images of one call, and their frames: the program that is compiled."""
    params, edit = models.params, inputs.edit
    networks = plan.networks
    table = make_table(
        plan.sampler,
        plan.levels,
        prediction=networks.prediction,
        sigma_data=networks.sigma_data,
        eta=knobs.eta,
    )
    start = start_of(
        networks, params, inputs.keys, edit, levels=plan.levels, whole=plan.whole
    )
    trajectory = sample(
        _predictor(plan, models, knobs, inputs, table),
        start.x_start,
        inputs.keys,
        _prepare_mixed(networks, params, inputs),
        table=table,
        known=start.known,
        num_frames=plan.num_frames,
    )
    images = paste(decode(networks, params, trajectory.x_0, tile=plan.tile), edit)
    frames = jnp.zeros((0, *images.shape), images.dtype)
    if plan.num_frames:
        show = functools.partial(decode, networks, params, tile=plan.tile)
        frames = jax.lax.map(show, trajectory.frames)
    return images, jnp.moveaxis(frames, 0, 1)


def _predictor(
    plan: Plan, models: Models, knobs: Knobs, inputs: Inputs, table: Table
) -> Predictor:
    """Make what the sampler asks: the network, guided if it is to be."""
    networks, params = plan.networks, models.params
    denoise = denoiser_of(networks, params)
    if plan.guide == "none":
        return unguided(denoise)
    last = max(plan.levels.num_steps - 1, 1)
    scales = scales_of_calls(
        knobs.scale,
        step=jnp.asarray(table.step / last, jnp.float32),
        ratio=jnp.asarray(table.ratio, jnp.float32),
        interval=knobs.interval,
    )
    if plan.weak is not None and models.weak is not None:
        return autoguidance(
            denoise,
            denoiser_of(plan.weak, models.weak),
            weak_cond=_prepare_mixed(plan.weak, models.weak, inputs),
            scales=scales,
            rescale=knobs.rescale,
        )
    null_cond = prepare(networks, params, inputs.uncond)
    if inputs.edit.other_cond is not None:
        null_cond = soften(null_cond, num_classes=networks.num_classes)
    return classifier_free(
        denoise, null_cond=null_cond, scales=scales, rescale=knobs.rescale
    )


def _prepare_mixed(
    networks: Networks, params: SampleParams, inputs: Inputs
) -> Condition:
    """Prepare the condition, or one between two."""
    edit = inputs.edit
    prepared = prepare(networks, params, inputs.cond)
    if edit.other_cond is None or edit.weight is None:
        return prepared
    other = prepare(networks, params, edit.other_cond)
    return mix_conditions(
        prepared, other, edit.weight, num_classes=networks.num_classes
    )
