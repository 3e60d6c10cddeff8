"""`ldm train`."""

import json
import re
from pathlib import Path
from typing import Annotated

import tyro

from ldm_jax.cli.streams import check_stdout
from ldm_jax.config import Config
from ldm_jax.config.flags import Inline, parse_flags, parse_flags_with_config
from ldm_jax.config.launch import Launch
from ldm_jax.config.serialization import (
    CHANGEABLE,
    CHANGEABLE_IN_WORDS,
    is_among,
)
from ldm_jax.config.validation import checked_dataclass, shown
from ldm_jax.parallel.launch import start
from ldm_jax.types import InputError

WORTH_DRAWING = 60.0
"""Seconds of training above which the report has samples."""


@checked_dataclass
class Flags:
    """Train both stages, or what is left of them.

        ldm train --config digits --workdir runs/digits

    The same command resumes after an interruption. Every field of the config is a flag.
    """

    config_name: Annotated[str | None, tyro.conf.arg(name="config")] = None
    """A shipped config (digits, ldm/sd15, autoencoder/kl_f8 ...), or a file with
    get_config()."""
    workdir: Path | None = None
    """Folder of the run."""
    change: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """FIELD=VALUE, such as diffusion.steps=4000: go on with a value other than that of
    the run, which records both. Once for each field."""
    dry_run: bool = False
    """Build everything by shape only and print one line of JSON."""
    profile: str | None = None
    """START:STOP, steps of each stage between which to write a trace for TensorBoard
    and Perfetto."""
    launch: Annotated[Launch, Inline] = Launch()
    """Processes and compilation cache of the program."""
    config: Annotated[Config, Inline] = Config()
    """Config to train."""

    @property
    def profiled_steps(self) -> tuple[int, int] | None:
        """The steps of `profile`."""
        if self.profile is None:
            return None
        start, _, stop = self.profile.partition(":")
        return int(start), int(stop)

    @property
    def changes(self) -> tuple[str, ...]:
        """The fields of `change`."""
        return tuple(change.partition("=")[0] for change in self.change)

    def _check(self) -> None:
        if self.profile is None:
            return
        span = re.fullmatch(r"([0-9]{1,18}):([0-9]{1,18})", self.profile)
        if span is None or int(span[1]) >= int(span[2]):
            raise InputError(
                f"--profile: got {self.profile!r}, wanted START:STOP, the smaller "
                "first; try 10:15"
            )


def parse(args: list[str]) -> Flags:
    """Read the command line.

    Raises:
      InputError: If a flag is unknown, a value is wrong, or the config file is.
      SystemExit: After printing the help.
    """
    flags = parse_flags_with_config(Flags, args, prog="ldm train")
    for name in flags.changes:
        if not is_among(name, CHANGEABLE):
            raise InputError(
                f"--change: got {shown(name)}, wanted FIELD=VALUE, with "
                f"{CHANGEABLE_IN_WORDS}; such as --change diffusion.steps=4000"
            )
    if flags.change:
        given = [f"--{change}" for change in flags.change]
        flags = parse_flags(Flags, given, prog="ldm train", default=flags)
    if flags.config_name is None:
        raise InputError("--config: not given, wanted a config; try --config digits")
    if flags.workdir is None and not flags.dry_run:
        raise InputError("--workdir: not given, wanted a folder; try --workdir runs/x")
    return flags


def main(args: list[str]) -> None:
    """Train, and print the path of the run."""
    flags = parse(args)
    config = flags.config
    if flags.dry_run:
        check_stdout()
    workdir = None if flags.dry_run else flags.workdir
    start(
        flags.launch,
        beside=workdir,
        peer_timeout=config.parallel.peer_timeout,
        cpu_devices=config.parallel.cpu_devices,
        cpu_threads=config.parallel.exact_shards,
    )
    import jax

    from ldm_jax.parallel.make_layout import make_layout
    from ldm_jax.parallel.multihost import is_first
    from ldm_jax.run import train
    from ldm_jax.tools.report.run_summary import read_run_summary
    from ldm_jax.tools.report.writing import write_report
    from ldm_jax.training.dry_run import describe

    if workdir is None:
        print(json.dumps(describe(config, make_layout(config.parallel))))
        return
    outcome = train(
        config, workdir, changes=flags.changes, profile=flags.profiled_steps
    )
    if not is_first():
        return
    by_stage = outcome.final["seconds_by_stage"]
    if outcome.trained:
        # Sampling needs all processes, and the others have ended.
        draws = sum(by_stage.values()) > WORTH_DRAWING and jax.process_count() == 1
        write_report(
            read_run_summary(workdir), workdir / "report.html", with_samples=draws
        )
        seconds = ", ".join(f"{name} {value:.0f} s" for name, value in by_stage.items())
        print(f"finished: {workdir} ({seconds})")
    else:
        print(f"finished: {workdir} has nothing left to train")
    print(f"digest {outcome.final['digest']}")
