"""What `ldm serve` may be asked; imports no JAX and no page."""

import argparse
import importlib.util
from pathlib import Path
from typing import NamedTuple

from ldm_jax.config import Config, read_config
from ldm_jax.config.flags import OneLineParser
from ldm_jax.config.launch import Launch, check_launch, check_local
from ldm_jax.sampling.sampling_config import SamplingConfig
from ldm_jax.types import InputError

PROG = "ldm serve"
LOOPBACK, PORT = "127.0.0.1", 7860
MAX_PORT = 2**16 - 1
MOST_STEPS, MOST_IMAGES = 100, 64
STEPS_AT_FIRST = 20


class BrowseRequest(NamedTuple):
    """What was asked."""

    workdir: Path
    """Folder of the run."""
    config: Config
    """Of the run."""
    settings: SamplingConfig
    """How images are made until a knob is moved."""
    max_steps: int
    """The most denoising steps that the page may ask for."""
    max_images: int
    """The most images at a time."""
    host: str
    """Address to listen at."""
    port: int
    """Where; 0 for any that is free."""
    launch: Launch
    """How JAX starts."""


def parse(args: list[str], *, about: str | None) -> BrowseRequest:
    """Read the command line, as far as the run's config tells without JAX.

    Args:
      about: What the program is for.

    Raises:
      InputError: If it is wrong, or what draws the page is not installed.
      SystemExit: After printing the help.
    """
    parser = OneLineParser(
        prog=PROG,
        description=about,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("workdir", type=Path, metavar="DIR", help="folder of the run")
    add("--step", type=int, help="checkpoint to take; the newest by default")
    add("--sampler", default="ddim", help="of every image; see sample.py --help")
    add("--spacing", help="of the steps; the run's by default")
    add("--max-steps", type=int, metavar="N", help="of the page; 100, or all there are")
    add("--max-images", type=int, default=16, metavar="N", help="at a time; 16")
    add("--host", default=LOOPBACK, help="address to listen at; this machine's alone")
    add("--port", type=int, default=PORT, help=f"{PORT}; 0 for any that is free")
    add("--compilation-cache", metavar="DIR", help="or none; default: beside DIR")
    given = parser.parse_args(args)
    if not 0 <= given.port <= MAX_PORT:
        raise InputError(f"--port: got {given.port}, wanted 0 to {MAX_PORT}")
    if not 1 <= given.max_images <= MOST_IMAGES:
        raise InputError(
            f"--max-images: got {given.max_images}, wanted 1 to {MOST_IMAGES}"
        )
    check_local(given.workdir, "DIR")
    config = read_run(given.workdir)
    top = config.diffusion.num_timesteps
    most = min(MOST_STEPS, top) if given.max_steps is None else given.max_steps
    if not 1 <= most <= top:
        raise InputError(f"--max-steps: got {most}, wanted 1 to {top}")
    settings = settings_of(given, steps=min(STEPS_AT_FIRST, most))
    if importlib.util.find_spec("nicegui") is None:
        raise InputError(
            "DIR: the page is drawn by nicegui, which is not installed; try "
            "pip install -c constraints.txt -e '.[browse]'"
        )
    for name in ("pod", "coordinator", "num_processes", "process_id"):
        setattr(given, name, None)
    return BrowseRequest(
        workdir=given.workdir,
        config=config,
        settings=settings,
        max_steps=most,
        max_images=given.max_images,
        host=given.host,
        port=given.port,
        launch=check_launch(given, beside=given.workdir),
    )


def read_run(workdir: Path) -> Config:
    """Read the config of a run that draws from labels, texts or noise alone.

    Raises:
      InputError: If the folder is no run, or is one of another kind.
    """
    try:
        config = read_config(workdir)
    except InputError as error:
        raise InputError(str(error).replace("--workdir:", "DIR:", 1)) from None
    if "diffusion" not in config.stages:
        raise InputError(
            f"DIR: {workdir} is a run of an autoencoder alone, wanted one with a "
            "diffusion stage"
        )
    condition = config.diffusion.condition
    if condition.context == "embedding" or condition.concat != "none":
        raise InputError(
            f"DIR: {workdir} is conditioned on vectors or images, wanted a "
            "model of classes or texts, or without condition; try sample.py --image"
        )
    return config


def settings_of(given: argparse.Namespace, *, steps: int) -> SamplingConfig:
    """Make the settings of the first image, with all the checks of `sample.py`."""
    if given.spacing == "ldm":
        raise InputError(
            "--spacing: got 'ldm', which has not the steps asked for; wanted trailing, "
            "leading, linspace or karras"
        )
    try:
        return SamplingConfig(
            workdir=str(given.workdir),
            step=given.step,
            sampler=given.sampler,
            spacing=given.spacing,
            steps=steps,
        )
    except InputError as error:
        raise InputError(f"--{error}") from None
