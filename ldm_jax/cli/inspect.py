"""`ldm inspect`."""

import json
from pathlib import Path

from ldm_jax.cli.streams import check_stdout
from ldm_jax.config.flags import Positional, parse_flags
from ldm_jax.config.validation import checked_dataclass


@checked_dataclass
class Flags:
    """List what weights hold, as JSON: format, parts, tensors and dtypes.

    ldm inspect stable-diffusion-v1-5
    """

    path: Positional[Path]
    """A folder or a file."""


def main(args: list[str]) -> None:
    """Print the list."""
    flags = parse_flags(Flags, args, prog="ldm inspect")
    check_stdout()
    from ldm_jax.pretrained.inspect_weights import inspect

    print(json.dumps(inspect(flags.path), indent=2))
