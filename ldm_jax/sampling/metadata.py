"""Metadata of a sampled image, as text in its PNG."""

import dataclasses
import functools
import importlib.metadata
import json
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from PIL import Image

from ldm_jax.sampling.conditions import ImageSpec, check_image_spec
from ldm_jax.sampling.input_images import modes_of, read_image, reading, size_text
from ldm_jax.sampling.pipeline import Pipeline, open_pipeline, sample_images
from ldm_jax.sampling.request import ReplayRequest
from ldm_jax.sampling.sampling_config import SamplingConfig
from ldm_jax.types import TAKES_ETA, InputError

VERSIONED_PACKAGES = ("ldm_jax", "jax", "jaxlib", "flax", "numpy")
CONDITION_KEYWORDS = ("label", "prompt", "negative_prompt")
REQUIRED_KEYWORDS = frozenset({"settings", "seed"})
"""Keywords that all metadata has."""
OTHER = "other_"
PLACES = frozenset({"workdir", "weights", "config_file", "image", "mask"})
"""Settings that are paths of files whose digest is in the metadata."""
LATER = frozenset({"ema_length"})
"""Settings that older metadata lacks."""
GUIDES = frozenset({"autoguidance", "autoguidance_step"})
LISTED_APART = frozenset({"sampler", "steps", "eta", "guidance_scale"})
"""Settings that have a keyword of their own, for people."""


def make_metadata(
    spec: ImageSpec, settings: SamplingConfig, made_with: dict[str, str]
) -> dict[str, str]:
    """Make the metadata of an image.

    Args:
      spec: The image.
      settings: Settings of its pipeline.
      made_with: As in `Pipeline`.

    Returns:
      Text by keyword: readable, and sufficient to reproduce the image.
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
        "settings": settings_text(settings),
        **made_with,
        "versions": versions(),
    }


@functools.cache
def versions() -> str:
    """Return the versions of the packages that compute, as JSON; cached."""
    found = {name: importlib.metadata.version(name) for name in VERSIONED_PACKAGES}
    return json.dumps(found)


@functools.lru_cache(maxsize=16)
def settings_text(settings: SamplingConfig) -> str:
    """Write settings as JSON."""
    values = dataclasses.asdict(settings)
    for name in LATER:
        if values[name] is None:
            del values[name]  # as in metadata that is older than the setting
    return json.dumps(values, allow_nan=False)


def texts_of(image: Image.Image) -> dict[str, str]:
    """Return the texts before an open PNG's pixels, without decoding those."""
    found = image.info.items()
    return {str(word): str(text) for word, text in found if isinstance(text, str)}


def has_metadata(path: Path) -> bool:
    """Return whether a file is an image with metadata, without decoding it."""
    try:
        with reading(path, flag="--as-dataset"), Image.open(path) as image:
            return texts_of(image).keys() >= REQUIRED_KEYWORDS
    except InputError:
        return False


def read_metadata(path: Path) -> tuple[ImageSpec, SamplingConfig, dict[str, str]]:
    """Read the metadata of an image.

    Args:
      path: A PNG.

    Returns:
      The image, its settings, and all its texts.

    Raises:
      InputError: If the file is no image, or has no metadata or a damaged one.
    """
    with reading(path, flag="--replay"), Image.open(path) as image:
        texts = texts_of(image)
    if not texts.keys() >= REQUIRED_KEYWORDS:
        raise InputError(
            f"--replay: {path} has no metadata, wanted a PNG that ldm sample wrote "
            "(other programs drop the metadata when they save it)"
        )
    try:
        return _image_spec(texts), read_settings(texts["settings"]), texts
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"--replay: {path} has damaged metadata: {error}") from None


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


def read_settings(text: str) -> SamplingConfig:
    """Read settings from JSON, which must hold every field but the `LATER` ones.

    Raises:
      ValueError: If it is no such JSON, or a value is out of range.
    """
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
    """Compare the metadata of two images, except paths of files with a digest.

    Returns:
      Both values of every difference, by keyword, setting or package; "none" if one is
      missing.
    """
    if mine == theirs:  # the usual case of thousands of images
        return {}
    left, right = _flat(mine), _flat(theirs)
    words = sorted(left.keys() | right.keys())
    pairs = {word: (left.get(word, "none"), right.get(word, "none")) for word in words}
    return {word: pair for word, pair in pairs.items() if pair[0] != pair[1]}


def _flat(texts: dict[str, str]) -> dict[str, str]:
    """Put the settings and the versions of metadata beside its other texts."""
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
    """An image compared with its reproduction from the metadata."""

    warnings: list[str]
    """Differences of versions, platform and checkpoint."""
    num_pixels: int
    """Pixels of the image."""
    num_different: int
    """Pixels that differ."""
    largest: int
    """Largest difference, in grey levels."""


def replay(request: ReplayRequest) -> Replay:
    """Reproduce an image from its metadata, and compare.

    Raises:
      InputError: If the image has no metadata, or a file that it was made with is
        missing.
      RunError: If no checkpoint is intact.
    """
    spec, settings, texts = read_metadata(request.image)
    pipeline = _reopen(dataclasses.replace(settings, **request.moved))
    try:
        check_image_spec(pipeline.model, spec)
    except InputError as error:
        raise InputError(
            f"--replay: the metadata of {request.image} does not fit its model: {error}"
        ) from None
    modes, shape = modes_of(pipeline.model), pipeline.inputs[:2]
    theirs = read_image(request.image, modes, flag="--replay")
    if theirs.shape[:2] != shape:
        raise InputError(
            f"--replay: {request.image} has {size_text(theirs)} pixels, its metadata "
            f"gives {shape[0]}x{shape[1]}: it was changed since"
        )
    metadata = make_metadata(spec, pipeline.settings, pipeline.made_with)
    warnings = [
        f"{word}: {then} when it was made, here {now}"
        for word, (now, then) in differences(metadata, texts).items()
    ]
    ours = next(sample_images(pipeline, [spec])).image
    apart = np.abs(theirs.astype(int) - ours.astype(int)).max(axis=-1)
    return Replay(warnings, apart.size, int((apart > 0).sum()), int(apart.max()))


def _reopen(settings: SamplingConfig) -> Pipeline:
    """Load the model and the settings that made an image."""
    try:
        return open_pipeline(settings)
    except InputError as error:
        hint = "; try --workdir or --weights with the place of its model"
        raise InputError(
            f"--replay: a file that the image was made with is missing ({error})"
            f"{hint if str(error).startswith(MODELS) else ''}"
        ) from None
