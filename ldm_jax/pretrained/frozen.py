"""What a run takes from elsewhere: checkpoints of a stage, and imported weights."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ldm_jax import config as config_lib
from ldm_jax.build import build_model, init_autoencoder, init_conditioner
from ldm_jax.config import Config
from ldm_jax.files import write_safetensors
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.pretrained.layouts import flatten
from ldm_jax.pretrained.load_weights import (
    different_autoencoder,
    import_conditioner,
    import_first_stage,
    is_run,
)
from ldm_jax.pretrained.metric_networks import load_lpips
from ldm_jax.pretrained.model import LATENT_SCALE, WEIGHTS_FILE, read_own
from ldm_jax.pretrained.tensors import match_keys, open_tensors
from ldm_jax.rng import root_key
from ldm_jax.training.autoencoder_stage import SCALE_FILE, autoencoder_stage
from ldm_jax.training.checkpoint import Checkpoint, CheckpointStore
from ldm_jax.training.diffusion_step import Frozen, FrozenWeights
from ldm_jax.training.latent_encoders import Encoders
from ldm_jax.training.loop import CHECKPOINTS, Stage, stage_target
from ldm_jax.types import InputError, PyTree

FROZEN_FILE = "taken.safetensors"


def read_frozen(config: Config, model: LatentDiffusion, workdir: Path) -> FrozenWeights:
    """Read all that a run needs and does not train.

    Args:
      workdir: Its folder; what an earlier start kept there counts, so that the run
        does not change when its sources do.

    Returns:
      What was read.

    Raises:
      InputError: If something is not given, not readable, or does not fit.
    """
    trains_first = config.first_stage is None
    perceptual = load_perceptual(config) if trains_first else None
    if (workdir / FROZEN_FILE).exists():
        return _read_kept(config, model, workdir)._replace(perceptual=perceptual)
    conditioner: PyTree = {}
    if "diffusion" in config.stages:
        conditioner = frozen_conditioner(config, model)
    first_stage = None if trains_first else read_first_stage(config)
    return FrozenWeights(perceptual, first_stage, conditioner)


def save_frozen(frozen_weights: FrozenWeights, workdir: Path) -> None:
    """Keep what was taken in the run's own folder, if anything was.

    Raises:
      InputError: If it cannot be written.
    """
    path = workdir / FROZEN_FILE
    if path.exists() or (
        frozen_weights.first_stage is None and not frozen_weights.conditioner
    ):
        return
    arrays = {
        f"conditioner/{k}": v for k, v in flatten(frozen_weights.conditioner).items()
    }
    if frozen_weights.first_stage is not None:
        params, scale = frozen_weights.first_stage
        arrays |= {f"autoencoder/{k}": v for k, v in flatten(params).items()}
        arrays[LATENT_SCALE] = scale
    write_safetensors(path, {k: np.asarray(v) for k, v in arrays.items()})


def load_frozen(config: Config, model: LatentDiffusion, workdir: Path) -> FrozenWeights:
    """Read what a run kept of what it took; nothing if it took nothing.

    Raises:
      InputError: If the file is missing, or damaged.
    """
    shapes = jax.eval_shape(lambda: init_conditioner(config, model))
    frozen = not config.diffusion.condition.trained and jax.tree.leaves(shapes)
    if config.first_stage is None and not frozen:
        return FrozenWeights(None, None, {})
    return _read_kept(config, model, workdir)


def _read_kept(config: Config, model: LatentDiffusion, workdir: Path) -> FrozenWeights:
    path = workdir / FROZEN_FILE
    tensors = open_tensors(path)
    wanted: dict[str, tuple[int, ...]] = {}
    frozen = not config.diffusion.condition.trained
    if config.first_stage is not None:
        tree = jax.eval_shape(lambda: init_autoencoder(config, model))
        wanted |= {f"autoencoder/{k}": v.shape for k, v in flatten(tree).items()}
        wanted[LATENT_SCALE] = ()
    if frozen:
        tree = jax.eval_shape(lambda: init_conditioner(config, model))
        wanted |= {f"conditioner/{k}": v.shape for k, v in flatten(tree).items()}
    match_keys(wanted, tensors, what=str(path))
    first_stage = None
    if config.first_stage is not None:
        scale = jnp.asarray(tensors[LATENT_SCALE], jnp.float32)
        first_stage = (read_own(tensors.under("autoencoder/")), scale)
    return FrozenWeights(None, first_stage, read_own(tensors.under("conditioner/")))


def load_stage(
    stage: Stage, workdir: Path, config: Config, *, step: int | None = None
) -> Checkpoint:
    """Load the newest intact checkpoint of a stage, or one step's, changing nothing.

    Raises:
      InputError: If it has none, or none of that step.
      RunError: If none is intact.
    """
    directory = workdir / stage.name / CHECKPOINTS
    found = None
    if directory.is_dir():
        store = CheckpointStore(directory, keep=config.checkpoint.keep, read_only=True)
        target = stage_target(stage, root_key(config.seed))
        found = store.restore(target, step=step)
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

    Returns:
      Its parameters; its latent scale, or None if that was not measured yet; and its
      digest.

    Raises:
      InputError: If it has no finished checkpoint.
      RunError: If no checkpoint is intact.
    """
    stage = autoencoder_stage(config, build_model(config), workdir)
    found = load_stage(stage, workdir, config)
    path = workdir / "autoencoder" / SCALE_FILE
    scale = None
    if path.exists():
        scale = jnp.asarray(json.loads(path.read_text())["latent_scale"], jnp.float32)
    return found.tree["state"].ema, scale, found.digest


def load_finished(config: Config, model: LatentDiffusion, workdir: Path) -> Frozen:
    """Load what stage 2 of a run learns with: its own first stage, or what it took.

    Returns:
      Its first stage, and its frozen conditioner if it has one.

    Raises:
      InputError: If stage 1 is not finished.
      RunError: If no checkpoint is intact.
    """
    frozen_weights = FrozenWeights(None, None, {})
    if "diffusion" in config.stages:
        frozen_weights = load_frozen(config, model, workdir)
    if frozen_weights.first_stage is not None:
        return Frozen(*frozen_weights.first_stage, frozen_weights.conditioner)
    params, scale, _ = load_first_stage(config, workdir)
    if scale is None:
        raise InputError(
            f"--workdir: stage 1 of {workdir} is not finished; run train.py there to "
            "its end first"
        )
    return Frozen(params, scale, frozen_weights.conditioner)


def read_first_stage(config: Config) -> tuple[PyTree, Float[Array, ""]]:
    """Take the autoencoder that `first_stage` names: of a finished run, or of weights.

    Args:
      config: Of the run that uses it.

    Returns:
      Its parameters and its latent scale.

    Raises:
      InputError: If there is none, it is another network, or its latent scale is not
        known or not the config's.
    """
    path, details = Path(str(config.first_stage)), None
    if is_run(path):
        theirs = config_lib.read_config(path)
        if different := different_autoencoder(theirs, config):
            raise InputError(
                f"first_stage: the autoencoder of {path} is another network: "
                f"{', '.join(different)}; try a config with the same values"
            )
        params, details, _ = load_first_stage(theirs, path)
        if details is None:
            raise InputError(
                f"first_stage: stage 1 of {path} is not finished; run train.py there "
                "to its end first"
            )
    else:
        params, details = import_first_stage(path, config)
    details = None if details is None else float(details)
    scale = config.autoencoder.latent_scale
    if scale is None and details is None:
        raise InputError(
            f"first_stage: the latent scale of {path} is not known, wanted a number; "
            "try --autoencoder.latent-scale"
        )
    if scale is not None and details is not None and abs(details / scale - 1.0) > 1e-3:
        raise InputError(
            f"first_stage: the latent scale of {path} is {details:.6g}, but the config "
            f"says {scale:.6g}; try --autoencoder.latent-scale {details!r}"
        )
    return params, jnp.asarray(details if scale is None else scale, jnp.float32)


def frozen_conditioner(config: Config, model: LatentDiffusion) -> PyTree:
    """Load a conditioner that is not trained; {} if it is, or has no parameters.

    Raises:
      InputError: If its weights are not given or do not fit.
    """
    condition = config.diffusion.condition
    shapes = jax.eval_shape(lambda: init_conditioner(config, model))
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
    return import_conditioner(Path(condition.weights), config)


def load_perceptual(config: Config) -> PyTree:
    """Read the parameters of LPIPS; None if a config does without.

    Raises:
      InputError: If it asks for LPIPS and the files are not given, not readable, or
        not those of LPIPS.
    """
    settings = config.autoencoder
    if not settings.perceptual_weight:
        return None
    if not settings.perceptual_files:
        raise InputError(
            "perceptual_files: got none, wanted the weights of VGG16 and of LPIPS' "
            "linear heads; try --autoencoder.perceptual-files FILE ..., "
            "--autoencoder.perceptual-weight 0, or --first-stage to train none"
        )
    return load_lpips(settings.perceptual_files)


def open_encoders(
    config: Config, model: LatentDiffusion, workdir: Path | None, *, states: bool
) -> Encoders:
    """Load the first stage, and a frozen text encoder if there is one.

    Args:
      workdir: Its folder; None to take what the config names.
      states: Whether a text encoder is asked for.

    Raises:
      InputError: If stage 1 is not finished, or something cannot be read.
    """
    keeps = "diffusion" in config.stages and config.diffusion.condition.freezes_text
    keeps = keeps and states
    if workdir is None:
        params, _ = read_first_stage(config)
        return Encoders(params, frozen_conditioner(config, model) if keeps else {})
    if (workdir / WEIGHTS_FILE).exists():
        raise InputError(
            f"--workdir: {workdir} holds weights, wanted a run of train.py; try "
            f"--config FILE.py --first-stage {workdir}"
        )
    frozen = load_finished(config, model, workdir)
    return Encoders(frozen.autoencoder, frozen.conditioner if keeps else {})
