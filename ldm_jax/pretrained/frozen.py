"""Weights that a run reads from elsewhere and does not train.

A run keeps a copy of them in its folder, so that it does not change when their sources
do.
"""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ldm_jax.config import Config
from ldm_jax.files import check_file, write_safetensors
from ldm_jax.latent_diffusion import (
    LatentDiffusion,
    init_autoencoder,
    init_conditioner,
    param_shapes,
)
from ldm_jax.pretrained.first_stage import (
    TrainedFirstStage,
    load_first_stage,
    read_first_stage,
)
from ldm_jax.pretrained.layouts import own_format, read_tree, write_tree
from ldm_jax.pretrained.metric_networks import load_perceptual
from ldm_jax.pretrained.model_weights import LATENT_SCALE, WEIGHTS_FILE
from ldm_jax.pretrained.tensors import open_tensors
from ldm_jax.pretrained.text_encoder import read_conditioner
from ldm_jax.training.digest import tree_digest
from ldm_jax.training.latent_encoders import Encoders
from ldm_jax.types import InputError, PyTree

FROZEN_FILE = "taken.safetensors"
"""Copy of the weights in a run's folder."""


class PretrainedWeights(NamedTuple):
    """Parameters that a run reads from files before it starts."""

    perceptual: PyTree
    """Parameters of LPIPS, or None."""
    first_stage: tuple[PyTree, Float[Array, ""]] | None
    """Parameters and latent scale of an autoencoder; None if it is trained."""
    conditioner: PyTree
    """Parameters of a frozen conditioner, or {}."""

    @property
    def digest(self) -> str:
        """The digest that `final.json` records for a first stage that was read."""
        return tree_digest((self.first_stage, self.conditioner))


def read_frozen(
    config: Config, model: LatentDiffusion, workdir: Path
) -> PretrainedWeights:
    """Read all weights that a run needs and does not train.

    Args:
      workdir: Folder of the run; its copy is read if there is one.

    Raises:
      InputError: If weights are not given, cannot be read, or do not fit.
    """
    trains_first = config.first_stage is None
    perceptual = load_perceptual(config.autoencoder) if trains_first else None
    if (workdir / FROZEN_FILE).exists():
        return _read_copy(config, model, workdir)._replace(perceptual=perceptual)
    conditioner: PyTree = {}
    if "diffusion" in config.stages:
        conditioner = read_conditioner(config, model)
    first_stage = None if trains_first else read_first_stage(config)
    return PretrainedWeights(perceptual, first_stage, conditioner)


def save_frozen(frozen_weights: PretrainedWeights, workdir: Path) -> None:
    """Copy the weights into the run's folder, if there are any and no copy yet.

    Raises:
      InputError: If the file cannot be written.
    """
    path = workdir / FROZEN_FILE
    if path.exists():
        return
    tree = {"conditioner": frozen_weights.conditioner}
    if frozen_weights.first_stage is not None:
        tree["autoencoder"], tree[LATENT_SCALE] = frozen_weights.first_stage
    if arrays := write_tree(tree, own_format):
        write_safetensors(path, arrays, run=workdir)


def load_frozen(
    config: Config, model: LatentDiffusion, workdir: Path
) -> PretrainedWeights:
    """Read the copy in a run's folder; empty if the run trains all its networks.

    Raises:
      InputError: If the copy is missing or damaged.
    """
    trains_all = config.diffusion.condition.trained or "diffusion" not in config.stages
    if config.first_stage is None and (
        trains_all or not jax.tree.leaves(param_shapes(init_conditioner, model))
    ):
        return PretrainedWeights(None, None, {})
    return _read_copy(config, model, workdir)


def _read_copy(
    config: Config, model: LatentDiffusion, workdir: Path
) -> PretrainedWeights:
    path, shapes = workdir / FROZEN_FILE, {}
    check_file(workdir, path)
    if config.first_stage is not None:
        shapes["autoencoder"] = param_shapes(init_autoencoder, model)
        shapes[LATENT_SCALE] = np.empty(())
    if not config.diffusion.condition.trained:
        shapes["conditioner"] = param_shapes(init_conditioner, model)
    tree = read_tree(shapes, own_format, open_tensors(path), what=str(path))
    first_stage = None
    if config.first_stage is not None:
        first_stage = (tree["autoencoder"], jnp.asarray(tree[LATENT_SCALE]))
    return PretrainedWeights(None, first_stage, tree.get("conditioner", {}))


def first_stage_of(
    config: Config, frozen_weights: PretrainedWeights, workdir: Path
) -> TrainedFirstStage:
    """Return the first stage of a run, its own or the one that it read.

    Raises:
      InputError: If it has no finished checkpoint, or its latent scale is damaged.
      RunError: If no checkpoint is intact.
    """
    if frozen_weights.first_stage is None:
        return load_first_stage(config, workdir)
    return TrainedFirstStage(*frozen_weights.first_stage, frozen_weights.digest)


def open_encoders(
    config: Config, model: LatentDiffusion, workdir: Path | None, *, states: bool
) -> Encoders:
    """Load the first stage and the frozen text encoder that make a latent cache.

    Args:
      workdir: Folder of the run; None to read the weights that the config names.
      states: Whether the text encoder is wanted.

    Raises:
      InputError: If stage 1 is not finished, or weights cannot be read.
    """
    keeps = "diffusion" in config.stages and config.diffusion.condition.freezes_text
    keeps = keeps and states
    if workdir is None:
        params, _ = read_first_stage(config)
        return Encoders(params, read_conditioner(config, model) if keeps else {})
    if (workdir / WEIGHTS_FILE).exists():
        raise InputError(
            f"--workdir: {workdir} holds weights, wanted a run of ldm train; try "
            f"--config FILE.py --first-stage {workdir}"
        )
    frozen_weights = load_frozen(config, model, workdir)
    params, scale, _ = first_stage_of(config, frozen_weights, workdir)
    if scale is None:
        raise InputError(
            f"--workdir: stage 1 of {workdir} is not finished; run ldm train there to "
            "its end first"
        )
    return Encoders(params, frozen_weights.conditioner if keeps else {})
