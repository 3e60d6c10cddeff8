"""How an image was made, as text in its PNG, and back."""

import dataclasses
import functools
import importlib.metadata
import json
from pathlib import Path
from typing import Any, NoReturn

from PIL import Image

from ldm_jax.pictures import reading
from ldm_jax.settings import Settings
from ldm_jax.subjects import Subject
from ldm_jax.types import TAKES_ETA, InputError

VERSIONED_PACKAGES = ("ldm_jax", "jax", "jaxlib", "flax", "numpy")
SHOWN = ("label", "prompt", "negative_prompt")
WANTED = frozenset({"settings", "seed"})
"""Without these texts there is no recipe."""
OTHER = "other_"
PLACES = frozenset({"workdir", "weights", "config_file", "image", "mask"})
"""Settings that are paths to what a recipe has the digest of."""
LATER = frozenset({"ema_length"})
"""Settings that older recipes lack."""
GUIDES = frozenset({"autoguidance", "autoguidance_step"})
TOLD_APART = frozenset({"sampler", "steps", "eta", "guidance_scale"})
"""Settings that are texts of their own, for people."""


def write_recipe(
    subject: Subject, settings: Settings, made_with: dict[str, str]
) -> dict[str, str]:
    """Say how an image was made.

    Args:
      subject: What it is of.
      settings: How it was made.
      made_with: Digests of what was read, the platform; see `studio.Studio`.

    Returns:
      Text by keyword: for people, and enough to make it again.
    """
    guided = subject.shown or settings.autoguidance is not None
    scale = settings.guidance_scale if guided else (1.0,)
    texts = {
        "seed": str(subject.seed),
        **subject.shown,
        "sampler": settings.sampler,
        "steps": str(settings.steps),
        "guidance_scale": ",".join(map(repr, scale)),
    }
    if settings.sampler in TAKES_ETA:
        texts["eta"] = repr(settings.eta)
    if subject.other_seed is not None:
        texts[f"{OTHER}seed"] = str(subject.other_seed)
    for keyword, text in (subject.other or {}).items():
        texts[OTHER + keyword] = text
    if subject.other is not None or subject.other_seed is not None:
        texts["weight"] = repr(subject.weight)
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
def _settings_text(settings: Settings) -> str:
    values = dataclasses.asdict(settings)
    for name in LATER:
        if values[name] is None:
            del values[name]  # as recipes were before it came
    return json.dumps(values, allow_nan=False)


def texts_of(picture: Image.Image) -> dict[str, str]:
    """Take the texts that stand before an open PNG's pixels, without decoding those."""
    found = picture.info.items()
    return {str(word): str(text) for word, text in found if isinstance(text, str)}


def has_recipe(path: Path) -> bool:
    """Say whether a file is a picture that was made here, without decoding it."""
    try:
        with reading(path, flag="--as-dataset"), Image.open(path) as picture:
            return texts_of(picture).keys() >= WANTED
    except InputError:
        return False


def read_recipe(path: Path) -> tuple[Subject, Settings, dict[str, str]]:
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
        return _subject(texts), _settings(texts["settings"]), texts
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"--replay: {path} has a damaged recipe: {error}") from None


def _subject(texts: dict[str, str]) -> Subject:
    other = {k: texts[OTHER + k] for k in SHOWN if OTHER + k in texts}
    other_seed = texts.get(f"{OTHER}seed")
    weight = float(texts.get("weight", "0"))
    if not 0.0 <= weight <= 1.0:
        raise ValueError(f"weight: got {weight}, wanted 0 to 1")
    return Subject(
        shown={k: texts[k] for k in SHOWN if k in texts},
        seed=int(texts["seed"]),
        other=other or None,
        other_seed=None if other_seed is None else int(other_seed),
        weight=weight,
    )


def _settings(text: str) -> Settings:
    values: Any = json.loads(text, parse_constant=_refuse_constant)
    if not isinstance(values, dict):
        raise ValueError("settings: wanted an object")
    wanted = {field.name for field in dataclasses.fields(Settings)}
    if strange := (set(values) ^ wanted) - (LATER - set(values)):
        raise ValueError(f"settings: {sorted(strange)[0]} unknown or missing")
    return Settings(**values)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"settings: got {name}, wanted finite numbers")


def differences(
    mine: dict[str, str], theirs: dict[str, str]
) -> dict[str, tuple[str, str]]:
    """Compare two recipes, but for where files lie: what was read has its digest.

    Args:
      mine: One, as `write_recipe` makes it.
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
    hidden = PLACES | TOLD_APART
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
