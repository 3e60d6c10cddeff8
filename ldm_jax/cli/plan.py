r"""What would a step take on chips that are not here? Compiled, never run.

    ldm plan --config configs/ldm/text2img256_kl8_1p4b.py \
        --topology v5e:16x16 --layout fsdp --batch-per-device 4

Says of each chip whether the training step fits and by how much, what fills its
memory, how long the compiler expects it to take, and what goes over the links; with
--sample, the same of a call of the sampler. Planning for a TPU needs the extra `plan`
(libtpu) and no TPU. Reads no data and writes no run. Every field of the config is a
flag, as in train.py.
"""

import argparse
import json
import sys
from typing import get_args

from ldm_jax.config import Config, LayoutName
from ldm_jax.config.flags import OneLineParser, load_config_file, parse_flags, run_main
from ldm_jax.tools.plan.arguments import Request, WorkName, change
from ldm_jax.tools.plan.topology import EXAMPLES, parse_topology, prepare_environment
from ldm_jax.types import SAMPLER_NAMES, InputError, choices

PROG = "ldm plan"


def parse(args: list[str]) -> tuple[Request, argparse.Namespace]:
    """Read the command line.

    Returns:
      The question; and how to answer: as `json`, with a table of `scale`.

    Raises:
      InputError: If it is wrong.
      SystemExit: After printing the help.
    """
    parser = _parser()
    own, rest = parser.parse_known_args(args)
    wants_help = not {"-h", "--help"}.isdisjoint(rest)
    if wants_help:
        parser.print_help()
        print("\nand every field of the config:")  # noqa: T201
    for name in ("config", "topology"):
        if getattr(own, name) is None and not wants_help:
            raise InputError(f"--{name}: not given; see --help")
    default = load_config_file(own.config) if own.config else Config()
    config = parse_flags(Config, rest, default=default, prog=PROG, own=parser)
    topology = parse_topology(own.topology)
    for name in ("batch_per_device", "accumulate", "steps"):
        value = getattr(own, name)
        if value is not None and value < 1:
            flag = name.replace("_", "-")
            raise InputError(f"--{flag}: got {value}, wanted 1 or more")
    if own.sampler not in SAMPLER_NAMES:
        raise InputError(f"--sampler: {choices(own.sampler, SAMPLER_NAMES)}")
    work = _work(config, own)
    spread = {"layout": own.layout, "accumulate": own.accumulate}
    given = {name: value for name, value in spread.items() if value is not None}
    return Request(
        config=change(config, work, **given),
        topology=topology,
        work=work,
        batch_per_device=own.batch_per_device,
        sampler=own.sampler,
        num_steps=own.steps,
        suggest=not own.no_suggest,
    ), own


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog=PROG,
        description=__doc__,
        add_help=False,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config", metavar="FILE.py", help="file with get_config()")
    add("--topology", help=f"local, or as {', '.join(EXAMPLES)}")
    add("--layout", help=f"one of {', '.join(get_args(LayoutName))}; the config's")
    add("--accumulate", type=int, help="parts a batch is computed in; the config's")
    add("--batch-per-device", type=int, help="images of a chip; the config's share")
    add("--stage", help="autoencoder or diffusion; the last that the config trains")
    add("--sample", action="store_true", help="a call of the sampler, not a step")
    add("--sampler", default="ddim", help=f"one of {', '.join(SAMPLER_NAMES)}")
    add("--steps", type=int, default=50, help="of the sampler; 50")
    add("--no-suggest", action="store_true", help="do not look for what would fit")
    add("--scale", action="store_true", help="a step on 4 to 4096 chips, by formula")
    add("--json", action="store_true", help="print JSON")
    return parser


def _work(config: Config, own: argparse.Namespace) -> WorkName:
    stages = config.stages
    if own.stage is not None and own.stage not in stages:
        raise InputError(f"--stage: {choices(own.stage, stages)}")
    if not own.sample:
        return own.stage or stages[-1]
    if own.stage is not None:
        raise InputError(
            f"--stage: got {own.stage!r} with --sample; wanted one of both"
        )
    if "diffusion" not in stages:
        raise InputError("--sample: this config trains an autoencoder alone")
    return "sample"


def main(args: list[str]) -> None:
    """Parse, compile, print what was found."""
    request, answer = parse(args)
    if request.topology is not None:
        prepare_environment()
    # Only now: it reads its environment when it is imported.
    from ldm_jax.tools.plan.planner import plan
    from ldm_jax.tools.plan.report import in_words

    def say(line: str) -> None:
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()

    found = plan(request, say)
    if answer.json:
        print(json.dumps(found, allow_nan=False))  # noqa: T201
    else:
        print(in_words(found, scale=answer.scale))  # noqa: T201


if __name__ == "__main__":
    run_main(main, PROG)
