"""Shared by benchmarks: their commands."""

import argparse
from typing import NoReturn

from ldm_jax.types import InputError


class OneLineParser(argparse.ArgumentParser):
    """An argparse parser whose errors are `InputError`s."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and exiting."""
        raise InputError(message)


def make_parser(prog: str, description: str | None) -> OneLineParser:
    """Make a parser that shows a module's docstring, and each mistake in one line."""
    return OneLineParser(
        prog=prog,
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
