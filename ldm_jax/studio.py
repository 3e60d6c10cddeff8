"""A model, its settings and its canvas, ready to draw any number of subjects."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, cast

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8

from ldm_jax.edit import Edit, masked_inputs
from ldm_jax.generate import EVERYWHERE, SampleFn, make_sample_fn
from ldm_jax.images import to_float, to_uint8
from ldm_jax.inversion import InvertFn, make_invert_fn
from ldm_jax.networks import Networks, downsampling
from ldm_jax.nn.conditioning import ConditionInputs
from ldm_jax.pictures import Canvas, lay_canvas
from ldm_jax.requests import Settings
from ldm_jax.rng import image_keys
from ldm_jax.run import Run, load_run, load_weights
from ldm_jax.subjects import Shown, Subject, condition_inputs
from ldm_jax.training.parallel import PmapLayout
from ldm_jax.types import InputError, SamplerName, SpacingName

INVERSION_ITERATIONS = 3


class Picture(NamedTuple):
    """One image made.

    Attributes:
      image: Its pixels.
      frames: Its latents on the way, decoded; empty when none were asked for.
    """

    image: UInt8[np.ndarray, "h w c"]
    frames: UInt8[np.ndarray, "f h w c"]


class Studio(NamedTuple):
    """What draws.

    Attributes:
      run: The model.
      weak: The worse model of autoguidance, or None.
      networks: The model's, at the size of the canvas.
      canvas: The size, and the pictures that were given.
      settings: How to draw.
      layout: The devices.
      made_with: Digests of what was read, and the platform, for the recipe.
    """

    run: Run
    weak: Run | None
    networks: Networks
    canvas: Canvas
    settings: Settings
    layout: PmapLayout
    made_with: dict[str, str]


def open_studio(settings: Settings) -> Studio:
    """Load everything that drawing needs, and check that it fits.

    Raises:
      InputError: If a run or a picture cannot be read, or the settings have no meaning
        for the model.
      RunError: If no checkpoint is intact.
    """
    run = open_run(settings)
    canvas = lay_canvas(run.config, settings)
    factor = downsampling(run.networks)
    shape = (canvas.height // factor, canvas.width // factor)
    networks = run.networks._replace(
        latent_shape=(*shape, run.networks.latent_shape[-1])
    )
    weak = None
    if settings.autoguidance is not None:
        weak = load_run(settings.autoguidance, step=settings.autoguidance_step)
    layout = PmapLayout()
    device = layout.devices[0]
    made_with = {
        "checkpoint": run.digest,
        **({"autoguidance_checkpoint": weak.digest} if weak else {}),
        **canvas.digests,
        "chunk": str(networks.chunk),
        "platform": f"{device.platform} {device.device_kind}",
    }
    studio = Studio(run, weak, networks, canvas, settings, layout, made_with)
    try:
        make_fn(studio, guided=True, num_frames=0)
    except ValueError as error:
        raise InputError(f"--{error}") from None
    return studio


def open_run(settings: Settings) -> Run:
    """Load the run or the weights that settings name."""
    tokenizer = None if settings.tokenizer is None else Path(settings.tokenizer)
    if settings.workdir is not None:
        return load_run(settings.workdir, tokenizer=tokenizer)
    config = settings.config_file
    return load_weights(
        Path(str(settings.weights)),
        config_file=None if config is None else Path(config),
        tokenizer=tokenizer,
    )


def make_fn(studio: Studio, *, guided: bool, num_frames: int) -> SampleFn:
    """Make the sample function of a studio.

    Raises:
      ValueError: If the settings have no meaning for the model.
    """
    settings, weak = studio.settings, studio.weak
    shape = studio.networks.latent_shape
    return make_sample_fn(
        studio.networks,
        sampler=cast(SamplerName, settings.sampler),
        num_steps=settings.num_steps,
        spacing=cast(SpacingName | None, settings.spacing),
        guided=guided and settings.guided,
        weak=weak.networks._replace(latent_shape=shape) if weak else None,
        strength=settings.strength,
        num_frames=num_frames,
        tile=settings.tile,
        layout=studio.layout,
    )


def images_a_call(studio: Studio) -> int:
    """Return how many images all devices make at once."""
    return studio.networks.chunk * len(studio.layout.devices)


def draw(
    studio: Studio, subjects: list[Subject], *, num_frames: int = 0
) -> Iterator[Picture]:
    """Draw subjects, call by call, in order.

    Args:
      studio: Of the model.
      subjects: All with, or all without, something to lie between.
      num_frames: Latents to keep on the way, or 0.

    Yields:
      One picture per subject.
    """
    settings, layout = studio.settings, studio.layout
    guided = any(subject.shown for subject in subjects) or studio.weak is not None
    sample_fn = make_fn(studio, guided=guided, num_frames=num_frames)
    params = layout.replicate(studio.run.params)
    weak_params = layout.replicate(studio.weak.params) if studio.weak else None
    invert_fn = None
    if settings.invert:
        invert_fn = make_invert_fn(
            studio.networks,
            num_steps=settings.num_steps,
            spacing=cast(SpacingName | None, settings.spacing),
            iterations=INVERSION_ITERATIONS,
        )
    scale = settings.guidance_scale
    size = images_a_call(studio)
    for start in range(0, len(subjects), size):
        part = subjects[start : start + size]
        shown = [subject.shown for subject in part]
        cond, uncond = condition_inputs(studio.run.config, shown)
        samples = sample_fn(
            params,
            image_keys([subject.seed for subject in part]),
            with_picture(studio, cond, len(part)),
            jnp.asarray(scale if len(scale) > 1 else scale[0], jnp.float32),
            settings.eta,
            None if uncond is None else with_picture(studio, uncond, len(part)),
            guidance_rescale=settings.guidance_rescale,
            guidance_interval=settings.guidance_interval or EVERYWHERE,
            weak_params=weak_params,
            edit=edit_of(studio, part, invert_fn),
        )
        images = to_uint8(np.asarray(samples.images))
        frames = to_uint8(np.asarray(samples.frames))
        for i, image in enumerate(images):
            yield Picture(image, frames[:, i])


def with_picture(studio: Studio, cond: ConditionInputs, num: int) -> ConditionInputs:
    """Add the picture that a model is given beside what it shows, for each image."""
    canvas, concat = studio.canvas, studio.run.config.diffusion.condition.concat
    if canvas.image is None or concat == "none":
        return cond
    given = to_float(jnp.asarray(canvas.image[None]))
    if concat == "masked_image" and canvas.mask is not None:
        mask = jnp.asarray(canvas.mask[None] > 0, jnp.float32)
        given = masked_inputs(studio.networks, studio.run.params, given, mask)
    return cond._replace(image=repeated(given, num))


def edit_of(
    studio: Studio, subjects: list[Subject], invert_fn: InvertFn | None
) -> Edit:
    """Collect what subjects start from.

    Args:
      studio: With the canvas.
      subjects: Of one call.
      invert_fn: Finds the noise of the canvas' picture; None to start from the picture.

    Returns:
      The edit, by image.
    """
    first, num = subjects[0], len(subjects)
    edit = Edit()
    if first.other is not None or first.other_seed is not None:
        edit = edit._replace(
            weight=jnp.asarray([subject.weight for subject in subjects], jnp.float32)
        )
    if first.other_seed is not None:
        seeds = [cast(int, subject.other_seed) for subject in subjects]
        edit = edit._replace(other_keys=image_keys(seeds))
    if first.other is not None:
        rows = [cast(Shown, subject.other) for subject in subjects]
        edit = edit._replace(other_cond=condition_inputs(studio.run.config, rows)[0])
    canvas, condition = studio.canvas, studio.run.config.diffusion.condition
    if canvas.image is None or condition.concat != "none":
        return edit
    image = to_float(jnp.asarray(canvas.image[None]))
    if invert_fn is not None:
        return edit._replace(latents=invert(studio, invert_fn, image, subjects))
    if canvas.mask is not None:
        mask = jnp.asarray(canvas.mask[None] > 0, jnp.float32)
        edit = edit._replace(mask=repeated(mask, num))
    return edit._replace(image=repeated(image, num))


def invert(
    studio: Studio, invert_fn: InvertFn, image: Array, subjects: list[Subject]
) -> Array:
    """Find the noise that a picture comes from, whatever it is told to show."""
    config, source = studio.run.config, studio.settings.source
    shown = [subject.shown for subject in subjects]
    if source is not None:
        keyword = "label" if config.diffusion.condition.uses_classes else "prompt"
        top = config.data.num_classes - 1
        if keyword == "label" and not (source.isdigit() and int(source) <= top):
            raise InputError(f"--source: got {source!r}, wanted a class, 0 to {top}")
        shown = [{keyword: source}] * len(subjects)
    images = repeated(image, len(subjects))
    return invert_fn(studio.run.params, images, condition_inputs(config, shown)[0])


def repeated(x: Array, num: int) -> Array:
    """Give every image of a call the same array."""
    return jnp.broadcast_to(x, (num, *x.shape[1:]))
