"""Models in and out: from weights of any format to our networks, and back."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ldm_jax.build import (
    build_model,
    init_autoencoder,
    init_conditioner,
    init_unet,
)
from ldm_jax.config import CONFIG_FILE, ClipConfig, Config, read_config
from ldm_jax.config.flags import load_config_file
from ldm_jax.config.run import with_tokenizer
from ldm_jax.latent_diffusion import LatentDiffusion, SampleParams
from ldm_jax.pretrained.assemble_config import assemble_config
from ldm_jax.pretrained.compvis import AUTOENCODER_PREFIX
from ldm_jax.pretrained.diffusers_configs import read_autoencoder, read_clip
from ldm_jax.pretrained.diffusers_folder import Component, Folder, component_tensors
from ldm_jax.pretrained.model import (
    WEIGHTS_FILE,
    ModelWeights,
    Shapes,
    file_config,
    file_scale,
    read_native,
)
from ldm_jax.pretrained.read_compvis import is_first_stage, read_compvis
from ldm_jax.pretrained.read_diffusers import (
    AUTOENCODERS,
    TEXT_ENCODERS,
    TOKENIZERS,
    UNETS,
    folder_config,
    one_of,
    open_any_folder,
    read_autoencoder_component,
    read_clip_tensors,
    read_folder,
)
from ldm_jax.pretrained.strict_json import read_json
from ldm_jax.pretrained.tensors import Tensors, open_tensors
from ldm_jax.types import InputError, PyTree


class Opened(NamedTuple):
    """Weights whose config is known and whose parameters are not read yet."""

    config: Config
    """Of the model."""
    model: LatentDiffusion
    """Built from it."""
    read: Callable[[], ModelWeights]
    """Reads every parameter, or raises."""


def open_weights(
    path: Path, *, config_file: Path | None = None, tokenizer: Path | None = None
) -> Opened:
    """Open a diffusers folder, a file in CompVis naming, or our own folder.

    Args:
      path: The folder or file.
      config_file: Config of a file that does not carry one.
      tokenizer: Folder of the tokenizer, where the weights have none.

    Returns:
      The model, not read yet.

    Raises:
      InputError: If it is none of these, or its config is not known.
    """
    if not path.exists():
        raise InputError(f"--weights: {path} is not there, wanted a folder or a file")
    beside = path / "tokenizer"
    if tokenizer is None and beside.is_dir():
        tokenizer = beside
    if path.is_dir() and (path / WEIGHTS_FILE).exists():
        config = with_tokenizer(read_config(path), tokenizer)
        return _opened(config, functools.partial(read_native, path))
    if is_run(path):
        raise InputError(f"--weights: {path} is a run; try --workdir {path}")
    if path.is_dir():
        folder = open_any_folder(path)
        config = with_tokenizer(folder_config(folder), tokenizer)
        return _opened(config, functools.partial(read_folder, folder))
    tensors = open_tensors(path)
    config = file_config(tensors)
    if config_file is not None:
        config = load_config_file(str(config_file))
    if config is None:
        raise InputError(
            f"--weights: {path} does not say what model it holds; try --config with "
            "its recipe, such as configs/ldm/sd15.py"
        )
    config = with_tokenizer(config, tokenizer)

    if is_first_stage(tensors) and "diffusion" in config.stages:
        raise InputError(
            f"--weights: {path} holds an autoencoder alone, and its config has a UNet "
            "too, wanted the stage autoencoder alone; try --config with a recipe of "
            "configs/autoencoder, such as configs/autoencoder/kl_f8.py"
        )

    def read(config: Config, shapes: Shapes) -> ModelWeights:
        weights = read_compvis(tensors, config, shapes, what=str(path))
        scale = weights.latent_scale or config.autoencoder.latent_scale
        return weights._replace(latent_scale=scale)

    return _opened(config, read)


def _opened(config: Config, read: Callable[[Config, Shapes], ModelWeights]) -> Opened:
    model = build_model(config)
    shapes = network_shapes(config)
    return Opened(config, model, lambda: read(config, shapes))


@functools.lru_cache(maxsize=16)
def network_shapes(config: Config) -> Shapes:
    """Return the shapes of every parameter that a config asks for."""
    model = build_model(config)
    has_unet = "diffusion" in config.stages
    return Shapes(
        jax.eval_shape(lambda: init_autoencoder(config, model)),
        jax.eval_shape(lambda: init_unet(config, model)) if has_unet else {},
        jax.eval_shape(lambda: init_conditioner(config, model)) if has_unet else {},
    )


def to_sample_params(weights: ModelWeights) -> SampleParams:
    """Put a model's parameters where sampling wants them.

    Raises:
      InputError: If it has no UNet, or its latent scale is not known.
    """
    if weights.unet is None:
        raise InputError(
            "--weights: an autoencoder alone cannot sample, wanted a UNet beside it"
        )
    if weights.latent_scale is None:
        raise InputError(
            "--weights: the latent scale is not known, wanted it in the config; set "
            "autoencoder.latent_scale there"
        )
    scale = jnp.asarray(weights.latent_scale, jnp.float32)
    params = SampleParams(weights.autoencoder, weights.unet, weights.conditioner, scale)
    return jax.device_put(params)


def import_first_stage(path: Path, config: Config) -> tuple[PyTree, float | None]:
    """Read an autoencoder of the config's shape out of any weights.

    Args:
      path: A diffusers folder or one model of it, a file in CompVis naming, or our own
        folder.
      config: Of the run that uses it.

    Returns:
      Its parameters, and its latent scale if the weights say it.

    Raises:
      InputError: If there is none, or it is another network.
    """
    model = build_model(config)
    shapes = jax.eval_shape(lambda: init_autoencoder(config, model))
    if path.is_dir() and not (path / WEIGHTS_FILE).exists():
        component = one_of(open_any_folder(path), AUTOENCODERS)
        settings = read_autoencoder(component.class_name, component.config)
        _check_autoencoder(path, assemble_config(autoencoder=settings), config)
        tree = read_autoencoder_component(component, config, shapes)
        scale = component.config.get("scaling_factor")
        return tree, None if scale is None else float(scale)
    if path.is_dir():
        _check_autoencoder(path, read_config(path), config)
        weights = open_weights(path).read()
        return weights.autoencoder, weights.latent_scale
    tensors = open_tensors(path)
    theirs, scale = file_config(tensors), file_scale(tensors)
    if theirs is not None:
        _check_autoencoder(path, theirs, config)
    if not is_first_stage(tensors):
        tensors = tensors.under(AUTOENCODER_PREFIX)
    empty = Shapes(shapes, {}, {})
    weights = read_compvis(tensors, config, empty, what=str(path))
    return weights.autoencoder, scale


AUTOENCODER_FIELDS = (
    "regularizer",
    "channels",
    "channel_multipliers",
    "num_res_blocks",
    "mid_attention",
    "latent_channels",
    "encoder_channels",
    "num_groups",
    "codebook_size",
)


def different_autoencoder(theirs: Config, ours: Config) -> list[str]:
    """Compare two autoencoders by all that makes the network, not by its training.

    Args:
      theirs: Config of one.
      ours: Of the other.

    Returns:
      What differs, by field, with both values; empty if the networks are the same.
    """
    pairs = [
        (name, getattr(theirs.autoencoder, name), getattr(ours.autoencoder, name))
        for name in AUTOENCODER_FIELDS
        if name != "codebook_size" or ours.autoencoder.regularizer == "vq"
    ]
    pairs.append(
        (
            "attention levels",
            theirs.autoencoder.attention_levels(theirs.data.image_size),
            ours.autoencoder.attention_levels(ours.data.image_size),
        )
    )
    channels = (theirs.data.image_channels, ours.data.image_channels)
    pairs.append(("image_channels", *channels))
    return _details(pairs)


def _details(pairs: list[tuple[str, object, object]]) -> list[str]:
    return [f"{name} ({a!r} there, {b!r} here)" for name, a, b in pairs if a != b]


def _check_autoencoder(path: Path, theirs: Config, ours: Config) -> None:
    if different := different_autoencoder(theirs, ours):
        raise InputError(
            f"first_stage: the autoencoder of {path} is another network: "
            f"{', '.join(different)}; try a config with the same values"
        )


def import_conditioner(path: Path, config: Config) -> PyTree:
    """Read a frozen text encoder.

    Args:
      path: A folder with `config.json`, or a file in transformers' naming.
      config: Of the run that uses it.

    Returns:
      The conditioner's parameters.

    Raises:
      InputError: If it does not fit the config.
    """
    model = build_model(config)
    shapes = jax.eval_shape(lambda: init_conditioner(config, model))
    if config.diffusion.condition.context != "clip":
        raise InputError(
            "diffusion.condition.weights: got context "
            f"{config.diffusion.condition.context}, wanted clip, the one that is read "
            "from files; try --diffusion.condition.trained True"
        )
    tensors: Tensors
    if path.is_dir():
        component = one_of(open_any_folder(path), TEXT_ENCODERS)
        if different := _different_clip(component, config.diffusion.condition.clip):
            raise InputError(
                f"diffusion.condition.weights: the text encoder of {path} is another "
                f"network: {', '.join(different)}; try a config with the same values"
            )
        tensors = component_tensors(component)
    else:
        tensors = open_tensors(path)
    encoder = read_clip_tensors(tensors, config, shapes["encoder"], what=str(path))
    return {"encoder": encoder}


CLIP_FIELDS = ("width", "depth", "num_heads", "mlp_width", "activation", "epsilon")


def _different_clip(component: Component, ours: ClipConfig) -> list[str]:
    theirs = ClipConfig(**read_clip(component.class_name, component.config))
    # Where the layer before the last is read, files may come without the last one.
    if ours.output == "penultimate" and theirs.depth == ours.depth - 1:
        theirs = dataclasses.replace(theirs, depth=ours.depth)
    return _details([(n, getattr(theirs, n), getattr(ours, n)) for n in CLIP_FIELDS])


def is_run(path: Path) -> bool:
    """Tell whether a folder is a run of train.py: its config, and no weights file."""
    if (path / WEIGHTS_FILE).exists() or not (path / CONFIG_FILE).is_file():
        return False
    try:
        return "stages" in read_json(path / CONFIG_FILE)
    except InputError:
        return False


def inspect(path: Path) -> dict[str, Any]:
    """Say what weights hold, reading no tensor.

    Args:
      path: A folder or a file.

    Returns:
      JSON-compatible: format, parts, tensors, parameters and dtypes.

    Raises:
      InputError: If it is none that is known.
    """
    if path.is_dir() and (path / WEIGHTS_FILE).exists():
        return {"format": "ldm_jax", **_summary(open_tensors(path / WEIGHTS_FILE))}
    if is_run(path):
        return {"format": "ldm_jax run", "try": f"export {path} --out FOLDER"}
    if path.is_dir():
        return _inspect_folder(open_any_folder(path))
    tensors = open_tensors(path)
    groups: dict[str, int] = {}
    for key in tensors:
        head = key.split(".")[0]
        groups[head] = groups.get(head, 0) + 1
    return {
        "format": "file",
        "carries_config": file_config(tensors) is not None,
        "tensors_by_group": groups,
        **_summary(tensors),
    }


def _inspect_folder(folder: Folder) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    for name, component in folder.components.items():
        parts[name] = {"class": component.class_name}
        if component.class_name in (*AUTOENCODERS, *UNETS, *TEXT_ENCODERS):
            parts[name] |= _summary(component_tensors(component))
        elif component.class_name not in TOKENIZERS:
            kept = ("beta_schedule", "prediction_type")
            parts[name] |= {key: component.config.get(key) for key in kept}
    return {"format": "diffusers", "pipeline": folder.pipeline, "parts": parts}


def _summary(tensors: Tensors) -> dict[str, Any]:
    count = 0
    dtypes: dict[str, int] = {}
    for key in tensors:
        size = 1
        for side in tensors.shape(key):
            size *= side
        count += size
        dtypes[tensors.dtype(key)] = dtypes.get(tensors.dtype(key), 0) + 1
    return {"tensors": len(tensors), "parameters": count, "tensors_by_dtype": dtypes}


def to_json(report: dict[str, Any]) -> str:
    """Write a report as indented JSON."""
    return json.dumps(report, indent=2)
