"""What a run takes from elsewhere: checkpoints of a stage, and imported weights."""

import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ldm_jax import config as config_lib
from ldm_jax.build import build_networks, init_conditioner
from ldm_jax.config import CONFIG_FILE, Config
from ldm_jax.exchange import import_conditioner, import_first_stage
from ldm_jax.first_stage import autoencoder_stage, load_perceptual
from ldm_jax.generate import Networks
from ldm_jax.rng import root_key
from ldm_jax.training.checkpoint import Checkpoint, CheckpointStore
from ldm_jax.training.loop import CHECKPOINTS, Stage, stage_target
from ldm_jax.types import InputError, PyTree

SCALE_FILE = "latent_scale.json"


class Taken(NamedTuple):
    """What a run reads from elsewhere before it starts.

    Attributes:
      perceptual: Parameters of LPIPS, or None.
      first_stage: An autoencoder's parameters and latent scale; None if it is trained.
      conditioner: Parameters of a frozen conditioner, or {}.
    """

    perceptual: PyTree
    first_stage: tuple[PyTree, Float[Array, ""]] | None
    conditioner: PyTree


def take_from_elsewhere(config: Config, networks: Networks) -> Taken:
    """Read all that a run needs and does not train.

    Raises:
      InputError: If something is not given, not readable, or does not fit.
    """
    trains_first = config.first_stage is None
    has_second = "diffusion" in config.stages
    return Taken(
        load_perceptual(config) if trains_first else None,
        None if trains_first else take_first_stage(config),
        frozen_conditioner(config, networks) if has_second else {},
    )


def load_stage(stage: Stage, workdir: Path, config: Config) -> Checkpoint:
    """Load the newest intact checkpoint of a stage, changing nothing.

    Raises:
      InputError: If it has none.
      RunError: If none is intact.
    """
    directory = workdir / stage.name / CHECKPOINTS
    found = None
    if directory.is_dir():
        store = CheckpointStore(directory, keep=config.checkpoint.keep, read_only=True)
        found = store.restore(stage_target(stage, root_key(config.seed)))
        store.close()
    if found is None:
        raise InputError(
            f"--workdir: {workdir} has no finished checkpoint of the {stage.name} "
            "stage; run train.py with the same --workdir first"
        )
    return found


def load_first_stage(
    config: Config, workdir: Path
) -> tuple[PyTree, Float[Array, ""] | None, str]:
    """Load the averaged autoencoder of a run.

    Args:
      config: Of that run.
      workdir: Its folder.

    Returns:
      Its parameters; its latent scale, or None if that was not measured yet; and its
      digest.

    Raises:
      InputError: If it has no finished checkpoint.
      RunError: If no checkpoint is intact.
    """
    stage = autoencoder_stage(config, build_networks(config), workdir)
    found = load_stage(stage, workdir, config)
    path = workdir / "autoencoder" / SCALE_FILE
    scale = None
    if path.exists():
        scale = jnp.asarray(json.loads(path.read_text())["latent_scale"], jnp.float32)
    return found.tree["state"].ema, scale, found.digest


def take_first_stage(config: Config) -> tuple[PyTree, Float[Array, ""]]:
    """Take the autoencoder that `first_stage` names: of a run, or of weights.

    Args:
      config: Of the run that uses it.

    Returns:
      Its parameters and its latent scale.

    Raises:
      InputError: If there is none, or it is another network than the config's.
    """
    path = Path(str(config.first_stage))
    if (path / CONFIG_FILE).is_file() and (path / "autoencoder").is_dir():
        theirs = config_lib.read_config(path)
        if different := _different_autoencoder(theirs, config):
            raise InputError(
                f"first_stage: the autoencoder of {path} is another network: "
                f"{', '.join(different)}; try a config with the same values"
            )
        params, scale, _ = load_first_stage(theirs, path)
    else:
        params, told = import_first_stage(path, config)
        scale = None if told is None else jnp.asarray(told, jnp.float32)
    if config.autoencoder.latent_scale is not None:
        scale = jnp.asarray(config.autoencoder.latent_scale, jnp.float32)
    if scale is None:
        raise InputError(
            f"first_stage: the latent scale of {path} is not known; finish that run, "
            "or set --autoencoder.latent-scale"
        )
    return params, scale


NETWORK_FIELDS = (
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


def _different_autoencoder(theirs: Config, ours: Config) -> list[str]:
    pairs = [
        (name, getattr(theirs.autoencoder, name), getattr(ours.autoencoder, name))
        for name in NETWORK_FIELDS
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


def frozen_conditioner(config: Config, networks: Networks) -> PyTree:
    """Load a conditioner that is not trained; {} if it is, or has no parameters.

    Raises:
      InputError: If its weights are not given or do not fit.
    """
    condition = config.diffusion.condition
    shapes = jax.eval_shape(lambda: init_conditioner(config, networks))
    if condition.trained or not jax.tree.leaves(shapes):
        return {}
    if condition.weights is None:
        raise InputError(
            "diffusion.condition.weights: not given, wanted the file or folder of the "
            f"frozen {condition.context} encoder; try --diffusion.condition.weights "
            "FOLDER/text_encoder"
        )
    return import_conditioner(Path(condition.weights), config)
