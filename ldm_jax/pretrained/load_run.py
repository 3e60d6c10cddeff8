"""Models read from disk: the checkpoints of a run, or weights from elsewhere."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ldm_jax import config as config_lib
from ldm_jax.build import build_model, shape_of
from ldm_jax.config import Config
from ldm_jax.config.run import with_tokenizer
from ldm_jax.latent_diffusion import LatentDiffusion, SampleParams
from ldm_jax.pretrained.frozen import load_first_stage, load_frozen, load_stage
from ldm_jax.pretrained.load_weights import open_weights, to_sample_params
from ldm_jax.pretrained.model import WEIGHTS_FILE, ModelWeights
from ldm_jax.pretrained.posthoc_ema import make_average
from ldm_jax.training.diffusion_stage import (
    averages_folder,
    diffusion_stage,
    init_denoising,
    sample_params,
)
from ldm_jax.training.diffusion_step import Frozen
from ldm_jax.training.digest import tree_digest
from ldm_jax.training.train_tokenizer import with_own_tokenizer
from ldm_jax.types import InputError

STAGE_NAMES = ("autoencoder", "diffusion")


class Run(NamedTuple):
    """A trained run, ready to sample."""

    config: Config
    """The config that made it."""
    model: LatentDiffusion
    """Built from it."""
    params: SampleParams
    """Averaged parameters of both stages, and the latent scale."""
    digest: str
    """Of the state the parameters were taken from; that of `final.json` once the run is
    finished."""
    step: int
    """Diffusion step they were taken at."""


def load_run(
    workdir: str | Path,
    *,
    tokenizer: Path | None = None,
    step: int | None = None,
    ema_length: float | None = None,
) -> Run:
    """Load the newest checkpoint of a run for sampling, or an earlier one.

    Args:
      workdir: The folder that was given to `train.py`.
      tokenizer: Folder of the tokenizer, if it is not where the config says.
      step: Of the diffusion stage; None for the newest.
      ema_length: Relative length of the average of the weights, made of those that the
        run kept on its way; None for the average that training used.

    Returns:
      The run.

    Raises:
      InputError: If the folder is not a run or has no finished checkpoint, or kept no
        averages that the length could be made of.
      RunError: If no checkpoint is intact.
    """
    workdir = Path(workdir)
    if (workdir / WEIGHTS_FILE).exists():
        if ema_length is not None:
            raise InputError(
                f"--ema-length: got {ema_length:g}, but {workdir} holds weights alone, "
                "wanted none"
            )
        return load_weights(workdir, tokenizer=tokenizer)
    config = config_lib.read_config(workdir)
    config = with_tokenizer(with_own_tokenizer(config, workdir), tokenizer)
    if "diffusion" not in config.stages:
        raise InputError(
            f"--workdir: {workdir} is a run of an autoencoder alone, wanted one with a "
            "diffusion stage; try --first-stage with it in a run of a diffusion model"
        )
    model = build_model(config)
    frozen_weights = load_frozen(config, model, workdir)
    if frozen_weights.first_stage is None:
        params, scale, digest = load_first_stage(config, workdir)
    else:
        params, scale = frozen_weights.first_stage
        digest = tree_digest(frozen_weights[1:])
    shapes = Frozen(jax.eval_shape(lambda: params), shape_of((), jnp.float32), {})
    stage = diffusion_stage(config, model, shapes, workdir)
    # Averages outlive the checkpoint of their step.
    at = step if ema_length is None else None
    second = load_stage(stage, workdir, config, step=at)
    scale = second.tree["extra"]["latent_scale"]
    frozen = Frozen(params, scale, frozen_weights.conditioner)
    trained, of, at = second.tree["state"].ema, second.digest, second.step
    if ema_length is not None:
        made = make_average(
            averages_folder(workdir),
            jax.eval_shape(lambda: init_denoising(config, model)),
            lengths=config.diffusion.average_lengths,
            length=ema_length,
            step=step,
            newest=second.step,
        )
        trained, of, at = made.tree, tree_digest(made.tree), made.step
    return Run(
        config,
        model,
        jax.device_put(sample_params(frozen, trained)),
        run_digest({"autoencoder": digest, "diffusion": of}),
        at,
    )


def load_weights(
    path: str | Path,
    *,
    config_file: Path | None = None,
    tokenizer: Path | None = None,
) -> Run:
    """Load weights from elsewhere for sampling.

    Args:
      path: A diffusers folder, or a file in CompVis naming.
      config_file: Config of a file that does not carry one.
      tokenizer: Folder of the tokenizer, where the weights have none.

    Returns:
      The run; its step is 0.

    Raises:
      InputError: If the weights are not exactly those of their config.
    """
    opened = open_weights(Path(path), config_file=config_file, tokenizer=tokenizer)
    params = to_sample_params(opened.read())
    return Run(opened.config, opened.model, params, tree_digest(params), 0)


def run_model(workdir: Path) -> ModelWeights:
    """Take the averaged parameters of a run, for writing them elsewhere.

    Args:
      workdir: Folder of a run of one stage or both, or of imported weights.

    Returns:
      The model.

    Raises:
      InputError: If the folder is no run or has no finished checkpoint.
    """
    if (workdir / WEIGHTS_FILE).exists():
        return open_weights(workdir).read()
    config = config_lib.read_config(workdir)
    if "diffusion" not in config.stages:
        params, scale, _ = load_first_stage(config, workdir)
        return ModelWeights(
            config, params, None, {}, None if scale is None else float(scale)
        )
    run = load_run(workdir)
    params = run.params
    scale = float(params.latent_scale)
    parts = (params.autoencoder, params.unet, params.conditioner)
    return ModelWeights(run.config, *parts, scale)


def run_digest(digest_by_stage: dict[str, str]) -> str:
    """Join the digests of the stages into one sha256."""
    text = "".join(
        f"{name} {digest_by_stage[name]}\n"
        for name in STAGE_NAMES
        if name in digest_by_stage
    )
    return hashlib.sha256(text.encode()).hexdigest()
