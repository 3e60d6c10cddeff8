"""A model, its settings and its canvas, ready to draw any number of subjects."""

import dataclasses
from pathlib import Path
from typing import NamedTuple, cast

import jax
import numpy as np

from ldm_jax.config import Config
from ldm_jax.config import digest as config_digest
from ldm_jax.latent_diffusion import (
    LatentDiffusion,
    calls_at_once,
    images_per_call,
)
from ldm_jax.parallel.launch import num_cores
from ldm_jax.parallel.make_layout import PmapLayout
from ldm_jax.pretrained.load_run import Run, load_run, load_weights
from ldm_jax.sampling.conditions import check_settings
from ldm_jax.sampling.input_images import Canvas, lay_canvas
from ldm_jax.sampling.sample_fn import SampleFn, make_sample_fn
from ldm_jax.sampling.sampling_config import SamplingConfig
from ldm_jax.types import InputError, PyTree, SamplerName, SpacingName

STRENGTH_OF_IMAGE = 0.75


class Pipeline(NamedTuple):
    """What draws."""

    run: Run
    """The model."""
    weak: Run | None
    """The worse model of autoguidance, or None."""
    model: LatentDiffusion
    """The model's, at the size of the canvas."""
    canvas: Canvas
    """The size, and the pictures that were given."""
    settings: SamplingConfig
    """How to draw, with the strength that was meant."""
    layout: PmapLayout
    """The devices."""
    made_with: dict[str, str]
    """Digests of what was read, and the platform, for the recipe."""
    sample_fn: SampleFn | None = None
    """Made before, for who draws again and again; None makes one each time."""


def open_pipeline(settings: SamplingConfig) -> Pipeline:
    """Load everything that drawing needs, and check that it fits.

    Raises:
      InputError: If a run or a picture cannot be read, or the settings have no meaning
        for the model.
      RunError: If no checkpoint is intact.
    """
    return make_pipeline(open_run(settings), settings)


def make_pipeline(run: Run, settings: SamplingConfig) -> Pipeline:
    """Make a studio of a model that is at hand.

    Raises:
      InputError: If a picture cannot be read, or the settings have no meaning for the
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
    check_settings(run.config, settings)
    settings = with_strength(run.config, settings)
    canvas = lay_canvas(run.config, settings)
    factor = run.model.downsampling
    shape = (canvas.height // factor, canvas.width // factor)
    model = run.model._replace(latent_shape=(*shape, run.model.latent_shape[-1]))
    weak = open_weak(run, settings)
    layout = PmapLayout()
    made_with = {
        "checkpoint": run.digest,
        **({"autoguidance_checkpoint": weak.digest} if weak else {}),
        **({"config": config_digest(run.config)} if settings.config_file else {}),
        **canvas.digests,
        "chunk": str(model.chunk),
        "platform": platform_text(layout),
    }
    pipeline = Pipeline(run, weak, model, canvas, settings, layout, made_with)
    try:
        make_fn(pipeline, guided=True, num_frames=0)
    except ValueError as error:
        raise InputError(f"--{error}") from None
    return pipeline


def with_strength(config: Config, settings: SamplingConfig) -> SamplingConfig:
    """Say the strength that was meant where a picture is changed, and where not, none.

    A picture that is changed keeps some of itself; a hole, a margin, and what a model
    is given beside the noise are drawn from noise alone.
    """
    changed = settings.image is not None and not settings.invert
    if not changed or config.diffusion.condition.concat != "none":
        return dataclasses.replace(settings, strength=None)
    if settings.strength is not None:
        return settings
    hole = settings.mask is not None or settings.outpaint is not None
    return dataclasses.replace(settings, strength=1.0 if hole else STRENGTH_OF_IMAGE)


def open_weak(run: Run, settings: SamplingConfig) -> Run | None:
    """Load the worse model of autoguidance, if one is named.

    Raises:
      InputError: If it cannot be read, or is not one of the same kind.
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
    ours, theirs = (reads(one.config) for one in (run, weak))
    if different := [name for name in ours if ours[name] != theirs[name]]:
        name = different[0]
        raise InputError(
            f"--autoguidance: the worse model has {name} {theirs[name]}, wanted "
            f"{ours[name]} as the model has"
        )
    stages = [(m.params.autoencoder, m.params.latent_scale) for m in (run, weak)]
    if not same_arrays(*stages):
        raise InputError(
            f"--autoguidance: {path} has another first stage, wanted one trained on "
            "the same; try train.py --first-stage"
        )
    return weak


def reads(config: Config) -> dict[str, object]:
    """Say what a model is told of an image, by name."""
    condition = config.diffusion.condition
    return {
        "classes": config.data.num_classes if condition.uses_classes else 0,
        "tokens": condition.num_tokens,
        "vocabulary": condition.vocab_size,
        "concat": condition.concat,
        "autoencoder": config.autoencoder.channel_multipliers,
    }


def same_arrays(ours: PyTree, theirs: PyTree) -> bool:
    """Say whether two trees hold the same arrays, to the last bit."""
    if jax.tree.structure(ours) != jax.tree.structure(theirs):
        return False
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, ours, theirs)))


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


def make_fn(pipeline: Pipeline, *, guided: bool, num_frames: int) -> SampleFn:
    """Make the sample function of a studio.

    Raises:
      ValueError: If the settings have no meaning for the model.
    """
    settings, weak = pipeline.settings, pipeline.weak
    shape = pipeline.model.latent_shape
    return make_sample_fn(
        pipeline.model,
        sampler=cast(SamplerName, settings.sampler),
        num_steps=settings.steps,
        spacing=cast(SpacingName | None, settings.spacing),
        guided=guided and settings.guided,
        weak=weak.model._replace(latent_shape=shape) if weak else None,
        strength=1.0 if settings.strength is None else settings.strength,
        num_frames=num_frames,
        tile=settings.tile,
        layout=spread_over(pipeline),
    )


def platform_text(layout: PmapLayout) -> str:
    """Say what the bits of an image depend on beside the versions: the processor.

    On a CPU also the number of its cores, since XLA cuts its work by them.
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


def spread_over(pipeline: Pipeline) -> PmapLayout | None:
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
