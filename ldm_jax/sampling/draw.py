"""Subjects drawn in a studio, call by call."""

import functools
from collections.abc import Iterator
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from ldm_jax.images import to_float, to_uint8
from ldm_jax.models.conditioning import ConditionInputs
from ldm_jax.rng import image_keys
from ldm_jax.sampling.conditions import (
    ConditionTexts,
    ImageSpec,
    condition_inputs,
    source_conditions,
)
from ldm_jax.sampling.editing import Edit, InvertFn, make_invert_fn, masked_inputs
from ldm_jax.sampling.pipeline import Pipeline, images_at_once, make_fn, spread_over
from ldm_jax.sampling.sample_fn import EVERYWHERE
from ldm_jax.types import SpacingName

INVERSION_ITERATIONS = 3


class Picture(NamedTuple):
    """One image made."""

    image: UInt8[np.ndarray, "h w c"]
    """Its pixels."""
    frames: UInt8[np.ndarray, "f h w c"]
    """Its latents on the way, decoded; empty when none were asked for."""


def draw(
    pipeline: Pipeline, specs: list[ImageSpec], *, num_frames: int = 0
) -> Iterator[Picture]:
    """Draw subjects, call by call, in order.

    Args:
      specs: All with, or all without, something to lie between.
      num_frames: Latents to keep on the way, or 0.

    Yields:
      One picture per subject.
    """
    if not specs:
        return
    settings, layout = pipeline.settings, spread_over(pipeline)
    sample_fn = pipeline.sample_fn
    if sample_fn is None:
        guided = (
            any(spec.condition_texts for spec in specs) or pipeline.weak is not None
        )
        sample_fn = make_fn(pipeline, guided=guided, num_frames=num_frames)
    params = pipeline.run.params
    weak_params = pipeline.weak.params if pipeline.weak else None
    if layout is not None:
        params, weak_params = layout.place((params, weak_params))
    given, invert_fn = given_picture(pipeline), invert_fn_of(pipeline)
    scale = settings.guidance_scale
    high = EVERYWHERE[1] if settings.guidance_high is None else settings.guidance_high
    size = images_at_once(pipeline)
    for start in range(0, len(specs), size):
        part = specs[start : start + size]
        condition_texts = [spec.condition_texts for spec in part]
        cond, uncond = condition_inputs(pipeline.run.config, condition_texts)
        samples = sample_fn(
            params,
            image_keys([spec.seed for spec in part]),
            with_picture(cond, given, len(part)),
            jnp.asarray(scale[0] if len(scale) == 1 else scale, jnp.float32),
            settings.eta,
            None if uncond is None else with_picture(uncond, given, len(part)),
            guidance_rescale=settings.guidance_rescale,
            guidance_interval=(settings.guidance_low, high),
            weak_params=weak_params,
            edit=edit_of(pipeline, part, invert_fn),
        )
        images = to_uint8(np.asarray(samples.images))
        frames = [to_uint8(frame) for frame in np.asarray(samples.frames)]
        for i, image in enumerate(images):
            kept = with_kept_pixels(pipeline, image)
            yield Picture(kept, np.stack([kept, *(frame[i] for frame in frames)])[1:])


def given_picture(pipeline: Pipeline) -> Float[Array, "1 h w c"] | None:
    """Prepare the picture that a model is given beside the noise, or None."""
    canvas, concat = pipeline.canvas, pipeline.run.config.diffusion.condition.concat
    if canvas.image is None or concat == "none":
        return None
    image = to_float(jnp.asarray(canvas.image[None]))
    if canvas.mask is None:
        return image
    mask = jnp.asarray(canvas.mask[None] > 0, jnp.float32)
    fn = jax.jit(functools.partial(masked_inputs, pipeline.model))
    return fn(pipeline.run.params, image, mask)


def with_picture(
    cond: ConditionInputs, given: Float[Array, "1 h w c"] | None, num: int
) -> ConditionInputs:
    """Add the picture that a model is given beside what it shows, for each image."""
    return cond if given is None else cond._replace(image=repeated(given, num))


def with_kept_pixels(
    pipeline: Pipeline, image: UInt8[np.ndarray, "h w c"]
) -> UInt8[np.ndarray, "h w c"]:
    """Put back the pixels outside the hole, which a model that fills it also draws."""
    canvas = pipeline.canvas
    if canvas.image is None or canvas.mask is None:
        return image
    return np.where(canvas.mask > 0, image, canvas.image)


def invert_fn_of(pipeline: Pipeline) -> InvertFn | None:
    """Make what finds the noise of a picture, if that is asked for."""
    settings = pipeline.settings
    if not settings.invert:
        return None
    return make_invert_fn(
        pipeline.model,
        num_steps=settings.steps,
        spacing=cast(SpacingName | None, settings.spacing),
        iterations=INVERSION_ITERATIONS,
    )


def edit_of(
    pipeline: Pipeline, specs: list[ImageSpec], invert_fn: InvertFn | None
) -> Edit:
    """Collect what subjects start from.

    Args:
      pipeline: With the canvas.
      specs: Of one call.
      invert_fn: Finds the noise of the canvas' picture; None to start from the picture.

    Returns:
      The edit, by image.
    """
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
        edit = edit._replace(other_cond=condition_inputs(pipeline.run.config, rows)[0])
    canvas, condition = pipeline.canvas, pipeline.run.config.diffusion.condition
    if canvas.image is None or condition.concat != "none":
        return edit
    image = to_float(jnp.asarray(canvas.image[None]))
    if invert_fn is not None:
        return edit._replace(latents=invert(pipeline, invert_fn, image, specs))
    if canvas.mask is not None:
        mask = jnp.asarray(canvas.mask[None] > 0, jnp.float32)
        edit = edit._replace(mask=repeated(mask, num))
    return edit._replace(image=repeated(image, num))


def invert(
    pipeline: Pipeline, invert_fn: InvertFn, image: Array, specs: list[ImageSpec]
) -> Array:
    """Find the noise that a picture comes from, once for all it is told to show."""
    config = pipeline.run.config
    condition_texts = [spec.condition_texts for spec in specs]
    condition_texts = source_conditions(config, pipeline.settings, condition_texts)
    kinds = [
        dict(items)
        for items in dict.fromkeys(tuple(s.items()) for s in condition_texts)
    ]
    cond = condition_inputs(config, kinds)[0]
    found = invert_fn(pipeline.run.params, repeated(image, len(kinds)), cond)
    return found[np.asarray([kinds.index(one) for one in condition_texts])]


def repeated(x: Array, num: int) -> Array:
    """Give every image of a call the same array."""
    return jnp.broadcast_to(x, (num, *x.shape[1:]))
