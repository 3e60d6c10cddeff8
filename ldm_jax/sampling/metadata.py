"""How an image was made, as text in its PNG, and back."""

import dataclasses
import functools
import importlib.metadata
import json
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from PIL import Image

from ldm_jax.sampling.conditions import ImageSpec, check_image_spec
from ldm_jax.sampling.draw import draw
from ldm_jax.sampling.input_images import modes_of, read_picture, reading, size_text
from ldm_jax.sampling.pipeline import Pipeline, open_pipeline
from ldm_jax.sampling.request import ReplayRequest
from ldm_jax.sampling.sampling_config import SamplingConfig
from ldm_jax.types import TAKES_ETA, InputError

VERSIONED_PACKAGES = ("ldm_jax", "jax", "jaxlib", "flax", "numpy")
CONDITION_KEYWORDS = ("label", "prompt", "negative_prompt")
WANTED = frozenset({"settings", "seed"})
"""Without these texts there is no recipe."""
OTHER = "other_"
PLACES = frozenset({"workdir", "weights", "config_file", "image", "mask"})
"""Settings that are paths to what a recipe has the digest of."""
LATER = frozenset({"ema_length"})
"""Settings that older recipes lack."""
GUIDES = frozenset({"autoguidance", "autoguidance_step"})
LISTED_APART = frozenset({"sampler", "steps", "eta", "guidance_scale"})
"""Settings that are texts of their own, for people."""


def make_metadata(
    spec: ImageSpec, settings: SamplingConfig, made_with: dict[str, str]
) -> dict[str, str]:
    """Say how an image was made.

    Args:
      spec: What it is of.
      settings: How it was made.
      made_with: Digests of what was read, the platform; see `pipeline.Studio`.

    Returns:
      Text by keyword: for people, and enough to make it again.
    """
    guided = spec.condition_texts or settings.autoguidance is not None
    scale = settings.guidance_scale if guided else (1.0,)
    texts = {
        "seed": str(spec.seed),
        **spec.condition_texts,
        "sampler": settings.sampler,
        "steps": str(settings.steps),
        "guidance_scale": ",".join(map(repr, scale)),
    }
    if settings.sampler in TAKES_ETA:
        texts["eta"] = repr(settings.eta)
    if spec.other_seed is not None:
        texts[f"{OTHER}seed"] = str(spec.other_seed)
    for keyword, text in (spec.other or {}).items():
        texts[OTHER + keyword] = text
    if spec.other is not None or spec.other_seed is not None:
        texts["weight"] = repr(spec.weight)
    return {
        **texts,
        "settings": _settings_text(settings),
        **made_with,
        "versions": versions(),
    }


@functools.cache
def versions() -> str:
    """Name the versions of what computes, once: looking them up is slow."""
    found = {name: importlib.metadata.version(name) for name in VERSIONED_PACKAGES}
    return json.dumps(found)


@functools.lru_cache(maxsize=16)
def _settings_text(settings: SamplingConfig) -> str:
    values = dataclasses.asdict(settings)
    for name in LATER:
        if values[name] is None:
            del values[name]  # as recipes were before it came
    return json.dumps(values, allow_nan=False)


def texts_of(picture: Image.Image) -> dict[str, str]:
    """Take the texts that stand before an open PNG's pixels, without decoding those."""
    found = picture.info.items()
    return {str(word): str(text) for word, text in found if isinstance(text, str)}


def has_metadata(path: Path) -> bool:
    """Say whether a file is a picture that was made here, without decoding it."""
    try:
        with reading(path, flag="--as-dataset"), Image.open(path) as picture:
            return texts_of(picture).keys() >= WANTED
    except InputError:
        return False


def read_metadata(path: Path) -> tuple[ImageSpec, SamplingConfig, dict[str, str]]:
    """Read how an image was made.

    Args:
      path: A PNG.

    Returns:
      What it is of, how it was made, and all its texts.

    Raises:
      InputError: If it is no picture, or has no recipe or a damaged one.
    """
    with reading(path, flag="--replay"), Image.open(path) as picture:
        texts = texts_of(picture)
    if not texts.keys() >= WANTED:
        raise InputError(
            f"--replay: {path} has no recipe, wanted a PNG that sample.py wrote "
            "(other programs drop the text when they save it)"
        )
    try:
        return _image_spec(texts), _settings(texts["settings"]), texts
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"--replay: {path} has a damaged recipe: {error}") from None


def _image_spec(texts: dict[str, str]) -> ImageSpec:
    other = {k: texts[OTHER + k] for k in CONDITION_KEYWORDS if OTHER + k in texts}
    other_seed = texts.get(f"{OTHER}seed")
    weight = float(texts.get("weight", "0"))
    if not 0.0 <= weight <= 1.0:
        raise ValueError(f"weight: got {weight}, wanted 0 to 1")
    return ImageSpec(
        condition_texts={k: texts[k] for k in CONDITION_KEYWORDS if k in texts},
        seed=int(texts["seed"]),
        other=other or None,
        other_seed=None if other_seed is None else int(other_seed),
        weight=weight,
    )


def _settings(text: str) -> SamplingConfig:
    values: Any = json.loads(text, parse_constant=_refuse_constant)
    if not isinstance(values, dict):
        raise ValueError("settings: wanted an object")
    wanted = {field.name for field in dataclasses.fields(SamplingConfig)}
    if strange := (set(values) ^ wanted) - (LATER - set(values)):
        raise ValueError(f"settings: {sorted(strange)[0]} unknown or missing")
    return SamplingConfig(**values)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"settings: got {name}, wanted finite numbers")


def differences(
    mine: dict[str, str], theirs: dict[str, str]
) -> dict[str, tuple[str, str]]:
    """Compare two recipes, but for where files lie: what was read has its digest.

    Args:
      mine: One, as `make_metadata` makes it.
      theirs: Another, as `texts_of` finds it.

    Returns:
      Both values of what differs, by keyword, setting, or package; "none" is missing.
    """
    if mine == theirs:  # as nearly all are where thousands are looked through
        return {}
    left, right = _flat(mine), _flat(theirs)
    words = sorted(left.keys() | right.keys())
    pairs = {word: (left.get(word, "none"), right.get(word, "none")) for word in words}
    return {word: pair for word, pair in pairs.items() if pair[0] != pair[1]}


def _flat(texts: dict[str, str]) -> dict[str, str]:
    """Take the settings and the versions of a recipe apart."""
    hidden = PLACES | LISTED_APART
    if "autoguidance_checkpoint" in texts:
        hidden |= GUIDES
    flat = {k: v for k, v in texts.items() if k not in ("settings", "versions")}
    for keyword in ("settings", "versions"):
        try:
            parts = json.loads(texts.get(keyword, ""))
            flat |= {k: str(v) for k, v in parts.items() if k not in hidden}
        except (ValueError, AttributeError, RecursionError):
            flat[keyword] = "damaged"
    return flat


MODELS = ("--workdir", "--weights")


class Replay(NamedTuple):
    """How an image compares with the one that its recipe gives here."""

    warnings: list[str]
    """What differs from when it was made: versions, platform, checkpoint."""
    num_pixels: int
    """Pixels of the image."""
    num_different: int
    """Those that differ."""
    largest: int
    """Largest difference, in grey levels."""


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
    spec, settings, texts = read_metadata(request.image)
    pipeline = _reopen(dataclasses.replace(settings, **request.moved))
    try:
        check_image_spec(pipeline.run.config, spec)
    except InputError as error:
        raise InputError(
            f"--replay: the recipe of {request.image} does not suit its model: {error}"
        ) from None
    modes, shape = modes_of(pipeline.run.config), pipeline.canvas[:2]
    theirs = read_picture(request.image, modes, flag="--replay")
    if theirs.shape[:2] != shape:
        raise InputError(
            f"--replay: {request.image} has {size_text(theirs)} pixels, the recipe "
            f"gives {shape[0]}x{shape[1]}: it was changed since"
        )
    recipe = make_metadata(spec, pipeline.settings, pipeline.made_with)
    warnings = [
        f"{word}: {then} when it was made, here {now}"
        for word, (now, then) in differences(recipe, texts).items()
    ]
    picture = next(draw(pipeline, [spec]))
    apart = np.abs(theirs.astype(int) - picture.image.astype(int)).max(axis=-1)
    return Replay(warnings, apart.size, int((apart > 0).sum()), int(apart.max()))


def _reopen(settings: SamplingConfig) -> Pipeline:
    """Load what an image was made with."""
    try:
        return open_pipeline(settings)
    except InputError as error:
        hint = "; try --workdir or --weights with the place of its model"
        raise InputError(
            f"--replay: what the image was made with is not here ({error})"
            f"{hint if str(error).startswith(MODELS) else ''}"
        ) from None
