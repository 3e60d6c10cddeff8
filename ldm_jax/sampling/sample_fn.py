"""The sample function: one program for all settings, called as often as needed."""

import functools
from typing import NamedTuple, Protocol, cast, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Key

from ldm_jax.diffusion.guidance import call_scales, spread_scale
from ldm_jax.diffusion.solvers import make_table
from ldm_jax.diffusion.tables import Table, pad
from ldm_jax.diffusion.timesteps import Levels, make_levels
from ldm_jax.latent_diffusion import (
    LatentDiffusion,
    SampleParams,
    calls_at_once,
    images_per_call,
    in_chunks,
    null_condition,
)
from ldm_jax.models.conditioning import ConditionInputs
from ldm_jax.parallel.pmap import PmapLayout
from ldm_jax.sampling.editing import Edit, first_level
from ldm_jax.sampling.program import (
    ImageInputs,
    Models,
    SampleProgram,
    SolverInputs,
    SolverSpec,
    sample_chunk,
)
from ldm_jax.sampling.sampling_config import SamplingConfig
from ldm_jax.types import MIN_DECODER_TILE, InputError, SamplerName, SpacingName

NUM_CACHED = 64
"""Settings whose tables are kept."""


class Samples(NamedTuple):
    """The result of a sample function."""

    images: Float[Array, "b h w c"]
    """Images in [-1, 1], clipped."""
    frames: Float[Array, "f b h w c"]
    """Decoded intermediate latents, the start first; empty if none were requested."""


@runtime_checkable
class SampleFn(Protocol):
    """A jitted sample function."""

    def __call__(
        self,
        params: SampleParams,
        keys: Key[Array, " b"],
        cond: ConditionInputs,
        settings: SamplingConfig,
        *,
        uncond: ConditionInputs | None = None,
        weak_params: SampleParams | None = None,
        edit: Edit | None = None,
    ) -> Samples:
        """Make one image for each key and condition."""
        ...


def make_sample_fn(
    model: LatentDiffusion,
    *,
    guided: bool | None = None,
    weak: LatentDiffusion | None = None,
    max_steps: int | None = None,
    num_frames: int = 0,
    tile: int = 0,
    layout: PmapLayout | None = None,
) -> SampleFn:
    """Make a jitted `sample_fn(params, keys, cond, settings, ...)`.

    Image i is a function of the parameters, key i, condition i and the settings alone,
    bit for bit: alone, in any batch, in any order, on any number of devices. (Programs
    of different batch sizes differ in their last bits. So one program of `chunk` images
    makes all images, the last chunk padded; on a CPU, of one image.)

    It is compiled once for each kind of edit. Sampler, steps, spacing, eta, guidance,
    strength, keys, conditions and images are inputs.

    Args:
      model: With another `latent_shape` it makes images of other sizes than it was
        trained on, with another `precision` it multiplies in that one.
      guided: Whether calls are guided; None leaves it to the settings of each call, and
        compiles the network twice: a call without guidance takes half the time.
      weak: A worse model to be guided away from, instead of "no condition".
      max_steps: Largest number of steps; None for that of the schedule.
      num_frames: Intermediate latents to keep, 0 or 2 to the number of steps + 1.
      tile: Decode in tiles of this many latents; 0 decodes at once.
      layout: Split the images over its devices by `pmap`; `params` and `weak_params`
        are then given as `layout.place` makes them, once.

    Returns:
      The function. Its `cond` is the condition of each image; `uncond` the condition
      that it is guided away from, by default the null condition; `edit` its start. It
      raises `InputError` if the settings or the inputs have no meaning.

    Raises:
      ValueError: If a number is out of range, or the worse model was trained otherwise.
    """
    program = make_program(
        model,
        guided=guided,
        weak=weak,
        max_steps=max_steps,
        num_frames=num_frames,
        tile=tile,
    )
    fn = functools.partial(sample_chunk, program)
    run = jax.jit(fn) if layout is None else layout.map_images(fn)
    devices = 1 if layout is None else len(layout.devices)
    platform = jax.default_backend() if layout is None else layout.platform
    size = images_per_call(model, platform) * devices
    at_once = calls_at_once(model, platform) if devices == 1 else 1
    solver_of = functools.lru_cache(NUM_CACHED)(
        functools.partial(make_solver_inputs, program.solver)
    )

    def sample_fn(
        params: SampleParams,
        keys: Key[Array, " b"],
        cond: ConditionInputs,
        settings: SamplingConfig,
        *,
        uncond: ConditionInputs | None = None,
        weak_params: SampleParams | None = None,
        edit: Edit | None = None,
    ) -> Samples:
        if uncond is None:
            uncond = null_condition(model, cond)
        inputs = ImageInputs(keys, cond, uncond, edit or Edit())
        check_inputs(inputs, num_classes=model.num_classes)
        check_edit(inputs.edit, settings)
        if (weak is None) != (weak_params is None):
            raise InputError("weak_params: wanted with `weak`, and only with it")
        with jax.ensure_compile_time_eval():  # it is cached, and must hold no tracer
            solver = solver_of(settings)
        call = functools.partial(run, Models(params, weak_params), solver)
        images, frames = in_chunks(call, inputs, size=size, at_once=at_once)
        return Samples(images, jnp.moveaxis(frames, 1, 0))

    return sample_fn


def make_program(
    model: LatentDiffusion,
    *,
    guided: bool | None = None,
    weak: LatentDiffusion | None = None,
    max_steps: int | None = None,
    num_frames: int = 0,
    tile: int = 0,
) -> SampleProgram:
    """Check and collect the static part of a sample function; see `make_sample_fn`."""
    most = model.schedule.num_timesteps
    max_steps = most if max_steps is None else max_steps
    if not 1 <= max_steps <= most:
        raise ValueError(f"max_steps: got {max_steps}, wanted 1 to {most}")
    if num_frames and not 2 <= num_frames <= max_steps + 1:
        raise ValueError(
            f"num_frames: got {num_frames}, wanted 0 or 2 to {max_steps + 1}"
        )
    if tile and tile < MIN_DECODER_TILE:
        wanted = f"0, or at least {MIN_DECODER_TILE} latents"
        raise ValueError(f"tile: got {tile}, wanted {wanted}")
    if weak is not None:
        check_weak(model, weak)
        weak = weak._replace(precision=model.precision)
    return SampleProgram(model, weak, guided, max_steps, num_frames, tile)


def make_solver_inputs(spec: SolverSpec, settings: SamplingConfig) -> SolverInputs:
    """Tabulate a sampler and its guidance, in the one shape that a program takes.

    Raises:
      ValueError: If the settings have no meaning for the schedule.
    """
    if settings.steps > spec.max_steps:
        raise ValueError(f"steps: got {settings.steps}, wanted 1 to {spec.max_steps}")
    spacing = cast(SpacingName | None, settings.spacing)
    whole = make_levels(spec.schedule, settings.steps, spacing=spacing)
    levels = whole.tail(steps_of_strength(settings.strength, whole.num_steps))
    most = levels.num_steps + 1
    if spec.num_frames > most:
        raise ValueError(f"num_frames: got {spec.num_frames}, wanted 0 or 2 to {most}")
    table = pad(
        make_sampler_table(spec, levels, settings),
        max_steps=spec.max_steps,
        num_frames=spec.num_frames,
    )
    is_whole = levels.num_steps == whole.num_steps
    solver = SolverInputs(
        table=table,
        first=first_level(levels, sigma_data=spec.sigma_data, is_whole=is_whole),
        is_guided=np.asarray(settings.guided) if spec.asks_if_guided else None,
        scales=call_scales(
            spread_scale(settings.guidance_scale, num_steps=levels.num_steps),
            step=table.table.step,
            ratio=table.table.ratio,
            interval=settings.guided_ratios,
        ),
        rescale=np.asarray(settings.guidance_rescale),
    )
    return jax.tree.map(_single_precision, solver)


def make_sampler_table(
    spec: SolverSpec, levels: Levels, settings: SamplingConfig
) -> Table:
    """Tabulate the sampler of the settings over some levels."""
    tabulate = functools.partial(
        make_table,
        cast(SamplerName, settings.sampler),
        levels,
        prediction=spec.prediction,
        sigma_data=spec.sigma_data,
    )
    if not settings.eta:
        return tabulate()
    # In float32 by the compiler: images with eta keep the bits of earlier versions.
    table = jax.jit(lambda eta: tabulate(eta=eta))(jnp.float32(settings.eta))
    return jax.tree.map(np.asarray, table)


def _single_precision(leaf: np.ndarray) -> Array:
    is_float = np.issubdtype(leaf.dtype, np.floating)
    return jnp.asarray(np.asarray(leaf, np.float32) if is_float else leaf)


def steps_of_strength(strength: float | None, num_steps: int) -> int:
    """Return how many of the last steps change an edited image; None for all."""
    share = 1.0 if strength is None else strength
    if not 0.0 < share <= 1.0:
        raise ValueError(f"strength: got {share}, wanted above 0, at most 1")
    return max(1, round(share * num_steps))


def check_inputs(inputs: ImageInputs, *, num_classes: int) -> None:
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


def check_edit(edit: Edit, settings: SamplingConfig) -> None:
    """Raise `InputError` if parts of an edit are missing."""
    if edit.mask is not None and edit.image is None:
        raise InputError("edit.mask: got it without edit.image")
    between = edit.other_keys is not None or edit.other_cond is not None
    if between != (edit.weight is not None):
        raise InputError(
            "edit.weight: wanted with a second key or condition, and only with one"
        )
    is_partial = settings.strength not in (None, 1.0)
    if is_partial and edit.image is None and edit.latents is None:
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
