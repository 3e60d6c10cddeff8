"""Images on disk: every subject once, each with its recipe, whatever interrupts."""

import dataclasses
import os
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import UInt8
from PIL import Image
from tqdm import tqdm

from ldm_jax.images import grid, read_png, write_png
from ldm_jax.parallel.multihost import wait_for_all
from ldm_jax.sampling.conditions import (
    ImageSpec,
    condition_inputs,
    image_specs,
    warn_of_prompts,
)
from ldm_jax.sampling.draw import draw
from ldm_jax.sampling.input_images import reading
from ldm_jax.sampling.metadata import differences, make_metadata, texts_of
from ldm_jax.sampling.pipeline import Pipeline, images_per_round, open_pipeline
from ldm_jax.sampling.request import SampleRequest
from ldm_jax.types import InputError

MAX_GRID_SIDE = 20
NUM_FRAMES = 10


class Sheet(NamedTuple):
    """Which images a grid shows."""

    indices: list[int]
    """Of the images, row by row."""
    columns: int
    """Images a row."""


class Work(NamedTuple):
    """What a request comes to."""

    request: SampleRequest
    """It; in a pod, with this process' turn."""
    pipeline: Pipeline
    """What draws."""
    specs: list[ImageSpec]
    """What is drawn, in order."""


def write_images(request: SampleRequest) -> list[Path]:
    """Make every label or text with every seed, row by row, and write them.

    An image that is there already with the same recipe is kept; so an interrupted
    command, given again, makes the rest. Several processes share the work, and the
    first one draws the grid: of all, if they have joined, or of what it finds.

    Args:
      request: What to make.

    Returns:
      What was written that a person wants to look at: the first image, the grid, and
      the trajectory if it was asked for.

    Raises:
      InputError: If the run has no finished checkpoint, the weights cannot be read, the
        model needs what was not asked for, or an image is there that was made
        otherwise.
      RunError: If no checkpoint is intact.
      OSError: If an image cannot be written; those before it stay.
    """
    work = open_work(request)
    paths = [request.out / f"{i:06d}.png" for i in range(len(work.specs))]
    draw_missing(work, paths)
    if work.request.share_index:
        return []
    return [paths[0], *write_sheets(work, paths)]


def open_work(request: SampleRequest) -> Work:
    """Load the model of a request, and see what it draws.

    Raises:
      InputError: As `write_images`; likewise `RunError`.
    """
    if jax.process_count() > 1:
        share_index, num_shares = jax.process_index(), jax.process_count()
        request = dataclasses.replace(
            request, share_index=share_index, num_shares=num_shares
        )
    pipeline = open_pipeline(request.settings)
    specs = image_specs(pipeline.run.config, request)
    condition_inputs(
        pipeline.run.config, [specs[0].condition_texts]
    )  # a tokenizer is missing
    warn_of_prompts(pipeline.run.config, request.prompts)
    return Work(request, pipeline, specs)


def draw_missing(work: Work, paths: list[Path]) -> int:
    """Make this process' share of the images that are not there; wait for the others.

    Args:
      paths: Where each image goes; folders are made.

    Returns:
      How many were made.

    Raises:
      InputError: If an image is there that was made otherwise.
      OSError: If an image cannot be written; those before it stay.
    """
    request, pipeline, specs = work

    def recipe(i: int) -> dict[str, str]:
        return make_metadata(specs[i], pipeline.settings, pipeline.made_with)

    flag = request.out_flag
    # All are looked at before the first is written: what was made otherwise stops here.
    missing = {
        i
        for i, path in enumerate(paths)
        if not (
            path.exists()
            and is_made(path, recipe(i), overwrite=request.overwrite, flag=flag)
        )
    }
    mine = [
        i
        for i in share(
            len(specs),
            pipeline,
            share_index=request.share_index,
            num_shares=request.num_shares,
        )
        if i in missing
    ]
    for folder in dict.fromkeys(os.path.dirname(path) for path in paths):
        os.makedirs(folder or ".", exist_ok=True)
    done = len(specs) - len(missing)
    with tqdm(
        total=done + len(mine), initial=done, unit=" images", mininterval=1.0
    ) as bar:
        pictures = draw(pipeline, [specs[i] for i in mine])
        for i, picture in zip(mine, pictures, strict=True):
            write_png(paths[i], picture.image, recipe(i))
            bar.update()
    wait_for_all("images")
    return len(mine)


def is_made(
    path: Path, recipe: dict[str, str], *, overwrite: bool, flag: str = "--out"
) -> bool:
    """Say whether what stands in an image's place is that image, whole.

    Args:
      path: What is there.
      recipe: Of the image that is wanted.
      overwrite: Whether anything else may be replaced.
      flag: That named the folder, for messages.

    Returns:
      True for the image; False for what is to be replaced: an empty file, a damaged
      one that begins as the image does, or, if it may be, anything else.

    Raises:
      InputError: If something else is there, and may not be replaced.
    """
    if overwrite and path.is_dir():
        raise InputError(f"--overwrite: {path} is a folder, wanted an image to replace")
    if path.stat().st_size == 0:
        return False
    try:
        with reading(path, flag=flag), Image.open(path) as picture:
            changed = differences(recipe, texts_of(picture))
            whole = is_whole(picture)
    except InputError as error:
        if overwrite:
            return False
        raise InputError(f"{error}; try another {flag}, or --overwrite") from None
    if not changed:
        return whole
    if overwrite:
        return False
    details = ", ".join(
        f"{word}: {there} there, {here} here" for word, (here, there) in changed.items()
    )
    raise InputError(
        f"{flag}: {path} was made otherwise ({details}); try another {flag}, or "
        "--overwrite"
    )


def is_whole(picture: Image.Image) -> bool:
    """Say whether an open PNG is there to its end, by the checksums of its parts."""
    try:
        picture.verify()
    except (OSError, SyntaxError, ValueError):
        return False
    return True


def share(
    num: int, pipeline: Pipeline, *, share_index: int, num_shares: int
) -> list[int]:
    """Take this process' images of all: whole calls, in turn.

    Whatever is there already, so that processes that look at different times agree.
    """
    size = images_per_round(
        pipeline
    )  # not of cores, which hosts may have more or less of
    return [i for i in range(num) if i // size % num_shares == share_index]


def sheet_of(request: SampleRequest, num: int) -> Sheet:
    """Choose what a grid shows: at most 20 rows of 20, seeds across."""
    across = request.interpolate or len(request.seeds)
    columns = min(across, MAX_GRID_SIDE)
    indices = [
        i for i in range(num) if i // across < MAX_GRID_SIDE and i % across < columns
    ]
    return Sheet(indices, columns)


def sheet_paths(request: SampleRequest) -> list[Path]:
    """Return where the grid goes, and the trajectory if it was asked for."""
    names = ["grid.png", *(["trajectory.png"] if request.trajectory else [])]
    return [request.out / name for name in names]


def write_sheets(work: Work, paths: list[Path]) -> list[Path]:
    """Write the grid, and the trajectory if it was asked for; return where they are."""
    request, pipeline, specs = work
    sheet = sheet_of(request, len(specs))
    written = sheet_paths(request)
    # Another process may not be there yet: its images are left black.
    blank = np.zeros_like(read_png(paths[0]))
    images = [read_png(paths[i]) if paths[i].exists() else blank for i in sheet.indices]
    write_png(written[0], grid(np.stack(images), columns=sheet.columns))
    if request.trajectory:
        condition_texts = [specs[i] for i in sheet.indices]
        write_png(written[1], trajectories(pipeline, condition_texts))
    return written


def trajectories(
    pipeline: Pipeline, specs: list[ImageSpec]
) -> UInt8[np.ndarray, "h w c"]:
    """Draw the denoising of subjects, a row each."""
    settings = pipeline.settings
    steps = round(settings.steps * (settings.strength or 1.0))
    num_frames = min(NUM_FRAMES, max(steps, 1) + 1)
    pictures = draw(pipeline, specs, num_frames=num_frames)
    frames = np.concatenate([picture.frames for picture in pictures])
    return grid(frames, columns=num_frames)
