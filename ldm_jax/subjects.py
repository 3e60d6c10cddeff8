"""What the images of a request show: labels, texts, seeds, and what lies between."""

import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from ldm_jax.build import open_tokenizer
from ldm_jax.cli import parse_list
from ldm_jax.config import ConditionConfig, Config
from ldm_jax.data.tokenizer import Tokenizer
from ldm_jax.nn.conditioning import ConditionInputs
from ldm_jax.requests import SampleRequest
from ldm_jax.types import InputError

Shown = dict[str, str]
"""What an image shows, by kind: `label`, or `prompt` and perhaps `negative_prompt`."""


class Subject(NamedTuple):
    """One image to make.

    Attributes:
      shown: What it shows.
      seed: Its seed.
      other: What else it shows, between the two; or None.
      other_seed: Its second seed, between the two; or None.
      weight: Where between; 0 is the first.
    """

    shown: Shown
    seed: int
    other: Shown | None = None
    other_seed: int | None = None
    weight: float = 0.0


def subjects_of(config: Config, request: SampleRequest) -> list[Subject]:
    """List the images of a request: every condition with every seed, in rows.

    Raises:
      InputError: If the model needs what the request does not give, or the request
        gives what the model does not read.
    """
    shown = describe_conditions(config, request)
    if not request.interpolate:
        return [Subject(row, seed) for row in shown for seed in request.seeds]
    ends = len(shown), len(request.seeds)
    if max(ends) != 2:
        raise InputError(
            f"--interpolate: got {ends[0]} classes or texts and {ends[1]} seeds, "
            "wanted two of either or of both; try --seeds 0,1 and one label"
        )
    other = shown[1] if ends[0] == 2 else None
    other_seed = request.seeds[1] if ends[1] == 2 else None
    weights = np.linspace(0.0, 1.0, request.interpolate).tolist()
    return [
        Subject(shown[0], request.seeds[0], other, other_seed, weight)
        for weight in weights
    ]


def describe_conditions(config: Config, request: SampleRequest) -> list[Shown]:
    """Say what each row of a request shows, as its recipe has it.

    Raises:
      InputError: If the model needs a label, a prompt or a picture that the request
        does not give, or the request gives what the model does not read.
    """
    condition = config.diffusion.condition
    check_pictures(config, request)
    if request.negative_prompt and not condition.uses_tokens:
        raise InputError("--negative-prompt: this model reads no text; try without it")
    if request.prompts and not condition.uses_tokens:
        raise InputError("--prompt: this model reads no text; try --labels, or nothing")
    if request.labels and not condition.uses_classes:
        raise InputError(
            "--labels: this model has no classes; try --prompt, or nothing"
        )
    if condition.uses_tokens:
        if not request.prompts:
            raise InputError(
                '--prompt: not given, but this model draws texts; try --prompt "a cat"'
            )
        negative = {"negative_prompt": request.negative_prompt}
        shown = negative if request.negative_prompt and request.settings.guided else {}
        return [{"prompt": prompt, **shown} for prompt in request.prompts]
    if condition.uses_classes:
        top = config.data.num_classes - 1
        labels = parse_list(
            request.labels or f"0-{top}", name="--labels", low=0, high=top
        )
        return [{"label": str(label)} for label in labels]
    return [{}]


def check_pictures(config: Config, request: SampleRequest) -> None:
    """Raise `InputError` if a model needs a picture that is not given."""
    condition, settings = config.diffusion.condition, request.settings
    if condition.concat == "segmentation" or condition.context == "embedding":
        needs = "embedding" if condition.concat == "none" else condition.concat
        raise InputError(
            f"sample.py: this model needs a {needs} beside each image, which has no "
            "flag; try ldm_jax.generate.make_sample_fn from Python"
        )
    if condition.concat == "low_resolution" and settings.image is None:
        raise InputError("--image: not given, but this model enlarges pictures")
    if condition.concat == "masked_image" and settings.mask is None:
        raise InputError(
            "--mask: not given, but this model fills holes of pictures; try --image "
            "picture.png --mask mask.png"
        )
    changes = settings.invert or settings.outpaint is not None
    if condition.concat != "none" and (changes or settings.strength < 1.0):
        flag = "--invert" if settings.invert else "--strength or --outpaint"
        raise InputError(f"{flag}: this model is given its picture, wanted none")


@functools.cache
def _tokenizer(condition: ConditionConfig) -> Tokenizer:
    """Open a tokenizer once, not once for every chunk of images."""
    return open_tokenizer(condition)


def condition_inputs(
    config: Config, rows: list[Shown]
) -> tuple[ConditionInputs, ConditionInputs | None]:
    """Turn what images show into what the conditioner reads.

    Args:
      config: Of the model.
      rows: As `describe_conditions` gives them, one per image.

    Returns:
      The inputs, and what they are guided away from; None for "no condition".

    Raises:
      InputError: If the tokenizer cannot be read.
    """
    condition = config.diffusion.condition
    if condition.uses_tokens:
        tokenizer = _tokenizer(condition)

        def inputs(keyword: str) -> ConditionInputs:
            texts = [row.get(keyword, "") for row in rows]
            return ConditionInputs(tokens=jnp.asarray(tokenizer.encode(texts)))

        return inputs("prompt"), inputs("negative_prompt")
    if condition.uses_classes:
        labels = [int(row["label"]) for row in rows]
        return ConditionInputs(label=jnp.asarray(labels, jnp.int32)), None
    return ConditionInputs(), None
