"""What makes a page's images: one compiled program, whatever is wished for."""

from collections.abc import Iterator
from typing import NamedTuple, cast

import jax
import numpy as np

from ldm_jax.any_steps import AnyStepsFn, make_any_steps_fn
from ldm_jax.browse.request import BrowseRequest
from ldm_jax.browse.wish import Limits, Wish, limits_of, request_of
from ldm_jax.images import encode_png, to_uint8
from ldm_jax.networks import calls_at_once, images_a_call
from ldm_jax.recipes import write_recipe
from ldm_jax.rng import image_keys
from ldm_jax.studio import Studio, open_studio
from ldm_jax.subjects import condition_inputs, doubts_about, subjects_of
from ldm_jax.synthetic import class_names_of
from ldm_jax.types import InputError, SamplerName, SpacingName


class Easel(NamedTuple):
    """A model and the program that draws with it.

    Attributes:
      studio: The model, and the settings that no knob moves.
      fn: The program.
      limits: What may be wished for.
      names: Of the classes; () where there are none.
    """

    studio: Studio
    fn: AnyStepsFn
    limits: Limits
    names: tuple[str, ...]


class Drawn(NamedTuple):
    """An image made.

    Attributes:
      seed: Its own.
      png: The file that `sample.py` would write, its recipe included.
    """

    seed: int
    png: bytes


def set_up(request: BrowseRequest) -> Easel:
    """Load a run and compile the program, by drawing an image.

    Raises:
      InputError: If the run cannot be read, or its settings have no meaning for it.
      RunError: If no checkpoint is intact.
    """
    studio = open_studio(request.settings)
    config, settings = studio.run.config, studio.settings
    limits = limits_of(
        config, max_steps=request.max_steps, max_images=request.max_images
    )
    try:
        fn = make_any_steps_fn(
            studio.networks,
            sampler=cast(SamplerName, settings.sampler),
            max_steps=limits.max_steps,
            spacing=cast(SpacingName | None, settings.spacing),
            guided=limits.guided,
        )
    except ValueError as error:
        raise InputError(f"--{error}") from None
    easel = Easel(studio, fn, limits, class_names_of(config, settings))
    some_text = "a" if limits.reads_text else ""
    next(draw(easel, first_wish(easel)._replace(prompt=some_text, steps=1)))
    return easel


def first_wish(easel: Easel) -> Wish:
    """Say what a page shows before a knob is moved."""
    settings, limits = easel.studio.settings, easel.limits
    return Wish(
        seed=0,
        num_images=min(4, limits.max_images),
        steps=settings.steps,
        guidance_scale=settings.guidance_scale[0] if limits.guided else 1.0,
        label=0 if limits.num_classes else None,
        prompt="",
        negative_prompt="",
    )


def draw(easel: Easel, wish: Wish) -> Iterator[Drawn]:
    """Draw what a page wishes for, call by call.

    Args:
      easel: Of the page.
      wish: Within its limits.

    Yields:
      An image for each seed, with the bits that `wish.command_of` gives it.

    Raises:
      InputError: If the model reads a text and the wish has none.
    """
    studio = easel.studio
    config, params = studio.run.config, studio.run.params
    request = request_of(wish, studio.settings)
    subjects = subjects_of(config, request)
    platform = jax.default_backend()
    size = images_a_call(studio.networks, platform)
    at_once = size * calls_at_once(studio.networks, platform)
    for start in range(0, len(subjects), at_once):
        part = subjects[start : start + at_once]
        # Filled up here, so that arrays around the program have few shapes too.
        call = part + part[-1:] * (-len(part) % size)
        cond, uncond = condition_inputs(config, [subject.shown for subject in call])
        images = easel.fn(
            params,
            image_keys([subject.seed for subject in call]),
            cond,
            wish.steps,
            wish.guidance_scale,
            uncond,
        )
        for subject, image in zip(part, to_uint8(np.asarray(images)), strict=False):
            recipe = write_recipe(subject, request.settings, studio.made_with)
            yield Drawn(subject.seed, encode_png(image, recipe))


def doubts(easel: Easel, wish: Wish) -> list[str]:
    """Say what of a wish's text the model cannot have understood."""
    return doubts_about(easel.studio.run.config, wish.prompt) if wish.prompt else []
