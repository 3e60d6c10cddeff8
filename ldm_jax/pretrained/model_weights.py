"""A model's weights with the config that builds its networks, and our own file format.

A folder of our own format holds `config.json` and `weights.safetensors`, whose keys
are the paths of our leaves.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from ldm_jax.config import Config
from ldm_jax.config import from_json as config_from_json
from ldm_jax.files import printable, write_safetensors
from ldm_jax.pretrained.layouts import own_format, read_tree, write_tree
from ldm_jax.pretrained.tensors import Tensors, open_tensors
from ldm_jax.types import InputError, PyTree

DtypeName = Literal["float32", "float16", "bfloat16"]

WEIGHTS_FILE = "weights.safetensors"
LATENT_SCALE = "latent_scale"
"""Key of the latent scale in a file of our own format."""

CONFIG_METADATA = "ldm_jax.config"
SCALE_METADATA = "ldm_jax.latent_scale"
SCALE_TENSOR = "scale_factor"
"""Latent scale in a CompVis checkpoint."""


class ModelWeights(NamedTuple):
    """Parameters of all networks, and the config that builds them."""

    config: Config
    """Config of the model."""
    autoencoder: PyTree
    """Parameters of the first stage."""
    unet: PyTree
    """Parameters of the second stage; None for an autoencoder alone."""
    conditioner: PyTree
    """Parameters of the conditioner; {} if it has none."""
    latent_scale: float | None
    """Factor of the latents, above 0; None if the weights do not state it."""


class NetworkShapes(NamedTuple):
    """Shapes of the parameters that a config builds; {} where it builds no network."""

    autoencoder: PyTree
    """Shapes of the first stage."""
    unet: PyTree
    """Shapes of the second stage."""
    conditioner: PyTree
    """Shapes of the conditioner."""


def write_native(weights: ModelWeights, folder: Path) -> None:
    """Write a model's parameters into a folder in our own format.

    Raises:
      InputError: If the latent scale is unknown, or the file cannot be written.
    """
    tree = {
        "autoencoder": weights.autoencoder,
        "unet": weights.unet or {},
        "conditioner": weights.conditioner,
        LATENT_SCALE: known_scale(weights),
    }
    write_safetensors(folder / WEIGHTS_FILE, write_tree(tree, own_format))


def read_native(folder: Path, config: Config, shapes: NetworkShapes) -> ModelWeights:
    """Read a folder that `write_native` wrote.

    Raises:
      InputError: If a tensor is missing, unexpected, or of another shape.
    """
    path = folder / WEIGHTS_FILE
    wanted = {**shapes._asdict(), LATENT_SCALE: np.empty(())}
    tree = read_tree(wanted, own_format, open_tensors(path), what=str(path))
    return ModelWeights(
        config,
        tree["autoencoder"],
        tree.get("unet"),
        tree.get("conditioner", {}),
        float(tree[LATENT_SCALE]),
    )


def file_config(tensors: Tensors) -> Config | None:
    """Read the config in a file's metadata; None if this library did not write it."""
    text = tensors.metadata.get(CONFIG_METADATA)
    return None if text is None else config_from_json(text)


def file_scale(tensors: Tensors) -> float | None:
    """Read the latent scale from a file's metadata or CompVis' tensor.

    Raises:
      InputError: If it is not a number above 0.
    """
    got: Any = tensors.metadata.get(SCALE_METADATA)
    where = SCALE_METADATA
    if got is None:
        if SCALE_TENSOR not in tensors:
            return None
        where, array = SCALE_TENSOR, tensors[SCALE_TENSOR]
        # The shortest decimal: a double would show the digits of float32's rounding.
        got = str(array.ravel()[0]) if array.size == 1 else array.shape
    try:
        scale = float(got)
    except (TypeError, ValueError):
        scale = math.nan
    if not 0.0 < scale < math.inf:
        raise InputError(
            f"{where}: got {printable(str(got))}, wanted a number above 0; try another "
            "copy of the file"
        )
    return scale


def with_latent_scale(weights: ModelWeights, scale: float | None) -> ModelWeights:
    """Return the weights with a latent scale, if one is given."""
    if scale is None:
        return weights
    autoencoder = dataclasses.replace(weights.config.autoencoder, latent_scale=scale)
    config = dataclasses.replace(weights.config, autoencoder=autoencoder)
    return weights._replace(config=config, latent_scale=scale)


def known_scale(weights: ModelWeights) -> float:
    """Return the latent scale.

    Raises:
      InputError: If the weights do not state it.
    """
    if weights.latent_scale is None:
        raise InputError(
            "latent scale: got weights that do not state it, wanted a number; try "
            "--latent-scale, autoencoder.latent_scale in the config, or finishing the "
            "run that measures it"
        )
    return weights.latent_scale


def cast(tensors: Mapping[str, np.ndarray], dtype: DtypeName) -> dict[str, np.ndarray]:
    """Convert float32 tensors to the dtype of an export.

    Raises:
      InputError: If a number is too large for the dtype.
    """
    if dtype == "float32":
        return dict(tensors)
    import ml_dtypes

    target = np.float16 if dtype == "float16" else ml_dtypes.bfloat16
    converted: dict[str, np.ndarray] = {}
    for key, value in tensors.items():
        with np.errstate(over="ignore"):
            converted[key] = value.astype(target)
        if not np.isfinite(converted[key].astype(np.float32)).all():
            raise InputError(
                f"--dtype: {key} has numbers too large for {dtype}; try bfloat16 or "
                "float32"
            )
    return converted
