"""A whole model between two programs: its config, its parameters, and their shapes."""

import dataclasses
import math
import re
from pathlib import Path
from typing import NamedTuple

from ldm_jax.config import Config
from ldm_jax.config import from_json as config_from_json
from ldm_jax.interop.pickles import printable
from ldm_jax.interop.weights import Tensors
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


class Model(NamedTuple):
    """Parameters of both stages, and the config that builds their networks.

    Attributes:
      config: Ours.
      autoencoder: The first stage's parameters, or None.
      unet: The second's, or None.
      conditioner: The conditioner's; {} if it has none.
      latent_scale: What latents are multiplied by; None if the weights do not say.
    """

    config: Config
    autoencoder: PyTree
    unet: PyTree
    conditioner: PyTree
    latent_scale: float | None


class Shapes(NamedTuple):
    """Our trees, of arrays or of their shapes.

    Attributes:
      autoencoder: The first stage's.
      unet: The second's.
      conditioner: The conditioner's.
    """

    autoencoder: PyTree
    unet: PyTree
    conditioner: PyTree


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


def with_tokenizer(config: Config, tokenizer: Path | None) -> Config:
    """Return the config with the folder of the tokenizer's files put in, if any."""
    return config if tokenizer is None else _set_tokenizer(config, str(tokenizer))


def without_tokenizer(config: Config) -> Config:
    """Return the config without a folder of one machine; copies lie beside it."""
    return _set_tokenizer(config, None)


def _set_tokenizer(config: Config, tokenizer: str | None) -> Config:
    condition = dataclasses.replace(config.diffusion.condition, tokenizer=tokenizer)
    diffusion = dataclasses.replace(config.diffusion, condition=condition)
    return dataclasses.replace(config, diffusion=diffusion)
