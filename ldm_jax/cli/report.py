"""`ldm report`."""

from pathlib import Path
from typing import Annotated

from ldm_jax.config import read_config
from ldm_jax.config.flags import Inline, parse_flags
from ldm_jax.config.launch import Launch
from ldm_jax.config.validation import checked_dataclass
from ldm_jax.data.tfds_builders import check_builder
from ldm_jax.parallel.launch import start
from ldm_jax.types import InputError


@checked_dataclass
class Flags:
    """Write a report of a run: its config, losses, scores and samples.

        ldm report --workdir runs/digits

    Writes WORKDIR/report.html, one page without external files. It includes the results
    of `ldm evaluate` and `ldm steps`. The run may be unfinished.
    """

    workdir: Path
    """Folder of the run."""
    out: Path | None = None
    """File to write; WORKDIR/report.html by default."""
    samples: bool = True
    """Draw samples; --no-samples computes nothing."""
    builder: str | None = None
    """The file and config of the run's data set, FILE.py or FILE.py/CONFIG, where its
    config names one: reading the data runs it."""
    launch: Annotated[Launch, Inline] = Launch()
    """Processes and compilation cache of the program."""


def parse(args: list[str]) -> tuple[Flags, Path]:
    """Read the command line, as far as the run's config allows without JAX.

    Returns:
      The flags, and the file to write.

    Raises:
      InputError: If it is wrong.
      SystemExit: After printing the help.
    """
    flags = parse_flags(Flags, args, prog="ldm report")
    config = read_config(flags.workdir)
    if flags.samples:
        check_builder(config.data.source, flags.builder)
    out = flags.out or flags.workdir / "report.html"
    if out.is_dir():
        raise InputError(f"--out: {out} is a folder, wanted a file such as report.html")
    if not out.parent.is_dir():
        raise InputError(f"--out: {out.parent} is not a folder; try to make it first")
    return flags, out


def main(args: list[str]) -> None:
    """Write the report, and print its path."""
    flags, out = parse(args)
    start(flags.launch, beside=flags.workdir)
    from ldm_jax.tools.report.run_summary import read_run_summary
    from ldm_jax.tools.report.writing import write_report

    write_report(read_run_summary(flags.workdir), out, with_samples=flags.samples)
    print(out)
