"""`ldm plan`."""

import json
import sys
from typing import Annotated

import tyro

from ldm_jax.cli.streams import check_stdout
from ldm_jax.config import Config, LayoutName
from ldm_jax.config.flags import Inline, parse_flags_with_config
from ldm_jax.config.training import StageName
from ldm_jax.config.validation import checked_dataclass, require_at_least
from ldm_jax.tools.plan.request import PlanRequest, WorkName, change
from ldm_jax.tools.plan.topology import parse_topology, prepare_environment
from ldm_jax.types import InputError, SamplerName, choices


@checked_dataclass
class Flags:
    r"""Compile a training step for absent chips, without running it.

        ldm plan --config ldm/text2img256_kl8_1p4b \
            --topology v5e:16x16 --layout fsdp --batch-per-device 4

    Reports for one chip whether the training step fits and by how much, the use of its
    memory, the compiler's estimate of the time, and the traffic on the links; with
    --sample, the same for a call of the sampler. Planning for a TPU needs the extra
    `plan` (libtpu) and no TPU. Reads no data and writes no run. Every field of the
    config is a flag, as in `ldm train`.
    """

    config_name: Annotated[str | None, tyro.conf.arg(name="config")] = None
    """A shipped config, or a file with get_config()."""
    topology: str | None = None
    """Devices: local, or a TPU slice such as v5e:4x4, v6e:2x2 or v4:2x2x1."""
    layout: LayoutName | None = None
    """Layout of the state; the config's by default."""
    accumulate: int | None = None
    """Parts in which a batch is computed; the config's by default."""
    batch_per_device: int | None = None
    """Images per chip; those of the config by default."""
    stage: StageName | None = None
    """Stage of the step; the last that the config trains by default."""
    sample: bool = False
    """Plan a call of the sampler, not a step."""
    sampler: SamplerName = "ddim"
    """Sampler of the call."""
    steps: int = 50
    """Steps of the sampler."""
    suggest: bool = True
    """If it does not fit, look for changes that do."""
    scale: bool = False
    """Add a table of a step on 4 to 4096 chips, by formula."""
    json: bool = False
    """Print JSON."""
    config: Annotated[Config, Inline] = Config()
    """Config to plan."""

    def _check(self) -> None:
        require_at_least(self, 1, "batch_per_device", "accumulate", "steps")


def parse(args: list[str]) -> tuple[PlanRequest, Flags]:
    """Read the command line.

    Returns:
      The request, and the flags of the output.

    Raises:
      InputError: If it is wrong.
      SystemExit: After printing the help.
    """
    flags = parse_flags_with_config(Flags, args, prog="ldm plan")
    if flags.config_name is None or flags.topology is None:
        flag = "--config" if flags.config_name is None else "--topology"
        raise InputError(f"{flag}: not given; see --help")
    topology = parse_topology(flags.topology)
    work = _work(flags)
    spread = {"layout": flags.layout, "accumulate": flags.accumulate}
    given = {name: value for name, value in spread.items() if value is not None}
    request = PlanRequest(
        config=flags.config,
        topology=topology,
        work=work,
        batch_per_device=flags.batch_per_device,
        sampler=flags.sampler,
        num_steps=flags.steps,
        suggest=flags.suggest,
    )
    return change(request, **given), flags


def _work(flags: Flags) -> WorkName:
    stages = flags.config.stages
    if flags.stage is not None and flags.stage not in stages:
        raise InputError(f"--stage: {choices(flags.stage, stages)}")
    if not flags.sample:
        return flags.stage or stages[-1]
    if flags.stage is not None:
        raise InputError(
            f"--stage: got {flags.stage!r} with --sample; wanted one of both"
        )
    if "diffusion" not in stages:
        raise InputError("--sample: this config trains an autoencoder alone")
    return "sample"


def main(args: list[str]) -> None:
    """Compile, and print the plan."""
    request, flags = parse(args)
    check_stdout()
    if request.topology is not None:
        prepare_environment()
    # Only now: JAX reads its environment when it is imported.
    from ldm_jax.tools.plan.planner import plan
    from ldm_jax.tools.plan.report import in_words

    found = plan(request, lambda line: print(line, file=sys.stderr, flush=True))
    if flags.json:
        print(json.dumps(found, allow_nan=False))
    else:
        print(in_words(found, scale=flags.scale))
