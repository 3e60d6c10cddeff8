"""An image made again from its recipe, and compared."""

import dataclasses
from typing import NamedTuple

import numpy as np

from ldm_jax.images import read_png
from ldm_jax.recipes import differences, read_recipe, write_recipe
from ldm_jax.requests import ReplayRequest
from ldm_jax.studio import draw, open_studio
from ldm_jax.types import InputError


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
    if request.workdir is not None or request.weights is not None:
        settings = dataclasses.replace(
            settings,
            workdir=None if request.workdir is None else str(request.workdir),
            weights=None if request.weights is None else str(request.weights),
        )
    try:
        studio = open_studio(settings)
    except InputError as error:
        raise InputError(
            f"--replay: what the image was made with is not here ({error}); try "
            "--workdir or --weights with the place of its model"
        ) from None
    recipe = write_recipe(subject, settings, studio.made_with)
    changed = [word for word in differences(recipe, texts) if word != "settings"]
    warnings = [
        f"{word}: {texts.get(word, 'none')} when it was made, here "
        f"{recipe.get(word, 'none')}"
        for word in changed
    ]
    picture = next(draw(studio, [subject]))
    theirs = read_png(request.image)
    if theirs.shape != picture.image.shape:
        raise InputError(
            f"--replay: {request.image} has {theirs.shape} pixels and channels, the "
            f"recipe gives {picture.image.shape}: it was changed since"
        )
    apart = np.abs(theirs.astype(int) - picture.image.astype(int)).max(axis=-1)
    return Replay(warnings, apart.size, int((apart > 0).sum()), int(apart.max()))
