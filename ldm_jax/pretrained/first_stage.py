"""The first stage of a run, or of weights, for a run that does not train its own."""

from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from ldm_jax.build import build_model
from ldm_jax.config import Config, read_config
from ldm_jax.latent_diffusion import init_autoencoder, param_shapes
from ldm_jax.pretrained.compvis_import import read_compvis
from ldm_jax.pretrained.diffusers_configs import read_autoencoder
from ldm_jax.pretrained.diffusers_folder import AUTOENCODERS, open_folder
from ldm_jax.pretrained.diffusers_import import (
    assemble_config,
    read_autoencoder_component,
)
from ldm_jax.pretrained.load_stage import load_stage
from ldm_jax.pretrained.model_weights import (
    WEIGHTS_FILE,
    NetworkShapes,
    file_config,
)
from ldm_jax.pretrained.open_weights import is_run, open_weights
from ldm_jax.pretrained.tensors import open_tensors
from ldm_jax.training.autoencoder_stage import autoencoder_stage
from ldm_jax.training.workdir import read_scale
from ldm_jax.types import InputError, PyTree

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
"""Fields of `AutoencoderConfig` that the network depends on."""


class TrainedFirstStage(NamedTuple):
    """The first stage of a run."""

    params: PyTree
    """Averaged parameters of the autoencoder."""
    latent_scale: Float[Array, ""] | None
    """Factor of the latents; None if it is not measured yet."""
    digest: str
    """Digest of the checkpoint."""


def load_first_stage(config: Config, workdir: Path) -> TrainedFirstStage:
    """Load the averaged autoencoder of a run.

    Raises:
      InputError: If it has no finished checkpoint, or its latent scale is damaged.
      RunError: If no checkpoint is intact.
    """
    stage = autoencoder_stage(config, build_model(config), workdir)
    found = load_stage(stage, workdir)
    scale = read_scale(workdir)
    if scale is not None:
        scale = jnp.asarray(scale, jnp.float32)
    return TrainedFirstStage(found.tree["state"].ema, scale, found.digest)


def read_first_stage(config: Config) -> tuple[PyTree, Float[Array, ""]]:
    """Read the autoencoder that `first_stage` names: a finished run or weights.

    Returns:
      Its parameters and its latent scale.

    Raises:
      InputError: If there is none, it is another network, or its latent scale is
        unknown or differs from the config's.
    """
    path, stated = Path(str(config.first_stage)), None
    if is_run(path):
        theirs = read_config(path)
        _check_autoencoder(path, theirs, config)
        params, measured, _ = load_first_stage(theirs, path)
        if measured is None:
            raise InputError(
                f"first_stage: stage 1 of {path} is not finished; run ldm train there "
                "to its end first"
            )
        stated = float(measured)
    else:
        params, stated = import_first_stage(path, config)
    scale = config.autoencoder.latent_scale
    if scale is None and stated is None:
        raise InputError(
            f"first_stage: the latent scale of {path} is not known, wanted a number; "
            "try --autoencoder.latent-scale"
        )
    if scale is not None and stated is not None and abs(stated / scale - 1.0) > 1e-3:
        raise InputError(
            f"first_stage: the latent scale of {path} is {stated:.6g}, but the config "
            f"says {scale:.6g}; try --autoencoder.latent-scale {stated!r}"
        )
    return params, jnp.asarray(stated if scale is None else scale, jnp.float32)


def import_first_stage(path: Path, config: Config) -> tuple[PyTree, float | None]:
    """Read an autoencoder of the config's shape from weights of any format.

    Args:
      path: A diffusers folder or one model of it, a CompVis file, or a folder of our
        own format.
      config: Config of the run that uses it.

    Returns:
      Its parameters, and its latent scale if the weights state it.

    Raises:
      InputError: If there is none, or it is another network.
    """
    if path.is_dir() and (path / WEIGHTS_FILE).exists():
        _check_autoencoder(path, read_config(path), config)
        weights = open_weights(path).read()
        return weights.autoencoder, weights.latent_scale
    shapes = param_shapes(init_autoencoder, build_model(config))
    if path.is_dir():
        component = open_folder(path).get(AUTOENCODERS)
        fields = read_autoencoder(component.class_name, component.config)
        _check_autoencoder(path, assemble_config(autoencoder=fields), config)
        tree = read_autoencoder_component(component, config.autoencoder, shapes)
        scale = component.config.get("scaling_factor")
        return tree, None if scale is None else float(scale)
    tensors = open_tensors(path)
    theirs = file_config(tensors)
    if theirs is not None:
        _check_autoencoder(path, theirs, config)
    empty = NetworkShapes(shapes, {}, {})
    weights = read_compvis(tensors, config, empty, what=str(path))
    return weights.autoencoder, weights.latent_scale


def different_autoencoder(theirs: Config, ours: Config) -> list[str]:
    """Compare two autoencoders by what the network depends on, not by their training.

    Returns:
      Fields that differ, with both values; empty if the networks are the same.
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
    return [f"{name} ({a!r} there, {b!r} here)" for name, a, b in pairs if a != b]


def _check_autoencoder(path: Path, theirs: Config, ours: Config) -> None:
    if different := different_autoencoder(theirs, ours):
        raise InputError(
            f"first_stage: the autoencoder of {path} is another network: "
            f"{', '.join(different)}; try a config with the same values"
        )
