"""`ldm report`."""

from pathlib import Path
from typing import Annotated

from ldm_jax.config.flags import Inline, parse_flags
from ldm_jax.config.launch import Launch
from ldm_jax.config.validation import checked_dataclass
from ldm_jax.parallel.launch import PEER_TIMEOUT, start


@checked_dataclass
class Flags:
    """Write a run on one page: what was trained, how it went, what it draws.

        ldm report --workdir runs/digits

    Writes WORKDIR/report.html, complete in itself: it can be mailed, and opened without
    a network. What `ldm evaluate` and `ldm steps` found of the run is in it; a run that
    is not finished has one too.
    """

    workdir: Path
    """Folder of the run."""
    out: Path | None = None
    """File to write; WORKDIR/report.html by default."""
    samples: bool = True
    """Draw samples; without, nothing is computed."""
    launch: Annotated[Launch, Inline] = Launch()
    """How the program starts."""


def main(args: list[str]) -> None:
    """Write the report, and print where it is."""
    flags = parse_flags(Flags, args, prog="ldm report")
    from ldm_jax.tools.report.run_summary import check_out, read_run_summary

    summary = read_run_summary(flags.workdir)
    out = flags.out or flags.workdir / "report.html"
    check_out(out)
    start(flags.launch, beside=flags.workdir, peer_timeout=PEER_TIMEOUT)
    from ldm_jax.tools.report.writing import write_report

    write_report(summary, out, with_samples=flags.samples)
    print(out)
