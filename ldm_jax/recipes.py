"""How an image was made, as text in its PNG, and back."""

import dataclasses
import importlib.metadata
import json
from pathlib import Path
from typing import Any

from ldm_jax.images import read_texts
from ldm_jax.requests import Settings
from ldm_jax.subjects import Subject
from ldm_jax.types import TAKES_ETA, InputError

VERSIONED_PACKAGES = ("ldm_jax", "jax", "jaxlib", "flax", "numpy")
SHOWN = ("label", "prompt", "negative_prompt")
OTHER = "other_"
TUPLES = ("guidance_scale", "guidance_interval", "outpaint", "size")


def write_recipe(
    subject: Subject, settings: Settings, made_with: dict[str, str]
) -> dict[str, str]:
    """Say how an image was made.

    Args:
      subject: What it is of.
      settings: How it was made.
      made_with: Digests of what was read, the platform; see `drawing.Studio`.

    Returns:
      Text by keyword: for people, and enough to make it again.
    """
    scale = settings.guidance_scale if subject.shown else (1.0,)
    texts = {
        "seed": str(subject.seed),
        **subject.shown,
        "sampler": settings.sampler,
        "steps": str(settings.num_steps),
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
    texts["settings"] = json.dumps(dataclasses.asdict(settings), allow_nan=True)
    versions = {name: importlib.metadata.version(name) for name in VERSIONED_PACKAGES}
    return {**texts, **made_with, "versions": json.dumps(versions)}


def read_recipe(path: Path) -> tuple[Subject, Settings, dict[str, str]]:
    """Read how an image was made.

    Args:
      path: A PNG.

    Returns:
      What it is of, how it was made, and all its texts.

    Raises:
      InputError: If it is no PNG, or has no recipe or a damaged one.
    """
    try:
        texts = read_texts(path)
    except OSError:
        raise InputError(f"--replay: {path} is no picture, wanted a PNG") from None
    if "settings" not in texts or "seed" not in texts:
        raise InputError(
            f"--replay: {path} has no recipe, wanted a PNG that sample.py wrote "
            "(other programs drop the text when they save it)"
        )
    try:
        return _subject(texts), _settings(texts["settings"]), texts
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"--replay: {path} has a damaged recipe: {error}") from None


def _subject(texts: dict[str, str]) -> Subject:
    other = {k: texts[OTHER + k] for k in SHOWN if OTHER + k in texts}
    other_seed = texts.get(f"{OTHER}seed")
    return Subject(
        shown={k: texts[k] for k in SHOWN if k in texts},
        seed=int(texts["seed"]),
        other=other or None,
        other_seed=None if other_seed is None else int(other_seed),
        weight=float(texts.get("weight", "0")),
    )


def _settings(text: str) -> Settings:
    values: dict[str, Any] = json.loads(text)
    wanted = {field.name for field in dataclasses.fields(Settings)}
    if strange := set(values) ^ wanted:
        raise ValueError(f"settings: {sorted(strange)[0]} unknown or missing")
    for name in TUPLES:
        if values[name] is not None:
            values[name] = tuple(values[name])
    return Settings(**values)


def differences(mine: dict[str, str], theirs: dict[str, str]) -> list[str]:
    """Name the keywords in which two recipes differ."""
    keywords = sorted(mine.keys() | theirs.keys())
    return [word for word in keywords if mine.get(word) != theirs.get(word)]
