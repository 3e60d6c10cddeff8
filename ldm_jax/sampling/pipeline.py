"""A model with its sampling settings and input images, ready to make images."""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from ldm_jax.config import digest as config_digest
from ldm_jax.images import to_float, to_uint8
from ldm_jax.latent_diffusion import (
    LatentDiffusion,
    autoencoder_bytes,
    calls_at_once,
    images_per_call,
    unet_bytes,
)
from ldm_jax.models.conditioning import ConditionInputs
from ldm_jax.parallel.launch import num_cores
from ldm_jax.parallel.make_layout import PmapLayout
from ldm_jax.parallel.memory import check_fits
from ldm_jax.pretrained.load_run import Run, load_run, load_weights
from ldm_jax.rng import image_keys
from ldm_jax.sampling.conditions import (
    ConditionTexts,
    ImageSpec,
    check_settings,
    condition_inputs,
    source_conditions,
)
from ldm_jax.sampling.editing import Edit, InvertFn, make_invert_fn, masked_inputs
from ldm_jax.sampling.input_images import InputImages, read_input_images
from ldm_jax.sampling.sample_fn import (
    SampleFn,
    make_program,
    make_sample_fn,
    make_solver_inputs,
)
from ldm_jax.sampling.sampling_config import SamplingConfig
from ldm_jax.types import USUAL_PRECISION, InputError, PyTree

STRENGTH_OF_IMAGE = 0.75
INVERSION_ITERATIONS = 3


class Pipeline(NamedTuple):
    """A model with the settings of its images, without seeds and conditions."""

    run: Run
    """The model and its parameters."""
    weak: Run | None
    """The worse model of autoguidance, or None."""
    model: LatentDiffusion
    """The run's model, at the size of the images to make."""
    inputs: InputImages
    """The image and mask of an edit, and the size."""
    settings: SamplingConfig
    """Settings of the images, with defaults resolved."""
    layout: PmapLayout
    """The devices."""
    made_with: dict[str, str]
    """Digests of the files read, and the platform, for the metadata."""
    sample_fn: SampleFn | None = None
    """Sample function of all calls; None makes one for each call."""


class SampledImage(NamedTuple):
    """A sampled image."""

    image: UInt8[np.ndarray, "h w c"]
    """Its pixels."""
    frames: UInt8[np.ndarray, "f h w c"]
    """Its decoded latents during sampling; empty if none were requested."""


def open_pipeline(settings: SamplingConfig) -> Pipeline:
    """Load everything that sampling needs, and check that it fits.

    Raises:
      InputError: If a run or an image cannot be read, or the settings have no meaning
        for the model.
      RunError: If no checkpoint is intact.
    """
    return make_pipeline(open_run(settings), settings)


def make_pipeline(run: Run, settings: SamplingConfig) -> Pipeline:
    """Make a pipeline of a loaded run.

    Raises:
      InputError: If an image cannot be read, or the settings have no meaning for the
        model.
      RunError: If the worse model of autoguidance has no intact checkpoint.
    """
    if settings.step not in (None, run.step):
        raise InputError(
            f"--step: got {settings.step}, but {settings.workdir} holds weights alone, "
            "without checkpoints; wanted none"
        )
    if settings.workdir is not None and run.step:
        settings = dataclasses.replace(settings, step=run.step)
    check_settings(run.model, settings)
    settings = with_strength(run.model, settings)
    inputs = read_input_images(run.model, settings)
    factor = run.model.downsampling
    shape = (inputs.height // factor, inputs.width // factor)
    model = run.model._replace(
        latent_shape=(*shape, run.model.latent_shape[-1]),
        precision=settings.precision or run.model.precision,
    )
    layout = PmapLayout()
    check_memory(model, settings, layout)
    weak = open_weak(run, settings)
    made_with = {
        "checkpoint": run.digest,
        **({"autoguidance_checkpoint": weak.digest} if weak else {}),
        **({"config": config_digest(run.config)} if settings.config_file else {}),
        **inputs.digests,
        "chunk": str(model.chunk),
        "platform": platform_text(layout),
        **_named_precision(model),
    }
    pipeline = Pipeline(run, weak, model, inputs, settings, layout, made_with)
    try:
        program = make_program(model, weak=_weak_model(pipeline), tile=settings.tile)
        make_solver_inputs(program.solver, settings)
    except ValueError as error:
        raise InputError(f"--{error}") from None
    return pipeline


def _named_precision(model: LatentDiffusion) -> dict[str, str]:
    """Name the precision of products, unless it is the usual one."""
    usual = model.precision == USUAL_PRECISION
    return {} if usual else {"precision": model.precision}


def check_memory(
    model: LatentDiffusion, settings: SamplingConfig, layout: PmapLayout
) -> None:
    """Raise `InputError` if an array of the images cannot fit a device.

    Args:
      model: At the size of the images to make.
    """
    flags = ("outpaint", "size", "image", "workdir", "weights")
    flag = next(name for name in flags if getattr(settings, name) is not None)
    height, width, _ = model.latent_shape
    height, width = height * model.downsampling, width * model.downsampling
    platform, num = layout.platform, images_per_call(model, layout.platform)
    sizes = [unet_bytes(model, platform)]
    if not settings.tile:
        sizes.append(autoencoder_bytes(model, platform))
    check_fits(
        max(sizes) * num,
        layout.devices[0],
        what=f"--{flag}: got {height}x{width} pixels, of which an array is",
        remedy="smaller images" if settings.tile else "smaller images, or --tile 64",
    )


def with_strength(model: LatentDiffusion, settings: SamplingConfig) -> SamplingConfig:
    """Resolve the strength of an edit; None where the image is not the start.

    A changed image keeps part of itself. A hole, a margin, and images of models that
    are conditioned on an image are sampled from noise alone.
    """
    changed = settings.image is not None and not settings.invert
    if not changed or model.condition.concat != "none":
        return dataclasses.replace(settings, strength=None)
    if settings.strength is not None:
        return settings
    hole = settings.mask is not None or settings.outpaint is not None
    return dataclasses.replace(settings, strength=1.0 if hole else STRENGTH_OF_IMAGE)


def open_run(settings: SamplingConfig) -> Run:
    """Load the run or the weights that settings name."""
    tokenizer = None if settings.tokenizer is None else Path(settings.tokenizer)
    if settings.workdir is not None:
        return load_run(
            settings.workdir,
            tokenizer=tokenizer,
            step=settings.step,
            ema_length=settings.ema_length,
        )
    config = settings.config_file
    return load_weights(
        Path(str(settings.weights)),
        config_file=None if config is None else Path(config),
        tokenizer=tokenizer,
    )


def open_weak(run: Run, settings: SamplingConfig) -> Run | None:
    """Load the worse model of autoguidance, if one is named.

    Raises:
      InputError: If it cannot be read, or has other conditions or another autoencoder.
    """
    path, step = settings.autoguidance, settings.autoguidance_step
    if path is None:
        return None
    try:
        weak = load_run(path, step=step)
    except InputError as error:
        raise InputError(f"--autoguidance: {error}") from None
    if step is not None and weak.step != step:
        raise InputError(
            f"--autoguidance-step: got {step}, but {path} holds weights alone, without "
            "checkpoints; wanted none"
        )
    ours, theirs = (_comparable_facts(one.model) for one in (run, weak))
    if different := [name for name in ours if ours[name] != theirs[name]]:
        name = different[0]
        raise InputError(
            f"--autoguidance: the worse model has {name} {theirs[name]}, wanted "
            f"{ours[name]} as the model has"
        )
    stages = [(m.params.autoencoder, m.params.latent_scale) for m in (run, weak)]
    if not _same_arrays(*stages):
        raise InputError(
            f"--autoguidance: {path} has another first stage, wanted one trained on "
            "the same; try ldm train --first-stage"
        )
    return weak


def _comparable_facts(model: LatentDiffusion) -> dict[str, object]:
    """List the facts that must be equal in two models for autoguidance, by name."""
    condition = model.condition
    return {
        "classes": model.num_classes if condition.uses_classes else 0,
        "tokens": condition.num_tokens,
        "vocabulary": condition.vocab_size,
        "concat": condition.concat,
        "autoencoder": model.autoencoder.channel_multipliers,
    }


def _same_arrays(ours: PyTree, theirs: PyTree) -> bool:
    """Return whether two trees hold the same arrays, to the last bit."""
    if jax.tree.structure(ours) != jax.tree.structure(theirs):
        return False
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, ours, theirs)))


def make_fn(pipeline: Pipeline, *, guided: bool, num_frames: int) -> SampleFn:
    """Make the sample function of a pipeline."""
    settings = pipeline.settings
    return make_sample_fn(
        pipeline.model,
        guided=guided and settings.guided,
        weak=_weak_model(pipeline),
        num_frames=num_frames,
        tile=settings.tile,
        layout=_split_layout(pipeline),
    )


def _weak_model(pipeline: Pipeline) -> LatentDiffusion | None:
    """Return the worse model of autoguidance, at the size of the images to make."""
    if pipeline.weak is None:
        return None
    shape = pipeline.model.latent_shape
    return pipeline.weak.model._replace(latent_shape=shape)


def platform_text(layout: PmapLayout) -> str:
    """Name the processor, which the bits of an image depend on.

    On a CPU also the number of its cores, since XLA divides its work by them.
    """
    device = layout.devices[0]
    text = f"{layout.platform} {device.device_kind}"
    if layout.platform != "cpu":
        return text
    cores = num_cores()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    return f"cpu {names[0] if names else device.device_kind}, {cores} cores"


def _split_layout(pipeline: Pipeline) -> PmapLayout | None:
    """Return the layout where there are several devices, or None for one alone."""
    return pipeline.layout if len(pipeline.layout.devices) > 1 else None


def images_per_round(pipeline: Pipeline) -> int:
    """Return how many images all devices make in one call each."""
    layout = pipeline.layout
    return images_per_call(pipeline.model, layout.platform) * len(layout.devices)


def images_at_once(pipeline: Pipeline) -> int:
    """Return how many images are made at once: by all devices, or by calls of one."""
    layout = pipeline.layout
    calls = 1
    if len(layout.devices) == 1:
        calls = calls_at_once(pipeline.model, layout.platform)
    return images_per_round(pipeline) * calls


def sample_images(
    pipeline: Pipeline, specs: list[ImageSpec], *, num_frames: int = 0
) -> Iterator[SampledImage]:
    """Make images, call by call, in order.

    Args:
      specs: All of them interpolated, or none.
      num_frames: Latents to keep during sampling, or 0.

    Yields:
      One image for each spec.
    """
    if not specs:
        return
    settings, layout = pipeline.settings, _split_layout(pipeline)
    sample_fn = pipeline.sample_fn
    if sample_fn is None:
        conditioned = any(spec.condition_texts for spec in specs)
        guided = conditioned or pipeline.weak is not None
        sample_fn = make_fn(pipeline, guided=guided, num_frames=num_frames)
    params = pipeline.run.params
    weak_params = pipeline.weak.params if pipeline.weak else None
    if layout is not None:
        params, weak_params = layout.place((params, weak_params))
    concat, invert_fn = _concat_input(pipeline), _invert_fn(pipeline)
    size = images_at_once(pipeline)
    for start in range(0, len(specs), size):
        part = specs[start : start + size]
        rows = [spec.condition_texts for spec in part]
        cond, uncond = condition_inputs(pipeline.model, rows)
        samples = sample_fn(
            params,
            image_keys([spec.seed for spec in part]),
            _with_image(cond, concat, len(part)),
            settings,
            uncond=None if uncond is None else _with_image(uncond, concat, len(part)),
            weak_params=weak_params,
            edit=_edit(pipeline, part, invert_fn),
        )
        images = to_uint8(np.asarray(samples.images))
        frames = [to_uint8(frame) for frame in np.asarray(samples.frames)]
        for i, image in enumerate(images):
            kept = _with_kept_pixels(pipeline, image)
            of_image = np.stack([kept, *(frame[i] for frame in frames)])[1:]
            yield SampledImage(kept, of_image)


def _concat_input(pipeline: Pipeline) -> Float[Array, "1 h w c"] | None:
    """Prepare the image that a model is conditioned on, or None."""
    inputs = pipeline.inputs
    if inputs.image is None or pipeline.model.condition.concat == "none":
        return None
    image = to_float(jnp.asarray(inputs.image[None]))
    if inputs.mask is None:
        return image
    mask = jnp.asarray(inputs.mask[None] > 0, jnp.float32)
    fn = jax.jit(functools.partial(masked_inputs, pipeline.model))
    return fn(pipeline.run.params, image, mask)


def _with_image(
    cond: ConditionInputs, image: Float[Array, "1 h w c"] | None, num: int
) -> ConditionInputs:
    """Add the image that a model is conditioned on to each image of a call."""
    return cond if image is None else cond._replace(image=_repeated(image, num))


def _with_kept_pixels(
    pipeline: Pipeline, image: UInt8[np.ndarray, "h w c"]
) -> UInt8[np.ndarray, "h w c"]:
    """Put back the pixels outside the mask, which an inpainting model also changes."""
    inputs = pipeline.inputs
    if inputs.image is None or inputs.mask is None:
        return image
    return np.where(inputs.mask > 0, image, inputs.image)


def _invert_fn(pipeline: Pipeline) -> InvertFn | None:
    """Make the function that inverts an image, if that is requested."""
    settings = pipeline.settings
    if not settings.invert:
        return None
    return make_invert_fn(
        pipeline.model,
        num_steps=settings.steps,
        spacing=settings.spacing,
        iterations=INVERSION_ITERATIONS,
    )


def _edit(
    pipeline: Pipeline, specs: list[ImageSpec], invert_fn: InvertFn | None
) -> Edit:
    """Collect the starts of the images of one call."""
    first, num = specs[0], len(specs)
    edit = Edit()
    if first.other is not None or first.other_seed is not None:
        edit = edit._replace(
            weight=jnp.asarray([spec.weight for spec in specs], jnp.float32)
        )
    if first.other_seed is not None:
        seeds = [cast(int, spec.other_seed) for spec in specs]
        edit = edit._replace(other_keys=image_keys(seeds))
    if first.other is not None:
        rows = [cast(ConditionTexts, spec.other) for spec in specs]
        edit = edit._replace(other_cond=condition_inputs(pipeline.model, rows)[0])
    inputs = pipeline.inputs
    if inputs.image is None or pipeline.model.condition.concat != "none":
        return edit
    image = to_float(jnp.asarray(inputs.image[None]))
    if invert_fn is not None:
        return edit._replace(latents=_invert(pipeline, invert_fn, image, specs))
    if inputs.mask is not None:
        mask = jnp.asarray(inputs.mask[None] > 0, jnp.float32)
        edit = edit._replace(mask=_repeated(mask, num))
    return edit._replace(image=_repeated(image, num))


def _invert(
    pipeline: Pipeline, invert_fn: InvertFn, image: Array, specs: list[ImageSpec]
) -> Array:
    """Invert an image, once for each condition."""
    rows = [spec.condition_texts for spec in specs]
    rows = source_conditions(pipeline.model, pipeline.settings, rows)
    kinds = [dict(items) for items in dict.fromkeys(tuple(r.items()) for r in rows)]
    cond = condition_inputs(pipeline.model, kinds)[0]
    found = invert_fn(pipeline.run.params, _repeated(image, len(kinds)), cond)
    return found[np.asarray([kinds.index(row) for row in rows])]


def _repeated(x: Array, num: int) -> Array:
    """Repeat an array for every image of a call."""
    return jnp.broadcast_to(x, (num, *x.shape[1:]))
