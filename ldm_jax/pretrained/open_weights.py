"""Weights of any format, opened as one of our models."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ldm_jax.build import build_model
from ldm_jax.config import CONFIG_FILE, Config, read_config
from ldm_jax.config.load_config import load_config
from ldm_jax.config.run import with_tokenizer
from ldm_jax.files import read_json
from ldm_jax.latent_diffusion import (
    LatentDiffusion,
    SampleParams,
    init_autoencoder,
    init_conditioner,
    init_unet,
    param_shapes,
)
from ldm_jax.pretrained.compvis_import import is_first_stage, read_compvis
from ldm_jax.pretrained.contained_path import contained
from ldm_jax.pretrained.diffusers_folder import open_folder
from ldm_jax.pretrained.diffusers_import import folder_config, read_folder
from ldm_jax.pretrained.model_weights import (
    WEIGHTS_FILE,
    ModelWeights,
    NetworkShapes,
    file_config,
    known_scale,
    read_native,
)
from ldm_jax.pretrained.tensors import open_tensors
from ldm_jax.types import InputError


class OpenedWeights(NamedTuple):
    """Weights whose config is read and whose parameters are not."""

    config: Config
    """Config of the model."""
    model: LatentDiffusion
    """The model that the config builds."""
    read: Callable[[], ModelWeights]
    """Reads every parameter; raises `InputError` if one does not fit the config."""


def open_weights(
    path: Path, *, config_file: Path | None = None, tokenizer: Path | None = None
) -> OpenedWeights:
    """Open a diffusers folder, a CompVis file, or a folder of our own format.

    Args:
      path: The folder or file.
      config_file: Config of a file that does not carry one.
      tokenizer: Folder of the tokenizer, if the weights have none.

    Raises:
      InputError: If the path is none of these, or its config is unknown.
    """
    if not path.exists():
        raise InputError(f"--weights: {path} is not there, wanted a folder or a file")
    if tokenizer is None and (path / "tokenizer").is_dir():
        tokenizer = contained(path, "tokenizer")
        for file in tokenizer.iterdir():
            contained(path, f"tokenizer/{file.name}")
    if path.is_dir() and (path / WEIGHTS_FILE).exists():
        config = read_config(path)
        read = functools.partial(read_native, path)
    elif is_run(path):
        raise InputError(f"--weights: {path} is a run; try --workdir {path}")
    elif path.is_dir():
        folder = open_folder(path)
        config = folder_config(folder)
        read = functools.partial(read_folder, folder)
    else:
        config, read = _open_compvis(path, config_file)
    config = with_tokenizer(config, tokenizer)
    shapes = network_shapes(config)
    return OpenedWeights(config, build_model(config), lambda: read(config, shapes))


def _open_compvis(
    path: Path, config_file: Path | None
) -> tuple[Config, Callable[[Config, NetworkShapes], ModelWeights]]:
    tensors = open_tensors(path)
    config = file_config(tensors)
    if config_file is not None:
        config = load_config(str(config_file))
    if config is None:
        raise InputError(
            f"--weights: {path} does not carry its config; try that of the "
            "model, such as --config ldm/sd15"
        )
    if is_first_stage(tensors) and "diffusion" in config.stages:
        raise InputError(
            f"--weights: got an autoencoder alone in {path} and a config with a UNet, "
            "wanted stages = autoencoder; try a config of an autoencoder, "
            "such as --config autoencoder/kl_f8"
        )

    def read(config: Config, shapes: NetworkShapes) -> ModelWeights:
        weights = read_compvis(tensors, config, shapes, what=str(path))
        scale = weights.latent_scale or config.autoencoder.latent_scale
        return weights._replace(latent_scale=scale)

    return config, read


@functools.lru_cache(maxsize=16)
def network_shapes(config: Config) -> NetworkShapes:
    """Return the shapes of all parameters of a config's networks."""
    model = build_model(config)
    has_unet = "diffusion" in config.stages
    return NetworkShapes(
        param_shapes(init_autoencoder, model),
        param_shapes(init_unet, model) if has_unet else {},
        param_shapes(init_conditioner, model) if has_unet else {},
    )


def to_sample_params(weights: ModelWeights) -> SampleParams:
    """Put a model's parameters on the device, in the form that sampling reads.

    Raises:
      InputError: If it has no UNet, or its latent scale is unknown.
    """
    if weights.unet is None:
        raise InputError(
            "--weights: got an autoencoder alone, wanted a UNet beside it to sample"
        )
    scale = jnp.asarray(known_scale(weights), jnp.float32)
    params = SampleParams(weights.autoencoder, weights.unet, weights.conditioner, scale)
    return jax.device_put(params)


def is_run(path: Path) -> bool:
    """Return whether a folder is a run of `ldm train`: our config and no weights."""
    if (path / WEIGHTS_FILE).exists() or not (path / CONFIG_FILE).is_file():
        return False
    try:
        return "stages" in read_json(path / CONFIG_FILE)
    except InputError:
        return False
