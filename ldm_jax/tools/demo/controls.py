"""What a page may wish for: whatever it sends is looked at here, number by number."""

import dataclasses
from typing import Any, NamedTuple

from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.sampling.request import MAX_SEED, SampleRequest
from ldm_jax.sampling.sampling_config import SamplingConfig
from ldm_jax.types import InputError

MAX_SCALE = 15
MAX_LETTERS = 1000
DECIMALS = 3
"""Of a guidance scale: what a slider leaves behind these is not meant."""


class Controls(NamedTuple):
    """What a page wishes for."""

    seed: int
    """Of the first image; the next one has the next."""
    num_images: int
    """How many."""
    steps: int
    """Denoising steps."""
    guidance_scale: float
    """0 ignores the label or text, 1 follows it."""
    label: int | None
    """Class to draw; None where the model has none."""
    prompt: str
    """Text to draw; "" where the model reads none."""
    negative_prompt: str
    """Text to be guided away from."""


class Limits(NamedTuple):
    """What a page may wish for."""

    max_steps: int
    """The most denoising steps."""
    max_images: int
    """The most images at a time."""
    num_classes: int
    """Classes there are; 0 where the model has none."""
    reads_text: bool
    """Whether the model reads text."""

    @property
    def guided(self) -> bool:
        """Whether there is anything to be guided by."""
        return bool(self.num_classes) or self.reads_text


def limits_of(model: LatentDiffusion, *, max_steps: int, max_images: int) -> Limits:
    """Return the limits of a model's page."""
    condition = model.condition
    return Limits(
        max_steps=max_steps,
        max_images=max_images,
        num_classes=model.num_classes if condition.uses_classes else 0,
        reads_text=condition.uses_tokens,
    )


def check_controls(given: dict[str, Any], limits: Limits) -> Controls:
    """Make a wish of what a page sent, which may be anything.

    Args:
      given: Values by the names of `Controls`'s fields.
      limits: Of the page.

    Returns:
      The wish; what the model does not read is left out.

    Raises:
      InputError: If something is of another kind or out of range.
    """
    num_images = _whole(given, "num_images", 1, limits.max_images)
    scale, label = 1.0, None
    if limits.guided:
        scale = round(float(_number(given, "guidance_scale", 0, MAX_SCALE)), DECIMALS)
    if limits.num_classes:
        label = _whole(given, "label", 0, limits.num_classes - 1)
    return Controls(
        seed=_whole(given, "seed", 0, MAX_SEED + 1 - num_images),
        num_images=num_images,
        steps=_whole(given, "steps", 1, limits.max_steps),
        guidance_scale=scale,
        label=label,
        prompt=_text(given, "prompt") if limits.reads_text else "",
        negative_prompt=_text(given, "negative_prompt") if limits.reads_text else "",
    )


def _whole(given: dict[str, Any], name: str, low: int, high: int) -> int:
    value = _number(given, name, low, high)
    # A page sends numbers as it likes: 3 or 3.0.
    if value != int(value):
        raise _outside(name, value, low, high)
    return int(value)


def _number(given: dict[str, Any], name: str, low: int, high: int) -> int | float:
    value = given.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _outside(name, value, low, high)
    if not low <= value <= high:
        raise _outside(name, value, low, high)
    return value


def _outside(name: str, value: Any, low: int, high: int) -> InputError:
    return InputError(f"{_details(name)}: got {_short(value)}, wanted {low} to {high}")


def _text(given: dict[str, Any], name: str) -> str:
    value = given.get(name)
    if not isinstance(value, str):
        raise InputError(f"{_details(name)}: got {_short(value)}, wanted a text")
    if len(value) > MAX_LETTERS:
        raise InputError(
            f"{_details(name)}: got {len(value)} letters, wanted at most {MAX_LETTERS}"
        )
    # One line of what can be written: it stands in a command and in a PNG.
    return " ".join("".join(c if c.isprintable() else " " for c in value).split())


def _details(name: str) -> str:
    return name.replace("num_", "").replace("_", " ")


def _short(value: Any) -> str:
    return repr(value) if isinstance(value, int | float) else type(value).__name__


def sampling_of(controls: Controls, settings: SamplingConfig) -> SamplingConfig:
    """Apply the controls to the settings of the page."""
    return dataclasses.replace(
        settings, steps=controls.steps, guidance_scale=(controls.guidance_scale,)
    )


def request_of(controls: Controls) -> SampleRequest:
    """Request the images that the controls select."""
    return SampleRequest(
        labels=None if controls.label is None else (controls.label,),
        prompts=(controls.prompt,) if controls.prompt else (),
        negative_prompt=controls.negative_prompt,
        seeds=tuple(range(controls.seed, controls.seed + controls.num_images)),
    )
