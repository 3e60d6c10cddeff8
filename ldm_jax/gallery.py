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

from ldm_jax.drawing import draw
from ldm_jax.images import grid, read_png, write_png
from ldm_jax.pictures import reading
from ldm_jax.recipes import differences, texts_of, write_recipe
from ldm_jax.requests import SampleRequest
from ldm_jax.studio import Studio, images_a_turn, open_studio
from ldm_jax.subjects import (
    Subject,
    condition_inputs,
    subjects_of,
    tell_of_prompts,
)
from ldm_jax.training.hosts import wait_for_all
from ldm_jax.types import InputError

MAX_GRID_SIDE = 20
NUM_FRAMES = 10


class Sheet(NamedTuple):
    """Which images a grid shows.

    Attributes:
      indices: Of the images, row by row.
      columns: Images a row.
    """

    indices: list[int]
    columns: int


class Work(NamedTuple):
    """What a request comes to.

    Attributes:
      request: It; in a pod, with this process' turn.
      studio: What draws.
      subjects: What is drawn, in order.
    """

    request: SampleRequest
    studio: Studio
    subjects: list[Subject]


def write_gallery(request: SampleRequest) -> list[Path]:
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
    paths = [request.out / f"{i:06d}.png" for i in range(len(work.subjects))]
    draw_missing(work, paths)
    if work.request.turn:
        return []
    return [paths[0], *write_sheets(work, paths)]


def open_work(request: SampleRequest) -> Work:
    """Load the model of a request, and see what it draws.

    Raises:
      InputError: As `write_gallery`; likewise `RunError`.
    """
    if jax.process_count() > 1:
        turn, turns = jax.process_index(), jax.process_count()
        request = dataclasses.replace(request, turn=turn, turns=turns)
    studio = open_studio(request.settings)
    subjects = subjects_of(studio.run.config, request)
    condition_inputs(studio.run.config, [subjects[0].shown])  # a tokenizer is missing
    tell_of_prompts(studio.run.config, request.prompts)
    return Work(request, studio, subjects)


def draw_missing(work: Work, paths: list[Path]) -> int:
    """Make this process' share of the images that are not there; wait for the others.

    Args:
      work: The request.
      paths: Where each image goes; folders are made.

    Returns:
      How many were made.

    Raises:
      InputError: If an image is there that was made otherwise.
      OSError: If an image cannot be written; those before it stay.
    """
    request, studio, subjects = work

    def recipe(i: int) -> dict[str, str]:
        return write_recipe(subjects[i], studio.settings, studio.made_with)

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
        for i in share(len(subjects), studio, turn=request.turn, turns=request.turns)
        if i in missing
    ]
    for folder in dict.fromkeys(os.path.dirname(path) for path in paths):
        os.makedirs(folder or ".", exist_ok=True)
    done = len(subjects) - len(missing)
    with tqdm(
        total=done + len(mine), initial=done, unit=" images", mininterval=1.0
    ) as bar:
        pictures = draw(studio, [subjects[i] for i in mine])
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
    told = ", ".join(
        f"{word}: {there} there, {here} here" for word, (here, there) in changed.items()
    )
    raise InputError(
        f"{flag}: {path} was made otherwise ({told}); try another {flag}, or "
        "--overwrite"
    )


def is_whole(picture: Image.Image) -> bool:
    """Say whether an open PNG is there to its end, by the checksums of its parts."""
    try:
        picture.verify()
    except (OSError, SyntaxError, ValueError):
        return False
    return True


def share(num: int, studio: Studio, *, turn: int, turns: int) -> list[int]:
    """Take this process' images of all: whole calls, in turn.

    Whatever is there already, so that processes that look at different times agree.
    """
    size = images_a_turn(studio)  # not of cores, which hosts may have more or less of
    return [i for i in range(num) if i // size % turns == turn]


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
    request, studio, subjects = work
    sheet = sheet_of(request, len(subjects))
    written = sheet_paths(request)
    # Another process may not be there yet: its images are left black.
    blank = np.zeros_like(read_png(paths[0]))
    images = [read_png(paths[i]) if paths[i].exists() else blank for i in sheet.indices]
    write_png(written[0], grid(np.stack(images), columns=sheet.columns))
    if request.trajectory:
        shown = [subjects[i] for i in sheet.indices]
        write_png(written[1], trajectories(studio, shown))
    return written


def trajectories(studio: Studio, subjects: list[Subject]) -> UInt8[np.ndarray, "h w c"]:
    """Draw the denoising of subjects, a row each."""
    settings = studio.settings
    steps = round(settings.steps * (settings.strength or 1.0))
    num_frames = min(NUM_FRAMES, max(steps, 1) + 1)
    pictures = draw(studio, subjects, num_frames=num_frames)
    frames = np.concatenate([picture.frames for picture in pictures])
    return grid(frames, columns=num_frames)
