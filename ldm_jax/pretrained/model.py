"""A whole model between two programs: its config, its parameters, and their shapes."""

import dataclasses
import math
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ldm_jax.config import Config
from ldm_jax.config import from_json as config_from_json
from ldm_jax.files import printable, write_safetensors
from ldm_jax.pretrained.layouts import flatten, unflatten
from ldm_jax.pretrained.tensors import Tensors, match_keys, open_tensors
from ldm_jax.types import InputError, PyTree

CONFIG_METADATA = "ldm_jax.config"
SCALE_METADATA = "ldm_jax.latent_scale"
SCALE_TENSOR = "scale_factor"
OWN_CONFIG = "ldm_jax.json"

UNUSED_CONDITIONER = re.compile(
    r"(.*\.position_ids|(model\.)?logit_scale|model\.attn_mask|"
    r"transformer\.to_logits\.(weight|bias))"
)
"""Tensors of a conditioner that take no part in what it computes."""


class ModelWeights(NamedTuple):
    """Parameters of both stages, and the config that builds their networks."""

    config: Config
    """Ours."""
    autoencoder: PyTree
    """The first stage's parameters, or None."""
    unet: PyTree
    """The second's, or None."""
    conditioner: PyTree
    """The conditioner's; {} if it has none."""
    latent_scale: float | None
    """What latents are multiplied by; None if the weights do not say."""


class Shapes(NamedTuple):
    """Our trees, of arrays or of their shapes."""

    autoencoder: PyTree
    """The first stage's."""
    unet: PyTree
    """The second's."""
    conditioner: PyTree
    """The conditioner's."""


def file_config(tensors: Tensors) -> Config | None:
    """Read the config that a file carries, if it was written here."""
    text = tensors.metadata.get(CONFIG_METADATA)
    return None if text is None else config_from_json(text)


def file_scale(tensors: Tensors) -> float | None:
    """Read the latent scale of a file: what was written here, or CompVis' tensor.

    Raises:
      InputError: If it is there and is no number above 0.
    """
    got: object = tensors.metadata.get(SCALE_METADATA)
    where = SCALE_METADATA
    if got is None:
        if SCALE_TENSOR not in tensors:
            return None
        where, got = SCALE_TENSOR, tensors[SCALE_TENSOR].tolist()
    try:
        scale = float(got)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError):
        scale = math.nan
    if not 0.0 < scale < math.inf:
        raise InputError(
            f"{where}: got {printable(str(got))}, wanted a number above 0; try another "
            "copy of the file"
        )
    return scale


WEIGHTS_FILE = "weights.safetensors"
LATENT_SCALE = "latent_scale"


def write_native(weights: ModelWeights, folder: Path) -> None:
    """Write a model's parameters into a folder.

    Args:
      weights: What to write; its latent scale must be known.
      folder: Where.

    Raises:
      InputError: If the latent scale is not known, or it cannot be written.
    """
    if weights.latent_scale is None:
        raise InputError(
            "latent scale: these weights do not say it, wanted a number; try "
            "--latent-scale"
        )
    arrays: dict[str, np.ndarray] = {}
    for name in ("autoencoder", "unet", "conditioner"):
        tree = getattr(weights, name) or {}
        arrays |= {
            f"{name}/{path}": np.asarray(leaf, np.float32)
            for path, leaf in flatten(tree).items()
        }
    arrays[LATENT_SCALE] = np.asarray(weights.latent_scale, np.float32)
    write_safetensors(folder / WEIGHTS_FILE, arrays)


def read_native(folder: Path, config: Config, shapes: Shapes) -> ModelWeights:
    """Read what `write_native` wrote.

    Args:
      folder: Where.
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
    return ModelWeights(
        config,
        read_own(tensors.under("autoencoder/")),
        read_own(tensors.under("unet/")) if has_unet else None,
        read_own(tensors.under("conditioner/")),
        float(tensors[LATENT_SCALE]),
    )


def read_own(tensors: Tensors) -> PyTree:
    """Read tensors that are named by our paths into nested dictionaries."""
    return unflatten({key: tensors[key] for key in tensors})


def with_latent_scale(weights: ModelWeights, scale: float | None) -> ModelWeights:
    """Return the model with a latent scale, if one is given."""
    if scale is None:
        return weights
    autoencoder = dataclasses.replace(weights.config.autoencoder, latent_scale=scale)
    config = dataclasses.replace(weights.config, autoencoder=autoencoder)
    return weights._replace(config=config, latent_scale=scale)
