"""`ldm report`."""

from pathlib import Path
from typing import Annotated

from ldm_jax.config.flags import Inline, parse_flags
from ldm_jax.config.launch import Launch
from ldm_jax.config.validation import checked_dataclass
from ldm_jax.data.tfds_builders import check_builder
from ldm_jax.parallel.launch import PEER_TIMEOUT, start


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


def main(args: list[str]) -> None:
    """Write the report, and print its path."""
    flags = parse_flags(Flags, args, prog="ldm report")
    from ldm_jax.tools.report.run_summary import check_out, read_run_summary

    summary = read_run_summary(flags.workdir)
    if flags.samples:
        check_builder(summary.config.data.source, flags.builder)
    out = flags.out or flags.workdir / "report.html"
    check_out(out)
    start(flags.launch, beside=flags.workdir, peer_timeout=PEER_TIMEOUT)
    from ldm_jax.tools.report.writing import write_report

    write_report(summary, out, with_samples=flags.samples)
    print(out)
