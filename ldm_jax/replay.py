"""An image made again from its recipe, and compared."""

import dataclasses
from typing import NamedTuple

import numpy as np

from ldm_jax.drawing import draw
from ldm_jax.pictures import modes_of, read_picture, size_text
from ldm_jax.recipes import differences, read_recipe, write_recipe
from ldm_jax.requests import ReplayRequest
from ldm_jax.settings import Settings
from ldm_jax.studio import Studio, open_studio
from ldm_jax.subjects import check_subject
from ldm_jax.types import InputError

MODELS = ("--workdir", "--weights")


class Replay(NamedTuple):
    """How an image compares with the one that its recipe gives here.

    Attributes:
      warnings: What differs from when it was made: versions, platform, checkpoint.
      num_pixels: Pixels of the image.
      num_different: Those that differ.
      largest: Largest difference, in grey levels.
    """

    warnings: list[str]
    num_pixels: int
    num_different: int
    largest: int


def replay(request: ReplayRequest) -> Replay:
    """Make an image again from its recipe.

    Args:
      request: Which image, and where its model is if not where the recipe says.

    Returns:
      The comparison.

    Raises:
      InputError: If the image has no recipe, or what it was made with is not here.
      RunError: If no checkpoint is intact.
    """
    subject, settings, texts = read_recipe(request.image)
    studio = _reopen(dataclasses.replace(settings, **request.moved))
    try:
        check_subject(studio.run.config, subject)
    except InputError as error:
        raise InputError(
            f"--replay: the recipe of {request.image} does not suit its model: {error}"
        ) from None
    modes, shape = modes_of(studio.run.config), studio.canvas[:2]
    theirs = read_picture(request.image, modes, flag="--replay")
    if theirs.shape[:2] != shape:
        raise InputError(
            f"--replay: {request.image} has {size_text(theirs)} pixels, the recipe "
            f"gives {shape[0]}x{shape[1]}: it was changed since"
        )
    recipe = write_recipe(subject, studio.settings, studio.made_with)
    warnings = [
        f"{word}: {then} when it was made, here {now}"
        for word, (now, then) in differences(recipe, texts).items()
    ]
    picture = next(draw(studio, [subject]))
    apart = np.abs(theirs.astype(int) - picture.image.astype(int)).max(axis=-1)
    return Replay(warnings, apart.size, int((apart > 0).sum()), int(apart.max()))


def _reopen(settings: Settings) -> Studio:
    """Load what an image was made with.

    Raises:
      InputError: If it is not here, or is something else now.
    """
    try:
        return open_studio(settings)
    except InputError as error:
        hint = "; try --workdir or --weights with the place of its model"
        raise InputError(
            f"--replay: what the image was made with is not here ({error})"
            f"{hint if str(error).startswith(MODELS) else ''}"
        ) from None
