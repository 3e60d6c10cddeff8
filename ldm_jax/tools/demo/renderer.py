"""What makes a page's images: one compiled program, whatever is wished for."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from ldm_jax.images import encode_png, to_uint8
from ldm_jax.latent_diffusion import calls_at_once, images_per_call
from ldm_jax.rng import image_keys
from ldm_jax.sampling.conditions import condition_inputs, image_specs, prompt_warnings
from ldm_jax.sampling.metadata import make_metadata
from ldm_jax.sampling.pipeline import Pipeline, open_pipeline
from ldm_jax.sampling.sample_fn import SampleFn, make_sample_fn
from ldm_jax.sampling.synthetic_dataset import class_names_of
from ldm_jax.tools.demo.arguments import BrowseRequest
from ldm_jax.tools.demo.controls import (
    Controls,
    Limits,
    limits_of,
    request_of,
    sampling_of,
)
from ldm_jax.types import InputError


class Renderer(NamedTuple):
    """A model and the program that draws with it."""

    pipeline: Pipeline
    """The model, and the settings that no knob moves."""
    fn: SampleFn
    """The program."""
    limits: Limits
    """What may be wished for."""
    names: tuple[str, ...]
    """Of the classes; () where there are none."""


class Drawn(NamedTuple):
    """An image made."""

    seed: int
    """Its own."""
    png: bytes
    """The file that `ldm sample` would write, its recipe included."""


def set_up(request: BrowseRequest) -> Renderer:
    """Load a run and compile the program, by drawing an image.

    Raises:
      InputError: If the run cannot be read, or its settings have no meaning for it.
      RunError: If no checkpoint is intact.
    """
    pipeline = open_pipeline(request.settings)
    settings = pipeline.settings
    limits = limits_of(
        pipeline.model, max_steps=request.max_steps, max_images=request.max_images
    )
    try:
        fn = make_sample_fn(
            pipeline.model,
            guided=None if limits.guided else False,
            max_steps=limits.max_steps,
        )
    except ValueError as error:
        raise InputError(f"--{error}") from None
    renderer = Renderer(
        pipeline,
        fn,
        limits,
        class_names_of(pipeline.model, pipeline.run.config.data, settings),
    )
    some_text = "a" if limits.reads_text else ""
    next(draw(renderer, initial_controls(renderer)._replace(prompt=some_text, steps=1)))
    return renderer


def initial_controls(renderer: Renderer) -> Controls:
    """Say what a page shows before a knob is moved."""
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


def draw(renderer: Renderer, controls: Controls) -> Iterator[Drawn]:
    """Draw what a page wishes for, call by call.

    Args:
      renderer: Of the page.
      controls: Within its limits.

    Yields:
      An image for each seed, with the bits that `controls.command_of` gives it.

    Raises:
      InputError: If the model reads a text and the wish has none.
    """
    pipeline = renderer.pipeline
    params, settings = pipeline.run.params, sampling_of(controls, pipeline.settings)
    specs = image_specs(pipeline.model, request_of(controls), guided=settings.guided)
    platform = jax.default_backend()
    size = images_per_call(pipeline.model, platform)
    at_once = size * calls_at_once(pipeline.model, platform)
    for start in range(0, len(specs), at_once):
        part = specs[start : start + at_once]
        # Filled up here, so that arrays around the program have few shapes too.
        call = part + part[-1:] * (-len(part) % size)
        cond, uncond = condition_inputs(
            pipeline.model, [spec.condition_texts for spec in call]
        )
        keys = image_keys([spec.seed for spec in call])
        images = renderer.fn(params, keys, cond, settings, uncond=uncond).images
        for spec, image in zip(part, to_uint8(np.asarray(images)), strict=False):
            recipe = make_metadata(spec, settings, pipeline.made_with)
            yield Drawn(spec.seed, encode_png(image, recipe))


def doubts(renderer: Renderer, controls: Controls) -> list[str]:
    """Say what of a wish's text the model cannot have understood."""
    return (
        prompt_warnings(renderer.pipeline.model, controls.prompt)
        if controls.prompt
        else []
    )
