"""The images of the page, made by one compiled program."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from ldm_jax.images import encode_png, to_uint8
from ldm_jax.latent_diffusion import LatentDiffusion, calls_at_once, images_per_call
from ldm_jax.rng import image_keys
from ldm_jax.sampling.conditions import condition_inputs, image_specs
from ldm_jax.sampling.metadata import make_metadata
from ldm_jax.sampling.pipeline import Pipeline, open_pipeline
from ldm_jax.sampling.sample_fn import SampleFn, make_sample_fn
from ldm_jax.sampling.synthetic_dataset import class_names_of
from ldm_jax.tools.demo.controls import (
    Controls,
    DemoRequest,
    Limits,
    request_of,
    sampling_of,
)
from ldm_jax.types import InputError


class Renderer(NamedTuple):
    """A model with its sample program and the limits of its page."""

    pipeline: Pipeline
    """The model, and the settings that no control changes."""
    fn: SampleFn
    """The sample program."""
    limits: Limits
    """Limits of the controls."""
    class_names: tuple[str, ...]
    """Names of the classes; () where there are none."""


class RenderedImage(NamedTuple):
    """An image made."""

    seed: int
    """Its seed."""
    png: bytes
    """The PNG that `ldm sample` would write, with its metadata."""


def make_renderer(request: DemoRequest) -> Renderer:
    """Load a run, and compile its program by making an image.

    Raises:
      InputError: If the run cannot be read, or its settings have no meaning for it.
      RunError: If no checkpoint is intact.
    """
    pipeline = open_pipeline(request.settings)
    model, settings = pipeline.model, pipeline.settings
    limits = _limits(model, request)
    guided = None if limits.guided else False
    try:
        fn = make_sample_fn(model, guided=guided, max_steps=limits.max_steps)
    except ValueError as error:
        raise InputError(f"--{error}") from None
    names = class_names_of(model, pipeline.run.config.data, settings)
    renderer = Renderer(pipeline, fn, limits, names)
    prompt = "a" if limits.reads_text else ""
    next(render(renderer, first_controls(renderer)._replace(prompt=prompt, steps=1)))
    return renderer


def _limits(model: LatentDiffusion, request: DemoRequest) -> Limits:
    condition = model.condition
    return Limits(
        max_steps=request.max_steps,
        max_images=request.max_images,
        num_classes=model.num_classes if condition.uses_classes else 0,
        reads_text=condition.uses_tokens,
    )


def first_controls(renderer: Renderer) -> Controls:
    """Return the first values of the controls."""
    settings, limits = renderer.pipeline.settings, renderer.limits
    return Controls(
        seed=0,
        num_images=min(4, limits.max_images),
        steps=settings.steps,
        guidance_scale=settings.guidance_scale[0] if limits.guided else 1.0,
        label=0 if limits.num_classes else None,
        prompt="",
        negative_prompt="",
    )


def render(renderer: Renderer, controls: Controls) -> Iterator[RenderedImage]:
    """Make the images that the controls select, call by call.

    Yields:
      An image for each seed, with the bits that `ldm sample` gives it.

    Raises:
      InputError: If the model reads text and there is no prompt.
    """
    pipeline = renderer.pipeline
    params, settings = pipeline.run.params, sampling_of(controls, pipeline.settings)
    specs = image_specs(pipeline.model, request_of(controls), guided=settings.guided)
    platform = jax.default_backend()
    size = images_per_call(pipeline.model, platform)
    at_once = size * calls_at_once(pipeline.model, platform)
    for start in range(0, len(specs), at_once):
        part = specs[start : start + at_once]
        # Padded here, so that arrays around the program have few shapes too.
        call = part + part[-1:] * (-len(part) % size)
        rows = [spec.condition_texts for spec in call]
        cond, uncond = condition_inputs(pipeline.model, rows)
        keys = image_keys([spec.seed for spec in call])
        images = renderer.fn(params, keys, cond, settings, uncond=uncond).images
        for spec, image in zip(part, to_uint8(np.asarray(images)), strict=False):
            metadata = make_metadata(spec, settings, pipeline.made_with)
            yield RenderedImage(spec.seed, encode_png(image, metadata))
