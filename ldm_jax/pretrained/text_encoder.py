"""The frozen text encoder of a run, read from weights."""

import dataclasses
from pathlib import Path

import jax

from ldm_jax.config import ClipConfig, Config
from ldm_jax.latent_diffusion import LatentDiffusion, init_conditioner, param_shapes
from ldm_jax.pretrained.clip_import import read_clip_component, read_clip_tensors
from ldm_jax.pretrained.diffusers_configs import read_clip
from ldm_jax.pretrained.diffusers_folder import (
    TEXT_ENCODERS,
    Component,
    open_folder,
)
from ldm_jax.pretrained.tensors import open_tensors
from ldm_jax.types import InputError, PyTree

CLIP_FIELDS = ("width", "depth", "num_heads", "mlp_width", "activation", "epsilon")
"""Fields of `ClipConfig` that must equal the file's."""


def read_conditioner(config: Config, model: LatentDiffusion) -> PyTree:
    """Read the conditioner of a run that does not train it.

    Returns:
      Its parameters; {} if it is trained, or has none.

    Raises:
      InputError: If its weights are not given or do not fit.
    """
    condition = config.diffusion.condition
    shapes = param_shapes(init_conditioner, model)
    if condition.trained or not jax.tree.leaves(shapes):
        return {}
    if condition.tokenizer is None and config.diffusion.condition_dropout:
        raise InputError(
            "diffusion.condition.tokenizer: not given, wanted the folder of the "
            "tokenizer's files: dropped conditions become its empty prompt; try "
            "--diffusion.condition.tokenizer FOLDER/tokenizer"
        )
    if condition.weights is None:
        raise InputError(
            "diffusion.condition.weights: not given, wanted the file or folder of the "
            f"frozen {condition.context} encoder; try --diffusion.condition.weights "
            "FOLDER/text_encoder"
        )
    if condition.context != "clip":
        raise InputError(
            f"diffusion.condition.weights: got context {condition.context}, wanted "
            "clip, the only one that is read from files; try "
            "--diffusion.condition.trained True"
        )
    return import_clip(Path(condition.weights), condition.clip, shapes)


def import_clip(path: Path, clip: ClipConfig, shapes: PyTree) -> PyTree:
    """Read CLIP's text encoder as the parameters of a conditioner.

    Args:
      path: A folder with `config.json`, or a file in transformers' naming.
      shapes: Shapes of the conditioner's parameters.

    Raises:
      InputError: If it does not fit the config.
    """
    if path.is_dir():
        component = open_folder(path).get(TEXT_ENCODERS)
        if different := _different_clip(component, clip):
            raise InputError(
                f"diffusion.condition.weights: the text encoder of {path} is another "
                f"network: {', '.join(different)}; try a config with the same values"
            )
        return {"encoder": read_clip_component(component, clip, shapes["encoder"])}
    tensors = open_tensors(path)
    return {
        "encoder": read_clip_tensors(tensors, clip, shapes["encoder"], what=str(path))
    }


def _different_clip(component: Component, ours: ClipConfig) -> list[str]:
    theirs = ClipConfig(**read_clip(component.class_name, component.config))
    # If the layer before the last is read, files may lack the last one.
    if ours.output == "penultimate" and theirs.depth == ours.depth - 1:
        theirs = dataclasses.replace(theirs, depth=ours.depth)
    pairs = [(name, getattr(theirs, name), getattr(ours, name)) for name in CLIP_FIELDS]
    return [f"{name} ({a!r} there, {b!r} here)" for name, a, b in pairs if a != b]
