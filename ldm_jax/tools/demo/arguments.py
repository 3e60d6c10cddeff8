"""What the page of `ldm serve` is made for; imports no JAX and no page."""

from pathlib import Path
from typing import NamedTuple

from ldm_jax.config import Config, read_config
from ldm_jax.sampling.sampling_config import SamplingConfig
from ldm_jax.types import InputError

LOOPBACK, PORT = "127.0.0.1", 7860
MAX_PORT = 2**16 - 1
MOST_STEPS, MOST_IMAGES = 100, 64
STEPS_AT_FIRST = 20


class BrowseRequest(NamedTuple):
    """What was asked."""

    settings: SamplingConfig
    """How images are made until a knob is moved."""
    max_steps: int
    """The most denoising steps that the page may ask for."""
    max_images: int
    """The most images at a time."""


def read_run(workdir: Path) -> Config:
    """Read the config of a run that draws from labels, texts or noise alone.

    Raises:
      InputError: If the folder is no run, or is one of another kind.
    """
    try:
        config = read_config(workdir)
    except InputError as error:
        raise InputError(str(error).replace("--workdir:", "WORKDIR:", 1)) from None
    if "diffusion" not in config.stages:
        raise InputError(
            f"WORKDIR: {workdir} is a run of an autoencoder alone, wanted one with a "
            "diffusion stage"
        )
    condition = config.diffusion.condition
    if condition.context == "embedding" or condition.concat != "none":
        raise InputError(
            f"WORKDIR: {workdir} is conditioned on vectors or images, wanted a "
            "model of classes or texts, or without condition; try ldm sample --image"
        )
    return config
