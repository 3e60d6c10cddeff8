r"""Encode a training split once, so that stage 2 need not encode it every epoch.

    ldm cache-latents --workdir runs/digits --out runs/latents
    python train.py --config configs/digits.py --workdir runs/second \
        --first-stage runs/digits --data.latents runs/latents

Takes the data and the finished first stage of a run; or of a config that names a
first stage, and then every field of the config is a flag, as in train.py. Keeps the
moments of each latent, not a sample of it, and what a frozen text encoder says of each
caption. On several hosts each makes its share. Interrupted, the same command goes on;
given again later, it makes anew what is damaged.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

from ldm_jax.config import IMAGES_AT_ONCE, Config, read_config
from ldm_jax.config.flags import OneLineParser, load_config_file, parse_flags, run_main
from ldm_jax.config.launch import Launch, add_flags, check_launch, check_local
from ldm_jax.parallel.launch import start, use_huge_pages
from ldm_jax.types import InputError

PROG = "ldm cache-latents"


class Request(NamedTuple):
    """What the command was asked."""

    config: Config
    """Of the run whose data and first stage are meant."""
    workdir: Path | None
    """Its folder; None to take what the config names."""
    out: Path
    """Folder of the cache."""
    num_shards: int | None
    """Files of records; None for what is there, or by the size."""
    batch_size: int
    """Images that a device encodes at once."""
    states: bool
    """Whether to keep what a frozen text encoder says."""
    launch: Launch
    """How the program starts."""


def parse(args: list[str]) -> Request:
    """Read the command line.

    Returns:
      What was asked.

    Raises:
      InputError: If it is wrong.
      SystemExit: After printing the help.
    """
    parser = _parser()
    own, rest = parser.parse_known_args(args)
    if not {"-h", "--help"}.isdisjoint(rest):
        parser.print_help()
        print("\nand with --config, every field of it")  # noqa: T201
        raise SystemExit(0)
    if (own.workdir is None) == (own.config is None):
        raise InputError(
            "--workdir: wanted it, the folder of a run, or --config FILE.py with "
            "--first-stage RUN; try --workdir runs/digits"
        )
    if own.out is None:
        raise InputError("--out: not given, wanted a folder; try --out runs/latents")
    check_local(own.out, "--out")
    for name in ("shards", "batch"):
        value = getattr(own, name)
        if value is not None and value < 1:
            raise InputError(f"--{name}: got {value}, wanted 1 or more")
    return Request(
        config=_config(own, rest, parser),
        workdir=own.workdir,
        out=own.out,
        num_shards=own.shards,
        batch_size=own.batch,
        states=not own.no_states,
        launch=check_launch(own, beside=own.workdir or own.out),
    )


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog=PROG,
        description=__doc__,
        add_help=False,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--workdir", type=Path, metavar="RUN", help="folder of a run")
    add("--config", metavar="FILE.py", help="file with get_config(), in its place")
    add("--out", type=Path, metavar="DIR", help="folder of the cache")
    add("--shards", type=int, metavar="N", help="files of records; by the size")
    add(
        "--batch",
        type=int,
        default=IMAGES_AT_ONCE,
        metavar="N",
        help=f"images that a device encodes at once; {IMAGES_AT_ONCE}",
    )
    add(
        "--no-states",
        action="store_true",
        help="leave out what a frozen text encoder says of the captions",
    )
    add_flags(parser)
    return parser


def _config(own: argparse.Namespace, rest: list[str], parser: OneLineParser) -> Config:
    if own.workdir is None:
        default = load_config_file(own.config)
        config = parse_flags(Config, rest, default=default, prog=PROG, own=parser)
        if config.first_stage is None:
            raise InputError(
                "first_stage: not given, wanted the run or weights whose latents are "
                "kept; try --first-stage RUN"
            )
        return config
    if rest:
        raise InputError(
            f"{rest[0]}: no such flag beside --workdir, whose config is the run's; try "
            f"--config FILE.py --first-stage {own.workdir}"
        )
    return read_config(own.workdir)


def main(args: list[str]) -> None:
    """Parse, encode, say finished."""
    request = parse(args)
    # Only now: help and bad input need not wait for JAX.
    parallel = request.config.parallel
    start(
        request.launch,
        peer_timeout=parallel.peer_timeout,
        cpu_devices=parallel.cpu_devices,
    )
    from ldm_jax.parallel.multihost import is_first
    from ldm_jax.pretrained.frozen import open_encoders
    from ldm_jax.training.encode_latents import make_cache

    outcome = make_cache(
        request.config,
        request.workdir,
        request.out,
        open_encoders=open_encoders,
        num_shards=request.num_shards,
        batch_size=request.batch_size,
        states=request.states,
    )
    if not is_first():
        return
    note = outcome.note
    if not outcome.num_made:
        print(f"finished: {request.out} has nothing left to write")  # noqa: T201
        return
    size = sum(shard.size for shard in note.shards)
    print(  # noqa: T201
        f"finished: {request.out} ({note.num_examples} examples, {outcome.num_made} of "
        f"{note.num_shards} shards made now, {size / 2**20:.1f} MiB)"
    )


if __name__ == "__main__":
    use_huge_pages()
    run_main(main, PROG)
