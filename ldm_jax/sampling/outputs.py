"""Images on disk with their metadata, each made once, also after interruptions."""

import dataclasses
import functools
import math
import os
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import UInt8
from PIL import Image
from tqdm import tqdm

from ldm_jax.data.image_files import open_image
from ldm_jax.files import printable
from ldm_jax.images import grid, write_png
from ldm_jax.parallel.multihost import wait_for_all
from ldm_jax.sampling.conditions import (
    ImageSpec,
    condition_inputs,
    image_specs,
    warn_of_texts,
)
from ldm_jax.sampling.input_images import read_image, reading
from ldm_jax.sampling.metadata import differences, make_metadata, texts_of
from ldm_jax.sampling.pipeline import (
    Pipeline,
    images_per_round,
    open_pipeline,
    sample_images,
)
from ldm_jax.sampling.request import SampleRequest
from ldm_jax.sampling.sample_fn import steps_of_strength
from ldm_jax.sampling.sampling_config import SamplingConfig
from ldm_jax.types import InputError

MAX_GRID_SIDE = 20
NUM_FRAMES = 10


class GridLayout(NamedTuple):
    """The images of a grid."""

    indices: list[int]
    """Indices of the images, row by row."""
    columns: int
    """Images a row."""


class Work(NamedTuple):
    """A request with its pipeline and its images."""

    request: SampleRequest
    """The request; in a pod, with this process' share."""
    pipeline: Pipeline
    """Makes the images."""
    specs: list[ImageSpec]
    """The images, in order."""


def write_images(settings: SamplingConfig, request: SampleRequest) -> list[Path]:
    """Make every label or text with every seed, row by row, and write them.

    An image that exists with the same metadata is kept, so that the same command
    resumes after an interruption. Several processes share the work; the first one
    writes the grid: of all images if the processes have joined, otherwise of those that
    exist.

    Returns:
      The first image, the grid, and the trajectory if it was requested.

    Raises:
      InputError: If the run has no finished checkpoint, the weights cannot be read, the
        request lacks a condition, or another image has the path of one.
      RunError: If no checkpoint is intact.
      OSError: If an image cannot be written; those before it stay.
    """
    work = open_work(settings, request)
    paths = [request.folder / f"{i:06d}.png" for i in range(len(work.specs))]
    make_missing(work, paths)
    if work.request.process[0]:
        return []
    return [paths[0], *write_grids(work, paths)]


def open_work(settings: SamplingConfig, request: SampleRequest) -> Work:
    """Load the model of a request, and list its images.

    Raises:
      InputError: As `write_images`; likewise `RunError`.
    """
    if jax.process_count() > 1:
        process = (jax.process_index(), jax.process_count())
        request = dataclasses.replace(request, process=process)
    pipeline = open_pipeline(settings)
    specs = image_specs(pipeline.model, request, guided=pipeline.settings.guided)
    condition_inputs(pipeline.model, [specs[0].condition_texts])  # needs a tokenizer
    rows = [row for spec in specs for row in (spec.condition_texts, spec.other or {})]
    warn_of_texts(pipeline.model, pipeline.settings, rows)
    return Work(request, pipeline, specs)


def make_missing(work: Work, paths: list[Path]) -> int:
    """Make this process' share of the missing images; wait for the other processes.

    Args:
      paths: Path of each image; folders are created.

    Returns:
      The number of images made.

    Raises:
      InputError: If another image has the path of one.
      OSError: If an image cannot be written; those before it stay.
    """
    request, pipeline, specs = work

    def metadata(i: int) -> dict[str, str]:
        return make_metadata(specs[i], pipeline.settings, pipeline.made_with)

    flag, overwrite = request.folder_flag, request.overwrite
    # All are checked before the first is written.
    size = (pipeline.inputs.width, pipeline.inputs.height)
    missing = {
        i
        for i, path in enumerate(paths)
        if not path.exists()
        or not is_made(path, metadata(i), overwrite=overwrite, flag=flag, size=size)
    }
    mine = [i for i in share(len(specs), pipeline, request.process) if i in missing]
    for folder in dict.fromkeys(os.path.dirname(path) for path in paths):
        os.makedirs(folder or ".", exist_ok=True)
    done = len(specs) - len(missing)
    with tqdm(
        total=done + len(mine), initial=done, unit=" images", mininterval=1.0
    ) as bar:
        made = sample_images(pipeline, [specs[i] for i in mine])
        for i, one in zip(mine, made, strict=True):
            write_png(paths[i], one.image, metadata(i))
            bar.update()
    wait_for_all("images")
    return len(mine)


def is_made(
    path: Path,
    metadata: dict[str, str],
    *,
    overwrite: bool,
    flag: str = "--out",
    size: tuple[int, int] | None = None,
) -> bool:
    """Return whether a file is the image of some metadata, undamaged.

    Args:
      path: The file.
      metadata: Metadata of the wanted image.
      overwrite: Whether any other file may be replaced.
      flag: The flag that named the folder, for messages.
      size: Width and height of the image that is wanted; None compares none.

    Returns:
      True for the image; False for a file to replace: an empty file, a damaged image
      with that metadata, or, with `overwrite`, any file.

    Raises:
      InputError: If another file is there, and may not be replaced.
    """
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no regular file"
        if overwrite:
            raise InputError(
                f"--overwrite: {path} is {what}, wanted an image to replace"
            )
        raise InputError(
            f"{flag}: {path} is {what}, wanted an image; try another {flag}"
        )
    if path.stat().st_size == 0:
        return False
    try:
        with reading(path, flag=flag), open_image(path) as image:
            changed = differences(metadata, texts_of(image))
            if size is not None and image.size != size:
                there, here = (f"{wide} x {tall}" for wide, tall in (image.size, size))
                changed = {**changed, "pixels": (here, there)}
            whole = _is_whole(image)
    except InputError as error:
        if overwrite:
            return False
        raise InputError(f"{error}; try another {flag}, or --overwrite") from None
    if not changed:
        return whole
    if overwrite:
        return False
    details = ", ".join(
        f"{printable(word)}: {printable(there)} there, {printable(here)} here"
        for word, (here, there) in changed.items()
    )
    raise InputError(
        f"{flag}: {path} was made differently ({details}); try another {flag}, or "
        "--overwrite"
    )


def _is_whole(image: Image.Image) -> bool:
    """Return whether an open PNG is complete, by the checksums of its chunks."""
    try:
        image.verify()
    except (OSError, SyntaxError, ValueError):
        return False
    return True


def share(num: int, pipeline: Pipeline, process: tuple[int, int]) -> list[int]:
    """Return this process' share of `num` images: every n-th call.

    The share does not depend on which images exist, so that processes that start at
    different times agree; nor on the number of cores, which differs among hosts.
    """
    size, (index, num_processes) = images_per_round(pipeline), process
    return [i for i in range(num) if i // size % num_processes == index]


def grid_layout(request: SampleRequest, num: int) -> GridLayout:
    """Choose the images of a grid: at most 20 rows of 20, seeds across."""
    across = request.interpolate or len(request.seeds)
    columns = min(across, MAX_GRID_SIDE)
    indices = [
        i for i in range(num) if i // across < MAX_GRID_SIDE and i % across < columns
    ]
    return GridLayout(indices, columns)


def grid_paths(request: SampleRequest) -> list[Path]:
    """Return the path of the grid, and of the trajectory if it was requested."""
    names = ["grid.png", *(["trajectory.png"] if request.trajectory else [])]
    return [request.folder / name for name in names]


def write_grids(work: Work, paths: list[Path]) -> list[Path]:
    """Write the grid, and the trajectory if it was requested; return their paths."""
    request, pipeline, specs = work
    layout = grid_layout(request, len(specs))
    written = grid_paths(request)
    # Images that another process has not made yet are black.
    flag = request.folder_flag
    read = functools.partial(read_image, flag=flag, most_aspect=math.inf)
    blank = np.zeros_like(read(paths[0]))
    there = [paths[i] for i in layout.indices]
    images = [read(path) if path.exists() else blank for path in there]
    write_png(written[0], grid(np.stack(images), columns=layout.columns))
    if request.trajectory:
        chosen = [specs[i] for i in layout.indices]
        write_png(written[1], trajectory_grid(pipeline, chosen))
    return written


def trajectory_grid(
    pipeline: Pipeline, specs: list[ImageSpec]
) -> UInt8[np.ndarray, "h w c"]:
    """Sample images again, and return their denoising, a row each."""
    settings = pipeline.settings
    steps = steps_of_strength(settings.strength, settings.steps)
    num_frames = min(NUM_FRAMES, steps + 1)
    made = sample_images(pipeline, specs, num_frames=num_frames)
    frames = np.concatenate([one.frames for one in made])
    return grid(frames, columns=num_frames)
