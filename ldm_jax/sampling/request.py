"""The images to sample from a model, and their files. Imports no JAX."""

import dataclasses
import itertools
import math
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ldm_jax.config.validation import Text, checked_dataclass, require
from ldm_jax.sampling.sampling_config import SamplingConfig
from ldm_jax.types import InputError

MAX_SEED = 2**32 - 1
FLAG_NAMES = {"config_file": "config", "prompts": "prompt"}
"""Flags that have another name than their field."""
INTERVAL = ("guidance_low", "guidance_high")
"""Fields that are one flag, --guidance-interval LOW HIGH."""


@checked_dataclass
class SampleRequest:
    """The images to sample, and where they are written."""

    out: Path = Path("samples")
    """Folder for 000000.png ... and grid.png. Existing images with the same metadata
    are kept; others stop the command."""
    as_dataset: Path | None = None
    """Instead of --out: folder for a labelled data set, as a folder of images in
    images/ and as tfds:synthetic in tfds/ (docs/how_to/images.md)."""
    overwrite: bool = False
    """Replace existing images with other metadata."""
    labels: tuple[int, ...] | None = None
    """Classes to sample, as a list; all of them by default."""
    prompts: tuple[Text, ...] = ()
    """Texts to sample, each with every seed."""
    negative_prompt: Text = ""
    """Text to be guided away from."""
    seeds: tuple[int, ...] = tuple(range(10))
    """Seeds to sample each class or text with, as a list."""
    interpolate: int = 0
    """Images from the first seed, class or text to the second, both included."""
    trajectory: bool = False
    """Also write trajectory.png: the denoising, a row an image (samples the images of
    the grid a second time)."""
    process: tuple[int, int] = (0, 1)
    """This process' share of the images, as in 0/4, 1/4 ... for four commands that
    write to one folder; the first one writes the grid of the images it finds."""

    @property
    def folder(self) -> Path:
        """Folder of all files that are written."""
        return self.out if self.as_dataset is None else self.as_dataset

    @property
    def folder_flag(self) -> str:
        """The flag that names the folder, for messages."""
        return "--out" if self.as_dataset is None else "--as-dataset"

    def _check(self) -> None:
        in_range = bool(self.seeds) and 0 <= min(self.seeds) <= max(self.seeds)
        in_range = in_range and max(self.seeds) <= MAX_SEED
        require(self, "seeds", in_range, f"numbers from 0 to {MAX_SEED}")
        several = self.interpolate == 0 or self.interpolate >= 2
        require(self, "interpolate", several, "2 or more")
        shares = 0 <= self.process[0] < self.process[1]
        require(self, "process", shares, "one of several, as in 0/4")
        if self.interpolate and self.as_dataset is not None:
            raise InputError(
                "interpolate: got it beside --as-dataset, wanted none: an image "
                "between two classes or texts has no label"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplayRequest:
    """An image to make again."""

    image: Path
    """The PNG."""
    moved: dict[str, Any]
    """What is given by hand, by the names of `SamplingConfig`: where the files that it
    was made with are, and a size beyond the usual. The rest is as the metadata says."""


def check_request(settings: SamplingConfig, request: SampleRequest) -> None:
    """Raise `InputError` if a request and its settings exclude each other."""
    if settings.strength is not None and settings.image is None:
        raise InputError("strength: got it without --image, wanted an image")
    if settings.image is not None and request.interpolate:
        raise InputError("interpolate: got it beside --image, wanted one of the two")
    if settings.image is not None and request.as_dataset is not None:
        raise InputError(
            "image: got it beside --as-dataset, wanted none: a data set is sampled "
            "from noise alone"
        )
    if request.negative_prompt and settings.autoguidance is not None:
        raise InputError(
            "negative_prompt: got it beside --autoguidance, which guides away from a "
            "model, wanted one of the two"
        )


def command_line(settings: SamplingConfig, request: SampleRequest) -> str:
    """Write the command that makes the images of a request."""
    words = ["ldm sample"]
    for name, values in _flags(settings, request):
        # Joined by = where the value would be read as another flag.
        joint = "=" if values and values[0].startswith("-") else " "
        words.append(joint.join([f"--{name}", *map(shlex.quote, values)]))
    return " ".join(words)


def _flags(
    settings: SamplingConfig, request: SampleRequest
) -> Iterator[tuple[str, list[str]]]:
    """List the flags that differ from their defaults, each with its values."""
    for part in (settings, request):
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            if value != field.default and field.name not in INTERVAL:
                name = FLAG_NAMES.get(field.name, field.name).replace("_", "-")
                yield name, _values(field.name, value)
    low, high = settings.guidance_low, settings.guidance_high
    if (low, high) != (0.0, None):
        values = (low, math.inf if high is None else high)
        yield "guidance-interval", [number_text(value) for value in values]


def _values(name: str, value: Any) -> list[str]:
    """Write a field's value as the command line reads it."""
    if value is True:
        return []
    if name == "process":
        return ["/".join(map(str, value))]
    if name == "guidance_scale":
        return [",".join(map(number_text, value))]
    if name in ("labels", "seeds"):
        return [list_text(value)]
    values = value if isinstance(value, tuple) else (value,)
    return [number_text(one) if isinstance(one, float) else str(one) for one in values]


def number_text(value: float) -> str:
    """Write a number as short as it can be read back."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def list_text(numbers: Iterable[int]) -> str:
    """Write numbers as a list with ranges, as in 0-4,9."""
    ranges: list[str] = []
    for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        ends = [number for _, number in run]
        ranges.append(f"{ends[0]}" if len(ends) == 1 else f"{ends[0]}-{ends[-1]}")
    return ",".join(ranges)
