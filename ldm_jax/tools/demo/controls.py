"""The controls of the page of `ldm serve`, and their limits. Imports no JAX."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from ldm_jax.config import Config, read_config
from ldm_jax.evaluation.request import check_run
from ldm_jax.sampling.request import MAX_SEED, SampleRequest
from ldm_jax.sampling.sampling_config import SamplingConfig
from ldm_jax.types import InputError

LOOPBACK, PORT = "127.0.0.1", 7860
MAX_STEPS, MAX_IMAGES = 100, 64
FIRST_STEPS = 20
MAX_SCALE = 15
MAX_PROMPT_LENGTH = 1000
DECIMALS = 3
"""Decimals of a guidance scale; a slider sends more by rounding errors."""


class DemoRequest(NamedTuple):
    """A page to serve."""

    settings: SamplingConfig
    """Settings of the first images."""
    max_steps: int
    """Maximum number of denoising steps."""
    max_images: int
    """Maximum number of images at a time."""


def read_run(workdir: Path) -> Config:
    """Read the config of a run that samples from labels, texts or noise alone.

    Raises:
      InputError: If the folder is no run, or a run of another kind.
    """
    try:
        config = read_config(workdir)
        check_run(config, workdir)
    except InputError as error:
        raise InputError(str(error).replace("--workdir:", "WORKDIR:", 1)) from None
    return config


class Controls(NamedTuple):
    """Values of the page's controls."""

    seed: int
    """Seed of the first image; the others have the following seeds."""
    num_images: int
    """Number of images."""
    steps: int
    """Denoising steps."""
    guidance_scale: float
    """0 ignores the label or text, 1 follows it."""
    label: int | None
    """Class; None where the model has none."""
    prompt: str
    """Text; "" where the model reads none."""
    negative_prompt: str
    """Text to be guided away from."""


class Limits(NamedTuple):
    """Limits of the page's controls."""

    max_steps: int
    """Maximum number of denoising steps."""
    max_images: int
    """Maximum number of images at a time."""
    num_classes: int
    """Number of classes; 0 where the model has none."""
    reads_text: bool
    """Whether the model reads text."""

    @property
    def guided(self) -> bool:
        """Whether the model has a condition to be guided by."""
        return bool(self.num_classes) or self.reads_text


def check_controls(given: dict[str, Any], limits: Limits) -> Controls:
    """Check the values that a page sent, which may be anything.

    Args:
      given: Values by the names of `Controls`' fields; those that the model does not
        read are ignored.

    Raises:
      InputError: If a value has another type or is out of range.
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
    # A page may send 3 as 3.0.
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
    return InputError(f"{_words(name)}: got {_short(value)}, wanted {low} to {high}")


def _text(given: dict[str, Any], name: str) -> str:
    value = given.get(name)
    if not isinstance(value, str):
        raise InputError(f"{_words(name)}: got {_short(value)}, wanted a text")
    if len(value) > MAX_PROMPT_LENGTH:
        raise InputError(
            f"{_words(name)}: got {len(value)} letters, wanted at most "
            f"{MAX_PROMPT_LENGTH}"
        )
    # One printable line, which a command and a PNG can hold.
    return " ".join("".join(c if c.isprintable() else " " for c in value).split())


def _words(name: str) -> str:
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
