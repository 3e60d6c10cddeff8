"""`ldm check-images`."""

import json
import os
from pathlib import Path

from ldm_jax.cli.exit_codes import FAILED_RUN
from ldm_jax.config.flags import Positional, parse_flags
from ldm_jax.config.validation import checked_dataclass, require_at_least
from ldm_jax.types import InputError


@checked_dataclass
class Flags:
    """Check a folder of images before a model is trained on it.

        ldm check-images pictures

    Decodes every file and counts images by class and split, their sizes and modes;
    names files that cannot be read, images that are the same, and images without a
    caption; and draws a contact sheet. Exit code 1 if files cannot be read, else 0.
    """

    path: Positional[Path]
    """The folder."""
    out: Path = Path("contact_sheet.png")
    """PNG to draw."""
    image_size: int | None = None
    """Name images with a side below this many pixels."""
    train_split: str = "train"
    """Training split, as in --data.train-split."""
    test_split: str | None = None
    """Held-out split, as in --data.test-split; test by default, if there is one."""
    json: bool = False
    """Print JSON, with all names."""

    def _check(self) -> None:
        require_at_least(self, 1, "image_size")
        if self.out.suffix.lower() != ".png":
            raise InputError(f"out: got {self.out}, wanted a name that ends in .png")
        folder = os.path.realpath(os.path.expanduser(self.path))
        if Path(folder) in Path(os.path.realpath(self.out)).parents:
            raise InputError(
                f"out: {self.out} lies in {self.path}, where it would count as one of "
                "its images; try --out with a file elsewhere"
            )
        if not self.out.absolute().parent.is_dir():
            raise InputError(f"out: no folder {self.out.parent} to write to")


def main(args: list[str]) -> int:
    """Check everything, and print what was found.

    Returns:
      The exit code: 1 if there are broken files.
    """
    flags = parse_flags(Flags, args, prog="ldm check-images")
    from ldm_jax.tools.check_images.check import check_images, in_words

    found = check_images(
        Path(os.path.expanduser(flags.path)),
        flags.out,
        image_size=flags.image_size,
        train_split=flags.train_split,
        test_split=flags.test_split,
    )
    text = json.dumps(found) if flags.json else "\n".join(in_words(found))
    print(text.encode("utf-8", "backslashreplace").decode())
    return FAILED_RUN if found["broken"] else 0
