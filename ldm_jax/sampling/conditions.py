"""Conditions of the images of a request: labels, texts, seeds, interpolations."""

import functools
import logging
import re
from collections.abc import Iterable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from ldm_jax.build import open_tokenizer
from ldm_jax.config import ConditionConfig
from ldm_jax.config.validation import shown
from ldm_jax.data.caption_tokens import count_truncated, unknown_parts
from ldm_jax.data.tokenizer import Tokenizer
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.models.conditioning import ConditionInputs
from ldm_jax.rng import check_seed
from ldm_jax.sampling.request import SampleRequest
from ldm_jax.sampling.sampling_config import SamplingConfig
from ldm_jax.types import InputError

ConditionTexts = dict[str, str]
"""Conditions of an image by kind: `label`, `prompt` and perhaps `negative_prompt`."""


class ImageSpec(NamedTuple):
    """One image to make."""

    condition_texts: ConditionTexts
    """Its conditions."""
    seed: int
    """Its seed."""
    other: ConditionTexts | None = None
    """Conditions of the other end of an interpolation; or None."""
    other_seed: int | None = None
    """Seed of the other end; or None."""
    weight: float = 0.0
    """Position between the two ends; 0 is the first, 1 the other."""


def image_specs(
    model: LatentDiffusion, request: SampleRequest, *, guided: bool
) -> list[ImageSpec]:
    """List the images of a request: every condition with every seed, in rows.

    Args:
      guided: Whether a negative prompt has any effect.

    Raises:
      InputError: If the request lacks a condition of the model, or has one that it does
        not read.
    """
    rows = condition_rows(model, request, guided=guided)
    if not request.interpolate:
        return [ImageSpec(row, seed) for row in rows for seed in request.seeds]
    ends = len(rows), len(request.seeds)
    if max(ends) != 2:
        raise InputError(
            f"--interpolate: got {ends[0]} classes or texts and {ends[1]} seeds, "
            "wanted two of either or of both; try --seeds 0,1 and one label"
        )
    other = rows[1] if ends[0] == 2 else None
    other_seed = request.seeds[1] if ends[1] == 2 else None
    weights = np.linspace(0.0, 1.0, request.interpolate).tolist()
    return [
        ImageSpec(rows[0], request.seeds[0], other, other_seed, weight)
        for weight in weights
    ]


def condition_rows(
    model: LatentDiffusion, request: SampleRequest, *, guided: bool
) -> list[ConditionTexts]:
    """List the conditions of a request: every class with every prompt.

    Raises:
      InputError: As `image_specs`.
    """
    condition = model.condition
    if request.negative_prompt and not condition.uses_tokens:
        raise InputError("--negative-prompt: this model reads no text; try without it")
    if request.prompts and not condition.uses_tokens:
        raise InputError("--prompt: this model reads no text; try --labels, or nothing")
    if request.labels is not None and not condition.uses_classes:
        raise InputError(
            "--labels: this model has no classes; try --prompt, or nothing"
        )
    rows: list[ConditionTexts] = [{}]
    if condition.uses_classes:
        top = model.num_classes - 1
        labels = range(top + 1) if request.labels is None else request.labels
        if outside := [label for label in labels if label > top]:
            raise InputError(f"--labels: got {outside[0]}, wanted 0 to {top}")
        rows = [{"label": str(label)} for label in labels]
    if condition.uses_tokens:
        if not request.prompts:
            raise InputError(
                '--prompt: not given, but this model reads text; try --prompt "a cat"'
            )
        negative = {"negative_prompt": request.negative_prompt}
        also = negative if request.negative_prompt and guided else {}
        rows = [
            {**row, "prompt": prompt, **also}
            for row in rows
            for prompt in request.prompts
        ]
    return rows


def check_settings(model: LatentDiffusion, settings: SamplingConfig) -> None:
    """Raise `InputError` if settings lack what a model needs, or have no meaning."""
    condition = model.condition
    concat = condition.concat
    if concat == "segmentation" or condition.context == "embedding":
        needs = "embedding" if concat == "none" else concat
        raise InputError(
            f"--{'weights' if settings.workdir is None else 'workdir'}: this model "
            f"is conditioned on {needs}, which has no flag; try "
            "ldm_jax.sampling.sample_fn.make_sample_fn from Python"
        )
    if concat == "low_resolution" and settings.image is None:
        raise InputError("--image: not given, but this model upscales images")
    if concat == "low_resolution" and settings.mask is not None:
        raise InputError("--mask: this model upscales whole images, wanted none")
    if concat == "masked_image" and settings.mask is None:
        raise InputError(
            "--mask: not given, but this model fills holes of images; try --image "
            "image.png --mask mask.png"
        )
    changes = {
        "invert": settings.invert,
        "outpaint": settings.outpaint is not None,
        "strength": settings.strength not in (None, 1.0),
    }
    if concat != "none" and any(changes.values()):
        flag = next(name for name, given in changes.items() if given)
        raise InputError(
            f"--{flag}: this model is conditioned on the image, wanted none"
        )
    if settings.source is not None:
        _source(model, settings.source)


def _source(model: LatentDiffusion, source: str) -> ConditionTexts:
    """Read the condition of an inverted image."""
    condition = model.condition
    if condition.uses_classes and condition.uses_tokens:
        raise InputError("--source: this model reads classes and texts, wanted none")
    if condition.uses_tokens:
        return {"prompt": source}
    if not condition.uses_classes:
        raise InputError("--source: this model reads nothing, wanted none")
    if not _is_class(model, source):
        top = model.num_classes - 1
        raise InputError(f"--source: got {source!r}, wanted a class, 0 to {top}")
    return {"label": source}


def _is_class(model: LatentDiffusion, text: str) -> bool:
    whole = re.fullmatch("[0-9]{1,18}", text) is not None
    return whole and int(text) < model.num_classes


def source_conditions(
    model: LatentDiffusion, settings: SamplingConfig, rows: list[ConditionTexts]
) -> list[ConditionTexts]:
    """Return the condition under which an image is inverted, for each image made.

    Args:
      rows: Conditions of the images made, which are returned if no source is given.

    Raises:
      InputError: If the model does not read the source.
    """
    if settings.source is None:
        return rows
    return [_source(model, settings.source)] * len(rows)


def check_image_spec(model: LatentDiffusion, spec: ImageSpec) -> None:
    """Raise `InputError` if a model cannot make the image that metadata describes."""
    for row in (spec.condition_texts, spec.other or spec.condition_texts):
        label = row.get("label", "none")
        if model.condition.uses_classes and not _is_class(model, label):
            top = model.num_classes - 1
            raise InputError(f"label: got {label}, wanted a class, 0 to {top}")
        if model.condition.uses_tokens and "prompt" not in row:
            raise InputError("prompt: got none, wanted a text, which the model reads")
    check_seed(spec.seed)
    check_seed(spec.other_seed or 0)


@functools.cache
def _tokenizer(condition: ConditionConfig) -> Tokenizer:
    """Open a tokenizer; later calls reuse it."""
    return open_tokenizer(condition)


def warn_of_prompts(
    model: LatentDiffusion, prompts: Iterable[str], *, flag: str = "--prompt"
) -> None:
    """Log what a model cannot read of texts: unknown words, and what is cut.

    Args:
      prompts: The texts; an empty one means none.
      flag: What named them, for the message.
    """
    for prompt in filter(None, prompts) if model.condition.uses_tokens else ():
        for warning in prompt_warnings(model, prompt):
            logging.getLogger(__name__).warning(
                "%s: %s %s", flag, shown(prompt), warning
            )


def warn_of_texts(
    model: LatentDiffusion, settings: SamplingConfig, rows: Iterable[ConditionTexts]
) -> None:
    """Log what a model cannot read of all texts that it is given.

    Args:
      settings: Of the images, with the text of an inverted one.
      rows: Conditions of the images made.
    """
    rows = list(rows)
    for kind in ("prompt", "negative_prompt"):
        texts = dict.fromkeys(row.get(kind, "") for row in rows)
        warn_of_prompts(model, texts, flag=f"--{kind.replace('_', '-')}")
    warn_of_prompts(model, [settings.source or ""], flag="--source")


def prompt_warnings(model: LatentDiffusion, prompt: str) -> list[str]:
    """List the parts of a prompt that a model does not read, each as a predicate."""
    tokenizer = _tokenizer(model.condition)
    found = []
    if strange := unknown_parts(prompt, tokenizer):
        found.append(f"has what the model's texts never had: {' '.join(strange)}")
    if count_truncated([prompt], tokenizer):
        found.append(
            f"is longer than the {tokenizer.length} tokens the model reads, and is cut"
        )
    return found


def condition_inputs(
    model: LatentDiffusion, rows: list[ConditionTexts]
) -> tuple[ConditionInputs, ConditionInputs | None]:
    """Convert the conditions of images to inputs of the conditioner.

    Args:
      rows: As `condition_rows` returns them, one per image.

    Returns:
      The inputs, and those that images are guided away from; None for "no condition".

    Raises:
      InputError: If the tokenizer cannot be read.
    """
    condition = model.condition
    label = null_label = None
    if condition.uses_classes:
        label = jnp.asarray([int(row["label"]) for row in rows], jnp.int32)
        null_label = jnp.full_like(label, model.num_classes)
    if not condition.uses_tokens:
        return ConditionInputs(label=label), None
    tokenizer = _tokenizer(condition)

    def tokens(kind: str) -> Int[Array, "b n"]:
        texts = [row.get(kind, "") for row in rows]
        return jnp.asarray(tokenizer.encode(texts))

    return (
        ConditionInputs(label=label, tokens=tokens("prompt")),
        ConditionInputs(label=null_label, tokens=tokens("negative_prompt")),
    )
