"""`ldm steps`."""

import math
from pathlib import Path

from ldm_jax.config import Config, read_config
from ldm_jax.config.flags import parse_flags
from ldm_jax.config.launch import Launch
from ldm_jax.config.validation import checked_dataclass, require, require_at_least
from ldm_jax.data.tfds_builders import check_builder
from ldm_jax.evaluation.protocols import protocol_of
from ldm_jax.evaluation.request import check_network, check_run
from ldm_jax.evaluation.trade_off import TOLERANCE, StepsRequest, in_words, to_table
from ldm_jax.parallel.launch import start
from ldm_jax.types import (
    InputError,
    PrecisionName,
    ProtocolName,
    SamplerName,
    SpacingName,
)


@checked_dataclass
class Flags:
    """Compare samplers and numbers of steps: quality against steps and seconds.

        ldm steps --workdir runs/digits

    Prints a table and names the cheapest setting within 5 % of the best; writes
    steps.json and steps.png. Quality is the Fréchet distance to the training split:
    with --protocol of the protocol's features, which is FID as in `ldm evaluate`;
    otherwise of principal components of small averaged images, which need no files and
    represent layout and contrast, not texture.
    """

    workdir: Path
    """Folder of the run."""
    samplers: tuple[SamplerName, ...] = ("ddim", "heun", "dpmpp_2m", "unipc")
    """Samplers to compare."""
    steps: tuple[int, ...] = (5, 10, 20, 50)
    """Numbers of denoising steps."""
    spacing: SpacingName | None = None
    """Spacing of the steps; the run's by default."""
    num_images: int = 500
    """Images of each setting."""
    guidance_scale: float = 1.0
    """Guidance scale; 1 for none."""
    protocol: ProtocolName | None = None
    """Protocol of the features that are compared."""
    inception: Path | None = None
    """Weights of FID's Inception network (.pth, safetensors)."""
    precision: PrecisionName | None = None
    """Products of float32 on GPUs and TPUs; the run's by default."""
    limit_steps: int = 200
    """Steps of dpmpp_2m for the images that count as converged."""
    builder: str | None = None
    """The file and config of the run's data set, FILE.py or FILE.py/CONFIG, where its
    config names one: reading the data runs it."""
    out: Path | None = None
    """Folder of steps.json and steps.png; WORKDIR/steps by default."""
    compilation_cache: Path | None = None
    """Folder of compiled programs, or none; beside the run by default."""

    def _check(self) -> None:
        for flag in ("samplers", "steps"):
            if not getattr(self, flag):
                raise InputError(f"{flag}: got no value, wanted one or several")
        require_at_least(self, 1, "limit_steps")
        require_at_least(self, 2, "num_images")
        scale = self.guidance_scale
        require(self, "guidance_scale", 0.0 <= scale < math.inf, "0 or more")


def parse(args: list[str]) -> tuple[StepsRequest, Launch]:
    """Read the command line, as far as the run's config allows without JAX.

    Raises:
      InputError: If it is wrong.
      SystemExit: After printing the help.
    """
    flags = parse_flags(Flags, args, prog="ldm steps")
    protocol = None if flags.protocol is None else protocol_of(flags.protocol)
    if protocol is not None:
        check_network(protocol, flags.inception)
    elif flags.inception is not None:
        raise InputError("--inception: got it without --protocol; try --protocol adm")
    out = flags.out or flags.workdir / "steps"
    if out.exists() and not out.is_dir():
        raise InputError(f"--out: {out} is a file, wanted a folder")
    config = read_config(flags.workdir)
    check_run(config, flags.workdir)
    check_builder(config.data.source, flags.builder)
    check_settings(config, flags)
    return StepsRequest(
        workdir=flags.workdir,
        samplers=tuple(dict.fromkeys(flags.samplers)),
        steps=tuple(dict.fromkeys(flags.steps)),
        spacing=flags.spacing,
        num_images=flags.num_images,
        guidance_scale=flags.guidance_scale,
        protocol=protocol,
        inception=flags.inception,
        limit_steps=flags.limit_steps,
        precision=flags.precision,
        out=out,
    ), Launch(compilation_cache=flags.compilation_cache)


def check_settings(config: Config, flags: Flags) -> None:
    """Raise `InputError` if a run lacks the steps, or a condition to guide by."""
    condition, top = config.diffusion.condition, config.diffusion.num_timesteps
    if outside := [steps for steps in flags.steps if not 1 <= steps <= top]:
        raise InputError(f"--steps: got {outside[0]}, wanted 1 to {top}")
    reads = condition.uses_tokens or condition.uses_classes
    if flags.guidance_scale != 1.0 and not reads:
        raise InputError(
            f"--guidance-scale: got {flags.guidance_scale}, but this model has no "
            "condition; leave it at 1"
        )


def main(args: list[str]) -> None:
    """Measure, and print the table."""
    request, launch = parse(args)
    start(launch, beside=request.workdir)
    from ldm_jax.evaluation.step_sweep import sweep_steps, write_sweep

    found = sweep_steps(request)
    chosen = write_sweep(found, request)
    print(to_table(found.rows, chosen))
    distance = found.held_out_distance
    held_out = "too few" if distance is None else f"{distance:.4g}"
    print(f"\n{found.num_held_out} held-out images: {held_out}")
    print("distances of fewer images are larger, of samples and of real images")
    print(f"cheapest within {TOLERANCE:.0%} of the best: {in_words(chosen)}")
