"""Shared by benchmarks: their commands."""

import argparse

from ldm_jax.config.flags import OneLineParser


def make_parser(prog: str, description: str | None) -> OneLineParser:
    """Make a parser that shows a module's docstring, and each mistake in one line."""
    return OneLineParser(
        prog=prog,
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
