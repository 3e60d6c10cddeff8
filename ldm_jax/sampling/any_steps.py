"""Images in any number of steps from one program: for who turns that knob too.

`make_sample_fn` compiles a program for every number of steps. Here the sampler's table
is an input, filled up to that of the most steps (`tables.pad`).
"""

import functools
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ldm_jax.diffusion.solvers import make_table
from ldm_jax.diffusion.tables import pad
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
from ldm_jax.sampling.editing import Edit, spread_of
from ldm_jax.sampling.program import Course, Inputs, Models, sample_course
from ldm_jax.sampling.sample_fn import EVERYWHERE, check_inputs, make_knobs, make_plan
from ldm_jax.types import InputError, SamplerName, SpacingName

NUM_KEPT = 64
"""Tables of the numbers of steps that were asked for last."""


@runtime_checkable
class AnyStepsFn(Protocol):
    """A jitted sample function of any number of steps."""

    def __call__(
        self,
        params: SampleParams,
        keys: Key[Array, " b"],
        cond: ConditionInputs,
        num_steps: int,
        guidance_scale: float | int = 1.0,
        uncond: ConditionInputs | None = None,
    ) -> Float[Array, "b h w c"]:
        """Make one image for each key and condition."""
        ...


def make_any_steps_fn(
    model: LatentDiffusion,
    *,
    sampler: SamplerName,
    max_steps: int,
    spacing: SpacingName | None = None,
    guided: bool = True,
) -> AnyStepsFn:
    """Make `fn(params, keys, cond, num_steps, guidance_scale, uncond)`.

    It makes the images that `make_sample_fn` makes with as many steps and eta 0, from
    one program for all numbers of steps. Steps that are not asked for take no time, nor
    does guidance where its scale is 1.

    Args:
      model: What to sample with.
      sampler: One of `SAMPLER_NAMES`.
      max_steps: The most steps there may be, 1 to T.
      spacing: One of `SPACING_NAMES` but `ldm`; None for the schedule's default.
      guided: Whether `guidance_scale` has effect.

    Returns:
      The function. It raises `InputError` for a number of steps outside 1 to
      `max_steps`, and otherwise as that of `make_sample_fn` does.

    Raises:
      ValueError: If a number is out of range, or a name unknown or of no use here.
    """
    if spacing == "ldm":
        raise ValueError(
            "spacing: got 'ldm', which has not the steps asked for; wanted another"
        )
    plan = make_plan(
        model, sampler=sampler, num_steps=max_steps, spacing=spacing, guided=guided
    )
    tabulate = functools.partial(
        make_table,
        sampler,
        prediction=model.prediction,
        sigma_data=model.sigma_data,
    )
    longest = tabulate(plan.levels)

    @functools.lru_cache(maxsize=NUM_KEPT)
    def course_of(num_steps: int) -> Course:
        levels = make_levels(model.schedule, num_steps, spacing=spacing)
        padded = pad(
            tabulate(levels),
            num_calls=longest.num_calls,
            num_signals=longest.num_signals,
        )
        spread = jnp.asarray(spread_of(model, levels), jnp.float32)
        return Course(padded, spread)

    run = jax.jit(functools.partial(sample_course, plan))
    platform = jax.default_backend()
    size = images_per_call(model, platform)
    at_once = calls_at_once(model, platform)

    def any_steps_fn(
        params: SampleParams,
        keys: Key[Array, " b"],
        cond: ConditionInputs,
        num_steps: int,
        guidance_scale: float | int = 1.0,
        uncond: ConditionInputs | None = None,
    ) -> Float[Array, "b h w c"]:
        if not 1 <= num_steps <= max_steps:
            raise InputError(f"steps: got {num_steps}, wanted 1 to {max_steps}")
        if uncond is None:
            uncond = null_condition(model, cond)
        inputs = Inputs(keys, cond, uncond, Edit())
        check_inputs(inputs, num_classes=model.num_classes)
        knobs = make_knobs(
            guidance_scale, 0.0, EVERYWHERE, 0.0, sampler=sampler, num_steps=max_steps
        )
        call = functools.partial(run, Models(params, None), knobs, course_of(num_steps))
        return in_chunks(call, inputs, size=size, at_once=at_once)

    return any_steps_fn
