"""`ldm sample`."""

import dataclasses
import math
import re
import sys
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

from ldm_jax.config import Config, read_config
from ldm_jax.config.flags import Inline, as_flag, parse_flags, parse_list
from ldm_jax.config.launch import Launch
from ldm_jax.config.validation import Text, require_local, shown
from ldm_jax.parallel.launch import start
from ldm_jax.sampling.request import (
    FLAG_NAMES,
    MAX_SEED,
    ReplayRequest,
    SampleRequest,
    check_request,
    list_text,
    number_text,
)
from ldm_jax.sampling.sampling_config import SamplingConfig
from ldm_jax.types import InputError, RunError

BY_HAND = (
    *("workdir", "weights", "config_file", "tokenizer", "autoguidance"),
    *("image", "mask", "size", "outpaint", "precision"),
)
"""Settings that --replay takes: what metadata alone may not choose, and a precision to
compare with."""
PATHS = (
    *("workdir", "weights", "config_file", "tokenizer", "autoguidance"),
    *("image", "mask", "replay"),
)
"""Paths, most of them texts, since the metadata holds them."""


class SampleCommand(NamedTuple):
    """Images to make."""

    settings: SamplingConfig
    """Settings of the images."""
    request: SampleRequest
    """The images, and where they are written."""
    launch: Launch
    """Processes and compilation cache of the program."""


def read_scales(text: str) -> tuple[float, ...]:
    """Read guidance scales: one, or several as in 1,4,1."""
    try:
        scales = tuple(float(part) for part in text.split(","))
    except ValueError:
        scales = (-1.0,)
    if not all(0.0 <= scale < math.inf for scale in scales):
        raise InputError(f"got {text}, wanted 0 or more, or several as in 1,4,1")
    return scales


def _labels(text: str) -> tuple[int, ...] | None:
    return None if text == "all" else _numbers(text)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(parse_list(text, name="list", low=0, high=MAX_SEED))
    except InputError as error:  # the flag is named by `tyro`
        raise InputError(str(error).removeprefix("list: ")) from None


def _process(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    if found is None or int(found[1]) >= int(found[2]):
        raise InputError(f"got {shown(text)}, wanted one of several, as in 0/4")
    return int(found[1]), int(found[2])


def _one_word(read: Any, write: Any, metavar: str) -> Any:
    """Describe a flag whose value is one word to `tyro`."""
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: read(words[0]),
        is_instance=lambda value: value is None or isinstance(value, tuple),
        str_from_instance=lambda value: [write(value)],
    )


LIST = "LIST"
"""In help: numbers, ranges, or both."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleArguments(SampleRequest, SamplingConfig):
    """Make images with a trained run, or with weights from elsewhere.

    Lists are numbers, ranges, or both: 3, 0-9, 1,4,7, 0-4,9.
    """

    config_file: Annotated[str | None, tyro.conf.arg(name="config")] = None
    guidance_scale: Annotated[
        tuple[float, ...],
        _one_word(
            read_scales, lambda given: ",".join(map(number_text, given)), "SCALES"
        ),
    ] = ()
    guidance_low: tyro.conf.Suppress[float] = 0.0
    guidance_high: tyro.conf.Suppress[float | None] = None
    labels: Annotated[
        tuple[int, ...] | None,
        _one_word(_labels, lambda given: "all" if given is None else "", LIST),
    ] = None
    prompts: Annotated[tuple[Text, ...], tyro.conf.arg(name="prompt")] = ()
    seeds: Annotated[tuple[int, ...], _one_word(_numbers, list_text, LIST)] = tuple(
        range(10)
    )
    process: Annotated[
        tuple[int, int],
        _one_word(_process, lambda given: "/".join(map(str, given)), "I/N"),
    ] = (0, 1)
    guidance_interval: tuple[float, float] | None = None
    """Guide only where the noise-to-signal ratio lies between these two; the second may
    be inf."""
    replay: Path | None = None
    """Make an image again from the metadata in its PNG, and compare every pixel."""
    launch: Annotated[Launch, Inline] = Launch()
    """Processes and compilation cache; the processes of a pod share the images."""

    def __post_init__(self) -> None:
        """Skip the checks: the parts made from the flags check themselves."""


def parse_sample(args: list[str]) -> SampleCommand | ReplayRequest:
    """Read the command line.

    Returns:
      The command; for a run, checked against its config.

    Raises:
      InputError: If a flag is unknown, a value is wrong, or the folder is no run.
      SystemExit: After printing the help.
    """
    given = parse_flags(SampleArguments, args, prog="ldm sample")
    for name in PATHS:
        require_local(f"--{FLAG_NAMES.get(name, name)}", getattr(given, name))
    if given.replay is not None:
        return _replay(given)
    if (given.workdir is None) == (given.weights is None):
        raise InputError(
            "--workdir: not given, wanted either the folder of a run or --weights"
            if given.workdir is None
            else "--weights: got it beside --workdir, wanted one of the two"
        )
    for name in ("image", "mask"):
        path = getattr(given, name)
        if path is not None and not Path(path).is_file():
            raise InputError(f"--{name}: no file {path}")
    low, high = given.guidance_interval or (0.0, math.inf)
    if not 0.0 <= low < high:
        raise InputError(
            f"--guidance-interval: got {low:g} {high:g}, wanted two rising numbers "
            "from 0 on, as in 0.5 5 or 0.5 inf"
        )
    interval = {
        "guidance_low": low,
        "guidance_high": None if high == math.inf else high,
    }
    try:
        settings = SamplingConfig(**{**_values(SamplingConfig, given), **interval})
        request = SampleRequest(**_values(SampleRequest, given))
        check_request(settings, request)
    except InputError as error:
        raise as_flag(error) from None
    if request.as_dataset is not None and given.out != SampleRequest.out:
        raise InputError("--out: got it beside --as-dataset, wanted one of the two")
    if request.folder.exists() and not request.folder.is_dir():
        raise InputError(
            f"{request.folder_flag}: {request.folder} is a file, wanted a folder"
        )
    workdir = None if given.workdir is None else Path(given.workdir)
    if workdir is not None:
        _check_run(read_config(workdir), settings, request)
    if given.launch.joins and request.process[1] > 1:
        raise InputError(
            f"--process: got {'/'.join(map(str, request.process))} in a pod, wanted "
            "none: its processes share the images by themselves"
        )
    return SampleCommand(settings, request, given.launch)


def _values(cls: type[Any], given: SampleArguments) -> dict[str, Any]:
    """Take the fields of a part from the flags."""
    return {field.name: getattr(given, field.name) for field in dataclasses.fields(cls)}


def _replay(given: SampleArguments) -> ReplayRequest:
    may = {"replay", *BY_HAND}
    for field in dataclasses.fields(given):
        if field.name not in may and getattr(given, field.name) != field.default:
            flag = field.name.replace("_", "-")
            raise InputError(
                f"--{flag}: got it beside --replay, wanted none: the metadata has it"
            )
    if given.workdir is not None and given.weights is not None:
        raise InputError("--weights: got it beside --workdir, wanted one of the two")
    image = Path(str(given.replay))
    if not image.is_file():
        raise InputError(f"--replay: no file {image}; wanted a PNG of ldm sample")
    moved = {name: getattr(given, name) for name in BY_HAND}
    moved = {name: value for name, value in moved.items() if value is not None}
    models: dict[str, str | None] = {"workdir": None, "weights": None}
    model_moved = not models.keys().isdisjoint(moved)
    return ReplayRequest(
        image=image, moved={**(models if model_moved else {}), **moved}
    )


def _check_run(
    config: Config, settings: SamplingConfig, request: SampleRequest
) -> None:
    """Raise `InputError` for settings that the config of a run excludes."""
    if settings.config_file is not None:
        raise InputError(
            "--config: got it beside --workdir, wanted none: a run has its own"
        )
    num_timesteps = config.diffusion.num_timesteps
    if settings.steps > num_timesteps:
        raise InputError(
            f"--steps: got {settings.steps}, wanted 1 to {num_timesteps}, the run's "
            "diffusion.num_timesteps"
        )
    if settings.ema_length is not None and not config.diffusion.average_lengths:
        raise InputError(
            f"--ema-length: got {settings.ema_length:g}, but the run kept no averages "
            "of its weights, wanted none; try ldm train --diffusion.average-lengths "
            "0.05 0.1 in another --workdir"
        )
    top = config.data.num_classes - 1
    if request.labels is not None and config.diffusion.condition.uses_classes:
        if outside := [label for label in request.labels if label > top]:
            raise InputError(f"--labels: got {outside[0]}, wanted 0 to {top}")


def main(args: list[str]) -> None:
    """Make images, and print the files that were written."""
    command = parse_sample(args)
    if isinstance(command, ReplayRequest):
        compare(command)
        return
    settings, request, launch = command
    workdir = None if settings.workdir is None else Path(settings.workdir)
    start(launch, beside=workdir)
    if request.as_dataset is not None:
        from ldm_jax.sampling.synthetic_dataset import write_dataset

        outcome = write_dataset(settings, request)
        for line in (*outcome.written, *outcome.notes):
            print(line)
        return
    from ldm_jax.sampling.outputs import write_images

    for path in write_images(settings, request):
        print(path)


def compare(request: ReplayRequest) -> None:
    """Make an image again, and print whether every pixel is the same.

    Raises:
      RunError: If one differs.
    """
    from ldm_jax.sampling.metadata import replay

    found = replay(request)
    for warning in found.warnings:
        print(f"ldm sample: warning: {warning}", file=sys.stderr)
    if found.num_different:
        raise RunError(
            f"--replay: {found.num_different} of {found.num_pixels} pixels differ, by "
            f"at most {found.largest} grey levels"
        )
    print(f"{request.image}: every one of {found.num_pixels} pixels is the same")
