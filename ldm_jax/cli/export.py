"""`ldm export`."""

from pathlib import Path
from typing import Literal

from ldm_jax.config.flags import Positional, parse_flags
from ldm_jax.config.validation import checked_dataclass


@checked_dataclass
class Flags:
    """Write a run, or imported weights, for other programs.

    ldm export runs/digits --out digits_diffusers
    ldm export runs/digits --out digits.safetensors --format compvis
    """

    path: Positional[Path]
    """Folder of the run."""
    out: Path
    """A new folder for diffusers, a .safetensors file for CompVis."""
    format: Literal["diffusers", "compvis"] = "diffusers"
    """Format of the output."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Dtype of the parameters; float32 is lossless."""


def main(args: list[str]) -> None:
    """Export, and print the path."""
    flags = parse_flags(Flags, args, prog="ldm export")
    from ldm_jax.pretrained.convert import export_run

    export_run(flags.path, flags.out, layout=flags.format, dtype=flags.dtype)
    print(flags.out)
