"""Our own weights file: parameters by their paths, float32, with a digest."""

import dataclasses
from pathlib import Path

import numpy as np

from ldm_jax.config import Config
from ldm_jax.interop.model import Model, Shapes
from ldm_jax.interop.names import flatten, unflatten
from ldm_jax.interop.weights import (
    Tensors,
    match_keys,
    open_tensors,
    write_safetensors,
)
from ldm_jax.types import InputError, PyTree

WEIGHTS_FILE = "weights.safetensors"
LATENT_SCALE = "latent_scale"


def write_native(model: Model, folder: Path) -> None:
    """Write a model's parameters into a folder.

    Args:
      model: What to write; its latent scale must be known.
      folder: Where.

    Raises:
      InputError: If the latent scale is not known, or it cannot be written.
    """
    if model.latent_scale is None:
        raise InputError(
            "latent scale: these weights do not say it, wanted a number; try "
            "--latent-scale"
        )
    arrays: dict[str, np.ndarray] = {}
    for name in ("autoencoder", "unet", "conditioner"):
        tree = getattr(model, name) or {}
        arrays |= {
            f"{name}/{path}": np.asarray(leaf, np.float32)
            for path, leaf in flatten(tree).items()
        }
    arrays[LATENT_SCALE] = np.asarray(model.latent_scale, np.float32)
    write_safetensors(folder / WEIGHTS_FILE, arrays)


def read_native(folder: Path, config: Config, shapes: Shapes) -> Model:
    """Read what `write_native` wrote.

    Args:
      folder: Where.
      config: Of the model.
      shapes: Of the networks that the config builds.

    Returns:
      The model.

    Raises:
      InputError: If a tensor is missing, unexpected, or of another shape.
    """
    path = folder / WEIGHTS_FILE
    tensors = open_tensors(path)
    has_unet = "diffusion" in config.stages
    wanted: dict[str, tuple[int, ...]] = {LATENT_SCALE: ()}
    for name in ("autoencoder", "unet", "conditioner"):
        tree = getattr(shapes, name) if has_unet or name == "autoencoder" else {}
        wanted |= {f"{name}/{k}": leaf.shape for k, leaf in flatten(tree).items()}
    match_keys(wanted, tensors, what=str(path))
    return Model(
        config,
        read_own(tensors.under("autoencoder/")),
        read_own(tensors.under("unet/")) if has_unet else None,
        read_own(tensors.under("conditioner/")),
        float(tensors[LATENT_SCALE]),
    )


def read_own(tensors: Tensors) -> PyTree:
    """Read tensors that are named by our paths into nested dictionaries."""
    return unflatten({key: tensors[key] for key in tensors})


def with_latent_scale(model: Model, scale: float | None) -> Model:
    """Return the model with a latent scale, if one is given."""
    if scale is None:
        return model
    autoencoder = dataclasses.replace(model.config.autoencoder, latent_scale=scale)
    config = dataclasses.replace(model.config, autoencoder=autoencoder)
    return model._replace(config=config, latent_scale=scale)
