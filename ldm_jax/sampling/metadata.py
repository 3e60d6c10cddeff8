"""How an image was made, as text in its PNG, and back.

Metadata may be anyone's. Nothing that it says is run, and it opens no file but those
of the run's folder: others are shown, and must be given by hand.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import math
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from PIL import Image

from ldm_jax.config import CONFIG_FILE
from ldm_jax.config.load_config import shipped_configs
from ldm_jax.data.image_files import open_image
from ldm_jax.files import printable
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.sampling.conditions import ImageSpec, check_image_spec, warn_of_texts
from ldm_jax.sampling.input_images import read_image, reading, size_text
from ldm_jax.sampling.pipeline import (
    Pipeline,
    make_pipeline,
    open_run,
    sample_images,
)
from ldm_jax.sampling.request import FLAG_NAMES, ReplayRequest
from ldm_jax.sampling.sampling_config import SamplingConfig
from ldm_jax.types import TAKES_ETA, USUAL_PRECISION, InputError

VERSIONED_PACKAGES = ("ldm_jax", "jax", "jaxlib", "flax", "numpy")
CONDITION_KEYWORDS = ("label", "prompt", "negative_prompt")
REQUIRED_KEYWORDS = frozenset({"settings", "seed"})
"""Keywords that all metadata has."""
OTHER = "other_"
PLACES = frozenset({"workdir", "weights", "config_file", "image", "mask"})
"""Settings that are paths of files whose digest is in the metadata."""
NAMED = ("weights", "config_file", "tokenizer", "autoguidance", "image", "mask")
"""Settings that name files outside the run's folder, at times."""
LONGEST_PATH = 4096
"""Characters; more than file systems take."""
MOST_TIMES = 16
"""Largest replayed image, in images of the size that its model was trained on."""
LATER = frozenset({"ema_length"})
"""Settings that older metadata lacks."""
PRECISION = "precision"
"""Setting whose keyword names what an image was made with, its run's own as well; it
is missing where that is the usual one."""
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
    del values[PRECISION]
    for name in LATER:
        if values[name] is None:
            del values[name]  # as in metadata that is older than the setting
    return json.dumps(values, allow_nan=False)


def texts_of(image: Image.Image) -> dict[str, str]:
    """Return the texts before an open PNG's pixels, without decoding those.

    Returns:
      Texts by keyword; {} of another format, which cannot hold our metadata.
    """
    found = image.info.items() if image.format == "PNG" else ()
    return {str(word): str(text) for word, text in found if isinstance(text, str)}


def has_metadata(path: Path) -> bool:
    """Return whether a file is an image with metadata, without decoding it."""
    try:
        with reading(path, flag="--as-dataset"), open_image(path) as image:
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
    with reading(path, flag="--replay"), open_image(path) as image:
        texts = texts_of(image)
    if not texts.keys() >= REQUIRED_KEYWORDS:
        raise InputError(
            f"--replay: {path} has no metadata, wanted a PNG that ldm sample wrote "
            "(other programs drop the metadata when they save it)"
        )
    try:
        settings = read_settings(texts["settings"])
        precision: Any = texts.get(PRECISION, USUAL_PRECISION)
        settings = dataclasses.replace(settings, precision=precision)
        return _image_spec(texts), settings, texts
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        reason = printable(str(error))
        raise InputError(f"--replay: {path} has damaged metadata: {reason}") from None


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
    wanted -= {PRECISION}
    if strange := (set(values) ^ wanted) - (LATER - set(values)):
        raise ValueError(f"settings: {sorted(strange)[0]} unknown or missing")
    for name in ("workdir", *NAMED):
        path = values[name]
        shown = isinstance(path, str) and path.isprintable()
        if path is not None and not (shown and len(path) <= LONGEST_PATH):
            raise ValueError(f"{name}: got {path!r}, wanted a path that can be shown")
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
    flat = {PRECISION: USUAL_PRECISION}
    flat |= {k: v for k, v in texts.items() if k not in ("settings", "versions")}
    for keyword in ("settings", "versions"):
        try:
            parts = json.loads(texts.get(keyword, ""))
            flat |= {k: str(v) for k, v in parts.items() if k not in hidden}
        except (ValueError, AttributeError, RecursionError):
            flat[keyword] = "damaged"
    return flat


class Replay(NamedTuple):
    """An image compared with its reproduction from the metadata."""

    warnings: list[str]
    """Differences of versions, platform, checkpoint and precision."""
    num_pixels: int
    """Pixels of the image."""
    num_different: int
    """Pixels that differ."""
    largest: int
    """Largest difference, in grey levels."""


def replay(request: ReplayRequest) -> Replay:
    """Reproduce an image from its metadata, and compare.

    Raises:
      InputError: If the image has no metadata, a file that it was made with is missing
        or must be given by hand, or it is larger than its model makes.
      RunError: If no checkpoint is intact.
    """
    spec, settings, texts = read_metadata(request.image)
    settings = dataclasses.replace(settings, **request.moved)
    check_names(settings, request)
    pipeline = _reopen(settings, request)
    try:
        check_image_spec(pipeline.model, spec)
    except InputError as error:
        raise InputError(
            f"--replay: the metadata of {request.image} does not fit its model: "
            f"{printable(str(error))}"
        ) from None
    rows = [spec.condition_texts, spec.other or {}]
    warn_of_texts(pipeline.model, pipeline.settings, rows)
    theirs = read_image(request.image, flag="--replay", most_aspect=math.inf)
    shape = (*pipeline.inputs[:2], pipeline.model.image_shape[-1])
    if theirs.shape != shape:
        raise InputError(
            f"--replay: {request.image} has {size_text(theirs)} pixels of "
            f"{theirs.shape[-1]} channels, its metadata gives {shape[0]}x{shape[1]} of "
            f"{shape[-1]}: it was changed since"
        )
    metadata = make_metadata(spec, pipeline.settings, pipeline.made_with)
    warnings = [
        f"{printable(word)}: {printable(then)} when it was made, here {printable(now)}"
        for word, (now, then) in differences(metadata, texts).items()
    ]
    ours = next(sample_images(pipeline, [spec])).image
    apart = np.abs(theirs.astype(int) - ours.astype(int)).max(axis=-1)
    return Replay(warnings, apart.size, int((apart > 0).sum()), int(apart.max()))


def check_names(settings: SamplingConfig, request: ReplayRequest) -> None:
    """Raise `InputError` if metadata names files that must be given by hand.

    Those are all but what lies in the run's folder and the configs of this package: a
    picture must not choose what is opened, and a config of Python is run.
    """
    named = {name: getattr(settings, name) for name in NAMED}
    strange = {
        FLAG_NAMES.get(name, name): path
        for name, path in named.items()
        if path is not None
        and name not in request.moved
        and not (name == "config_file" and path in shipped_configs())
        and not _lies_in_run(path, settings.workdir)
    }
    if strange:
        shown = ", ".join(f"{name} {path}" for name, path in strange.items())
        flags = " ".join(f"--{name} {shlex.quote(x)}" for name, x in strange.items())
        raise InputError(
            f"--replay: the metadata of {request.image} names files that are not in "
            f"its run's folder: {shown}; look at them, and give by hand those to use: "
            f"{flags}"
        )


def _lies_in_run(path: str, workdir: str | None) -> bool:
    """Return whether a path lies in a run's folder, with all links followed."""
    if workdir is None or not Path(workdir, CONFIG_FILE).is_file():
        return False
    try:
        found = Path(path).resolve(strict=True)
        return found.is_relative_to(Path(workdir).resolve(strict=True))
    except (OSError, RuntimeError):  # missing, or links in a circle
        return False


def _reopen(settings: SamplingConfig, request: ReplayRequest) -> Pipeline:
    """Load what an image was made with.

    Its size is checked before anything is made of that size.
    """
    with _opening(request.image):
        run = open_run(settings)
    _check_size(run.model, settings, request)
    with _opening(request.image):
        return make_pipeline(run, settings)


@contextlib.contextmanager
def _opening(image: Path) -> Iterator[None]:
    """Turn an error of opening into one of `--replay`."""
    try:
        yield
    except InputError as error:
        hint = "; try --workdir or --weights with the place of its model"
        raise InputError(
            f"--replay: {image} cannot be made again ({error})"
            f"{hint if str(error).startswith(('--workdir', '--weights')) else ''}"
        ) from None


def _check_size(
    model: LatentDiffusion, settings: SamplingConfig, request: ReplayRequest
) -> None:
    """Raise `InputError` if metadata asks for an image far larger than its model's."""
    height, width, _ = model.image_shape
    most = MOST_TIMES * height * width
    tall, wide = settings.size or (height, width)
    flag = "size"
    if settings.outpaint is not None:
        left, above, right, below = settings.outpaint
        flag, tall, wide = "outpaint", height + above + below, width + left + right
    if flag not in request.moved and tall * wide > most:
        values = " ".join(map(str, getattr(settings, flag)))
        raise InputError(
            f"--replay: the metadata of {request.image} asks for {tall}x{wide} pixels, "
            f"wanted at most {MOST_TIMES} times the {height}x{width} of its model; if "
            f"that is meant, give --{flag} {values} by hand"
        )
