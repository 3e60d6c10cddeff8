"""A run on one page: what was trained, how it went, what it draws, how good it is.

    ldm report --workdir runs/digits

Writes WORKDIR/report.html, complete in itself: it can be mailed, and opened without a
network. What `ldm evaluate` and `ldm steps`
found of the run is in it; a run that is not finished has one too.
"""

import argparse
from pathlib import Path

from ldm_jax.config.flags import OneLineParser, run_main
from ldm_jax.config.launch import add_flags, check_launch
from ldm_jax.parallel.launch import PEER_TIMEOUT, start
from ldm_jax.tools.report.run_summary import check_out, read_run_summary

PROG = "ldm report"


def main(args: list[str]) -> None:
    """Read, draw, write."""
    parser = OneLineParser(
        prog=PROG,
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", type=Path, required=True, help="of the run")
    parser.add_argument("--out", type=Path, help="file; WORKDIR/report.html by default")
    parser.add_argument(
        "--no-samples", action="store_true", help="draw nothing, only tell"
    )
    add_flags(parser)
    given = parser.parse_args(args)
    summary = read_run_summary(given.workdir)
    out = given.out or given.workdir / "report.html"
    check_out(out)
    start(check_launch(given, beside=given.workdir), peer_timeout=PEER_TIMEOUT)
    # Only now: help and bad input need not wait for JAX.
    from ldm_jax.tools.report.writing import write_report

    write_report(summary, out, draws=not given.no_samples)
    print(out)  # noqa: T201


if __name__ == "__main__":
    run_main(main, PROG)
