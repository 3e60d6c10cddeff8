"""What the images of a request show: labels, texts, seeds, and what lies between."""

import functools
import logging
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from ldm_jax.build import open_tokenizer
from ldm_jax.config import ConditionConfig, Config
from ldm_jax.config.flags import parse_list
from ldm_jax.data.captions import count_cut, strange_parts
from ldm_jax.data.tokenizer import Tokenizer
from ldm_jax.models.conditioning import ConditionInputs
from ldm_jax.rng import check_seed
from ldm_jax.sampling.request import SampleRequest
from ldm_jax.sampling.sampling_config import SamplingConfig
from ldm_jax.types import InputError

ConditionTexts = dict[str, str]
"""What an image shows, by kind: `label`, `prompt` and perhaps `negative_prompt`."""


class ImageSpec(NamedTuple):
    """One image to make."""

    condition_texts: ConditionTexts
    """What it shows."""
    seed: int
    """Its seed."""
    other: ConditionTexts | None = None
    """What else it shows, between the two; or None."""
    other_seed: int | None = None
    """Its second seed, between the two; or None."""
    weight: float = 0.0
    """Where between; 0 is the first."""


def image_specs(config: Config, request: SampleRequest) -> list[ImageSpec]:
    """List the images of a request: every condition with every seed, in rows.

    Raises:
      InputError: If the model needs what the request does not give, or the request
        gives what the model does not read.
    """
    condition_texts = describe_conditions(config, request)
    if not request.interpolate:
        return [
            ImageSpec(row, seed) for row in condition_texts for seed in request.seeds
        ]
    ends = len(condition_texts), len(request.seeds)
    if max(ends) != 2:
        raise InputError(
            f"--interpolate: got {ends[0]} classes or texts and {ends[1]} seeds, "
            "wanted two of either or of both; try --seeds 0,1 and one label"
        )
    other = condition_texts[1] if ends[0] == 2 else None
    other_seed = request.seeds[1] if ends[1] == 2 else None
    weights = np.linspace(0.0, 1.0, request.interpolate).tolist()
    return [
        ImageSpec(condition_texts[0], request.seeds[0], other, other_seed, weight)
        for weight in weights
    ]


def describe_conditions(config: Config, request: SampleRequest) -> list[ConditionTexts]:
    """Say what each row of a request shows, as its recipe has it.

    Raises:
      InputError: If the model needs a prompt that the request does not give, or the
        request gives what the model does not read.
    """
    condition = config.diffusion.condition
    if request.negative_prompt and not condition.uses_tokens:
        raise InputError("--negative-prompt: this model reads no text; try without it")
    if request.prompts and not condition.uses_tokens:
        raise InputError("--prompt: this model reads no text; try --labels, or nothing")
    if request.labels is not None and not condition.uses_classes:
        raise InputError(
            "--labels: this model has no classes; try --prompt, or nothing"
        )
    condition_texts: list[ConditionTexts] = [{}]
    if condition.uses_classes:
        top = config.data.num_classes - 1
        given = f"0-{top}" if request.labels is None else request.labels
        labels = parse_list(given, name="--labels", low=0, high=top)
        condition_texts = [{"label": str(label)} for label in labels]
    if condition.uses_tokens:
        if not request.prompts:
            raise InputError(
                '--prompt: not given, but this model draws texts; try --prompt "a cat"'
            )
        negative = {"negative_prompt": request.negative_prompt}
        also = negative if request.negative_prompt and request.settings.guided else {}
        condition_texts = [
            {**row, "prompt": prompt, **also}
            for row in condition_texts
            for prompt in request.prompts
        ]
    return condition_texts


def check_settings(config: Config, settings: SamplingConfig) -> None:
    """Raise `InputError` if settings lack what a model needs, or have no meaning."""
    condition = config.diffusion.condition
    concat = condition.concat
    if concat == "segmentation" or condition.context == "embedding":
        needs = "embedding" if concat == "none" else concat
        raise InputError(
            f"--{'weights' if settings.workdir is None else 'workdir'}: this model "
            f"is told of each image by {needs}, which has no flag; try "
            "ldm_jax.sampling.sample_fn.make_sample_fn from Python"
        )
    if concat == "low_resolution" and settings.image is None:
        raise InputError("--image: not given, but this model enlarges pictures")
    if concat == "low_resolution" and settings.mask is not None:
        raise InputError("--mask: this model enlarges whole pictures, wanted none")
    if concat == "masked_image" and settings.mask is None:
        raise InputError(
            "--mask: not given, but this model fills holes of pictures; try --image "
            "picture.png --mask mask.png"
        )
    changes = {
        "invert": settings.invert,
        "outpaint": settings.outpaint is not None,
        "strength": settings.strength not in (None, 1.0),
    }
    if concat != "none" and any(changes.values()):
        flag = next(name for name, given in changes.items() if given)
        raise InputError(
            f"--{flag}: this model is given its picture beside the noise, wanted none"
        )
    if settings.source is not None:
        _source(config, settings.source)


def _source(config: Config, source: str) -> ConditionTexts:
    """Say what an inverted picture shows."""
    condition = config.diffusion.condition
    if condition.uses_classes and condition.uses_tokens:
        raise InputError("--source: this model reads classes and texts, wanted none")
    if condition.uses_tokens:
        return {"prompt": source}
    if not condition.uses_classes:
        raise InputError("--source: this model reads nothing, wanted none")
    top = config.data.num_classes - 1
    if not (source.isascii() and source.isdigit() and int(source) <= top):
        raise InputError(f"--source: got {source!r}, wanted a class, 0 to {top}")
    return {"label": source}


def source_conditions(
    config: Config, settings: SamplingConfig, condition_texts: list[ConditionTexts]
) -> list[ConditionTexts]:
    """Say what a picture to be inverted shows, for each image that is made of it.

    Args:
      condition_texts: What each image is to show.

    Returns:
      The source for each, or what it is to show if there is none.

    Raises:
      InputError: If the model cannot be shown the source.
    """
    if settings.source is None:
        return condition_texts
    return [_source(config, settings.source)] * len(condition_texts)


def check_image_spec(config: Config, spec: ImageSpec) -> None:
    """Raise `InputError` if a model cannot draw a subject that a recipe names."""
    condition, top = config.diffusion.condition, config.data.num_classes - 1
    for condition_texts in (spec.condition_texts, spec.other or spec.condition_texts):
        if condition.uses_classes:
            label = condition_texts.get("label", "none")
            if not (label.isascii() and label.isdigit() and int(label) <= top):
                raise InputError(f"label: got {label}, wanted a class, 0 to {top}")
        if condition.uses_tokens and "prompt" not in condition_texts:
            raise InputError("prompt: got none, wanted a text, which the model reads")
    check_seed(spec.seed)
    check_seed(spec.other_seed or 0)


@functools.cache
def _tokenizer(condition: ConditionConfig) -> Tokenizer:
    """Open a tokenizer once, not once for every chunk of images."""
    return open_tokenizer(condition)


def warn_of_prompts(config: Config, prompts: tuple[str, ...]) -> None:
    """Warn of what a model cannot have understood: unknown parts, and what is cut."""
    if not config.diffusion.condition.uses_tokens:
        return
    for prompt in prompts:
        for doubt in doubts_about(config, prompt):
            logging.getLogger(__name__).warning("--prompt: %r %s", prompt, doubt)


def doubts_about(config: Config, prompt: str) -> list[str]:
    """Say what of a text a model cannot have understood, each as a predicate."""
    tokenizer = _tokenizer(config.diffusion.condition)
    found = []
    if strange := strange_parts(prompt, tokenizer):
        found.append(f"has what the model's texts never had: {' '.join(strange)}")
    if count_cut([prompt], tokenizer):
        found.append(
            f"is longer than the {tokenizer.length} tokens the model reads, and is cut"
        )
    return found


def condition_inputs(
    config: Config, rows: list[ConditionTexts]
) -> tuple[ConditionInputs, ConditionInputs | None]:
    """Turn what images show into what the conditioner reads.

    Args:
      rows: As `describe_conditions` gives them, one per image.

    Returns:
      The inputs, and what they are guided away from; None for "no condition".

    Raises:
      InputError: If the tokenizer cannot be read.
    """
    condition = config.diffusion.condition
    label = null_label = None
    if condition.uses_classes:
        label = jnp.asarray([int(row["label"]) for row in rows], jnp.int32)
        null_label = jnp.full_like(label, config.data.num_classes)
    if not condition.uses_tokens:
        return ConditionInputs(label=label), None
    tokenizer = _tokenizer(condition)

    def tokens(keyword: str) -> Int[Array, "b n"]:
        texts = [row.get(keyword, "") for row in rows]
        return jnp.asarray(tokenizer.encode(texts))

    return (
        ConditionInputs(label=label, tokens=tokens("prompt")),
        ConditionInputs(label=null_label, tokens=tokens("negative_prompt")),
    )
