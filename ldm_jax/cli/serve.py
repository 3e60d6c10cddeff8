"""`ldm serve`."""

import importlib.util
import logging
import socket
from pathlib import Path
from typing import Annotated

import tyro

from ldm_jax.config.flags import Positional, as_flag, parse_flags
from ldm_jax.config.launch import MAX_PORT, Launch
from ldm_jax.config.validation import checked_dataclass, require
from ldm_jax.parallel.launch import start
from ldm_jax.sampling.sampling_config import SamplingConfig
from ldm_jax.tools.demo.controls import (
    FIRST_STEPS,
    LOOPBACK,
    MAX_IMAGES,
    MAX_STEPS,
    PORT,
    DemoRequest,
    read_run,
)
from ldm_jax.tools.demo.server import address_of, open_socket, own_names, serve
from ldm_jax.types import InputError, PrecisionName, SamplerName, SpacingName


@checked_dataclass
class Flags:
    """Try a run on a web page: seed, class or text, guidance and steps are controls.

        ldm serve runs/digits

    Serves a page on this machine (127.0.0.1, unless --host says otherwise). One program
    is compiled at the start, and moving a control compiles nothing. Under the images is
    the `ldm sample` command that makes them, and each is saved with its metadata.
    """

    workdir: Positional[Annotated[Path, tyro.conf.arg(metavar="WORKDIR")]]
    """Folder of the run."""
    step: int | None = None
    """Step of the checkpoint; the newest by default."""
    sampler: SamplerName = "ddim"
    """Sampler of every image; see ldm sample --help."""
    spacing: SpacingName | None = None
    """Spacing of the steps; the run's by default."""
    precision: PrecisionName | None = None
    """Products of float32 on GPUs and TPUs; the run's by default."""
    max_steps: int | None = None
    """Largest number of steps; by default 100, or that of the schedule if smaller."""
    max_images: int = 16
    """Largest number of images at a time."""
    host: str = LOOPBACK
    """Address to listen at; by default only this machine can connect."""
    port: int = PORT
    """Port to listen at; 0 for any free port."""
    compilation_cache: Path | None = None
    """Folder of compiled programs, or none; beside the run by default."""

    def _check(self) -> None:
        require(self, "port", 0 <= self.port <= MAX_PORT, f"0 to {MAX_PORT}")
        few = 1 <= self.max_images <= MAX_IMAGES
        require(self, "max_images", few, f"1 to {MAX_IMAGES}")
        if self.spacing == "ldm":
            raise InputError(
                "spacing: got 'ldm', which has not the steps asked for; wanted "
                "trailing, leading, linspace or karras"
            )


def parse(args: list[str]) -> tuple[DemoRequest, Flags]:
    """Read the command line, as far as the run's config allows without JAX.

    Raises:
      InputError: If it is wrong, or the package of the page is not installed.
      SystemExit: After printing the help.
    """
    flags = parse_flags(Flags, args, prog="ldm serve")
    config = read_run(flags.workdir)
    top = config.diffusion.num_timesteps
    most = min(MAX_STEPS, top) if flags.max_steps is None else flags.max_steps
    if not 1 <= most <= top:
        raise InputError(f"--max-steps: got {most}, wanted 1 to {top}")
    try:
        settings = SamplingConfig(
            workdir=str(flags.workdir),
            step=flags.step,
            sampler=flags.sampler,
            spacing=flags.spacing,
            steps=min(FIRST_STEPS, most),
            precision=flags.precision,
        )
    except InputError as error:
        raise as_flag(error) from None
    if importlib.util.find_spec("nicegui") is None:
        raise InputError(
            "nicegui: not installed, and the page needs it; try pip install -e "
            "'.[browse]' where ldm_jax was cloned"
        )
    return DemoRequest(
        settings=settings, max_steps=most, max_images=flags.max_images
    ), flags


def main(args: list[str]) -> None:
    """Listen, load, compile, serve."""
    request, flags = parse(args)
    with open_socket(flags.host, flags.port) as port_in_use:
        _serve(request, flags, port_in_use)


def _serve(request: DemoRequest, flags: Flags, port_in_use: socket.socket) -> None:
    launch = Launch(compilation_cache=flags.compilation_cache)
    start(launch, beside=flags.workdir)
    print("loading the run and compiling one program ...", flush=True)
    from ldm_jax.tools.demo.page import make_page
    from ldm_jax.tools.demo.renderer import make_renderer

    app = make_page(make_renderer(request))
    if not own_names(port_in_use):
        logging.getLogger(__name__).warning(
            "--host: whoever reaches this address may use the page"
        )
    print(f"{address_of(port_in_use)} (Ctrl-C ends it)", flush=True)
    try:
        serve(app, port_in_use)
    except KeyboardInterrupt:
        print()
