"""Images from keys: the sample function."""

import functools
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Key, Real

from ldm_jax.diffusion.guidance import spread_scale
from ldm_jax.diffusion.solvers import make_table
from ldm_jax.diffusion.timesteps import make_levels
from ldm_jax.latent_diffusion import (
    LatentDiffusion,
    SampleParams,
    calls_at_once,
    images_per_call,
    in_chunks,
    null_condition,
)
from ldm_jax.models.conditioning import ConditionInputs
from ldm_jax.models.tiled_decoding import MIN_TILE
from ldm_jax.parallel.make_layout import PmapLayout
from ldm_jax.sampling.editing import Edit
from ldm_jax.sampling.program import Inputs, Knobs, Models, Plan, sample_chunk
from ldm_jax.types import TAKES_ETA, InputError, SamplerName, SpacingName

EVERYWHERE = (0.0, float("inf"))


class Samples(NamedTuple):
    """What a sample function returns."""

    images: Float[Array, "b h w c"]
    """In [-1, 1], clipped."""
    frames: Float[Array, "f b h w c"]
    """The decoded latents on the way, `f` of them, the start first; empty when none
    were asked for."""


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
    model: LatentDiffusion,
    *,
    sampler: SamplerName,
    num_steps: int,
    spacing: SpacingName | None = None,
    guided: bool = True,
    weak: LatentDiffusion | None = None,
    strength: float = 1.0,
    num_frames: int = 0,
    tile: int = 0,
    layout: PmapLayout | None = None,
) -> SampleFn:
    """Make a jitted `sample_fn(params, keys, cond, guidance_scale, eta, uncond, ...)`.

    Image i is a function of the parameters, key i, condition i and the settings alone,
    bit for bit: alone, in any batch, in any order, on any number of devices. (Programs
    of different batch sizes differ in their last bits. So one program of `chunk` images
    makes them all, the last chunk filled up; on a CPU, of one image.)

    Compiled once for each kind of edit, whatever the number of images; keys,
    conditions, guidance scale, rescale and interval, eta and pictures are inputs.

    Args:
      model: What to sample with. With another `latent_shape` it makes images of
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
        are then given as `layout.place` makes them, once.

    Returns:
      The function. Its `cond` holds what the model reads, by image; `uncond` what it
      is guided away from, by default the null condition; `edit` what it starts from.

    Raises:
      ValueError: If a number is out of range, a name unknown, or the worse model was
        trained otherwise.
    """
    plan = make_plan(
        model,
        sampler=sampler,
        num_steps=num_steps,
        spacing=spacing,
        guided=guided,
        weak=weak,
        strength=strength,
        num_frames=num_frames,
        tile=tile,
    )
    fn = functools.partial(sample_chunk, plan)
    run = jax.jit(fn) if layout is None else layout.map_images(fn)
    devices = 1 if layout is None else len(layout.devices)
    platform = jax.default_backend() if layout is None else layout.platform
    size = images_per_call(model, platform) * devices
    at_once = calls_at_once(model, platform) if devices == 1 else 1

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
        if uncond is None:
            uncond = null_condition(model, cond)
        inputs = Inputs(keys, cond, uncond, edit or Edit())
        check_inputs(inputs, num_classes=model.num_classes)
        check_plan(plan, inputs, weak_params)
        knobs = make_knobs(
            guidance_scale,
            guidance_rescale,
            guidance_interval,
            eta,
            sampler=sampler,
            num_steps=plan.levels.num_steps,
        )
        call = functools.partial(run, Models(params, weak_params), knobs)
        images, frames = in_chunks(call, inputs, size=size, at_once=at_once)
        return Samples(images, jnp.moveaxis(frames, 1, 0))

    return sample_fn


def make_plan(
    model: LatentDiffusion,
    *,
    sampler: SamplerName,
    num_steps: int,
    spacing: SpacingName | None = None,
    guided: bool = True,
    weak: LatentDiffusion | None = None,
    strength: float = 1.0,
    num_frames: int = 0,
    tile: int = 0,
) -> Plan:
    """Decide what is compiled into a sample function; see `make_sample_fn`.

    Raises:
      ValueError: As there.
    """
    whole = make_levels(model.schedule, num_steps, spacing=spacing)
    levels = whole.tail(steps_of_strength(strength, whole.num_steps))
    most = levels.num_steps + 1
    if num_frames and not 2 <= num_frames <= most:
        raise ValueError(f"num_frames: got {num_frames}, wanted 0 or 2 to {most}")
    if tile and tile < MIN_TILE:
        raise ValueError(f"tile: got {tile}, wanted 0, or at least {MIN_TILE} latents")
    if weak is not None:
        check_weak(model, weak)
    make_table(sampler, levels, prediction=model.prediction)  # refuses what is bad
    return Plan(
        model=model,
        sampler=sampler,
        levels=levels,
        whole=levels.num_steps == whole.num_steps,
        guided=guided or weak is not None,
        weak=weak,
        num_frames=num_frames,
        tile=tile,
    )


def steps_of_strength(strength: float, num_steps: int) -> int:
    """Return how many of the last steps a picture of an edit goes through.

    Raises:
      ValueError: If the strength is outside (0, 1].
    """
    if not 0.0 < strength <= 1.0:
        raise ValueError(f"strength: got {strength}, wanted above 0, at most 1")
    return max(1, round(strength * num_steps))


def make_knobs(
    scale: Real[Array, "*k"] | float | int,
    rescale: Float[Array, ""] | float | int,
    interval: tuple[float, float] | Float[Array, "2"],
    eta: Float[Array, ""] | float | int,
    *,
    sampler: SamplerName,
    num_steps: int,
) -> Knobs:
    """Check the knobs of a call, as far as they are not traced, and shape them.

    Raises:
      InputError: If one is out of range, or has no meaning for the sampler.
    """
    if not isinstance(eta, Tracer):
        if not 0.0 <= float(eta) <= 1.0:
            raise InputError(f"eta: got {float(eta)}, wanted 0 to 1")
        if eta and sampler not in TAKES_ETA:
            raise InputError(f"eta: got {float(eta)} with {sampler}, which has none")
    if not isinstance(rescale, Tracer) and not 0.0 <= float(rescale) <= 1.0:
        raise InputError(f"guidance_rescale: got {float(rescale)}, wanted 0 to 1")
    if not isinstance(interval, Tracer) and not interval[0] <= interval[1]:
        raise InputError(
            f"guidance_interval: got {float(interval[0])} to {float(interval[1])}, "
            "wanted the smaller ratio first"
        )
    return Knobs(
        scale=spread_scale(scale, num_steps=num_steps),
        rescale=jnp.asarray(rescale, jnp.float32),
        interval=jnp.asarray(interval, jnp.float32),
        eta=jnp.asarray(eta, jnp.float32),
    )


def check_inputs(inputs: Inputs, *, num_classes: int) -> None:
    """Raise `InputError` if the inputs of a call do not fit each other."""
    num = inputs.keys.shape[0]
    if not num:
        raise InputError("keys: got none, wanted one for each image")
    for name, tree in zip(inputs._fields, inputs, strict=True):
        for leaf in jax.tree.leaves(tree):
            if leaf.shape[:1] != (num,):
                got = leaf.shape[0] if leaf.shape else "none"
                raise InputError(f"{name}: got {got} for {num} keys, wanted one each")
    label = inputs.cond.label
    if label is not None and not isinstance(label, Tracer):
        low, high = int(label.min()), int(label.max())
        if low < 0 or high > num_classes:
            raise InputError(
                f"cond.label: got {low if low < 0 else high}, wanted 0 to "
                f"{num_classes}, the last for none"
            )


def check_plan(plan: Plan, inputs: Inputs, weak_params: SampleParams | None) -> None:
    """Raise `InputError` if the inputs of a call do not fit what was compiled."""
    edit = inputs.edit
    if (plan.weak is None) != (weak_params is None):
        raise InputError("weak_params: wanted with `weak`, and only with it")
    if edit.mask is not None and edit.image is None:
        raise InputError("edit.mask: got it without edit.image")
    between = edit.other_keys is not None or edit.other_cond is not None
    if between != (edit.weight is not None):
        raise InputError(
            "edit.weight: wanted with a second key or condition, and only with one"
        )
    if not plan.whole and edit.image is None and edit.latents is None:
        raise InputError("strength: got below 1 without edit.image or edit.latents")


def check_weak(model: LatentDiffusion, weak: LatentDiffusion) -> None:
    """Raise `ValueError` if a model cannot guide another: it must be trained alike."""
    same = weak.prediction == model.prediction
    same &= weak.sigma_data == model.sigma_data
    same &= type(weak.schedule) is type(model.schedule) and all(
        np.array_equal(a, b) for a, b in zip(weak.schedule, model.schedule, strict=True)
    )
    if not same or weak.latent_shape[-1] != model.latent_shape[-1]:
        raise ValueError(
            "autoguidance: the worse model has another schedule, prediction or latent, "
            "wanted one trained alike on the same first stage"
        )
