"""`ldm import`."""

from pathlib import Path

from ldm_jax.config.flags import Positional, parse_flags
from ldm_jax.config.validation import checked_dataclass


@checked_dataclass
class Flags:
    """Convert weights of another program to a folder for `ldm sample --workdir`.

    ldm import stable-diffusion-v1-5 --out runs/sd15
    """

    path: Positional[Path]
    """A diffusers folder, or a file in CompVis naming."""
    out: Path
    """A new folder."""
    config: Path | None = None
    """Config of a file that does not hold one: a shipped one, such as ldm/sd15, or a
    file."""
    tokenizer: Path | None = None
    """Folder of the tokenizer's files, if the weights have none."""
    latent_scale: float | None = None
    """Latent scale of the autoencoder, if the weights do not state it."""


def main(args: list[str]) -> None:
    """Import, and print the folder."""
    flags = parse_flags(Flags, args, prog="ldm import")
    from ldm_jax.pretrained.convert import import_weights

    import_weights(
        flags.path,
        flags.out,
        config_file=flags.config,
        tokenizer=flags.tokenizer,
        latent_scale=flags.latent_scale,
    )
    print(flags.out)
