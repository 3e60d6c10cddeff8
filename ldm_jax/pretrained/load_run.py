"""Models ready to sample, loaded from a run's folder or from weights."""

from pathlib import Path
from typing import NamedTuple

import jax

from ldm_jax.build import build_model
from ldm_jax.config import Config, read_config
from ldm_jax.config.run import with_tokenizer
from ldm_jax.files import read_changes
from ldm_jax.latent_diffusion import LatentDiffusion, SampleParams, param_shapes
from ldm_jax.pretrained.first_stage import load_first_stage
from ldm_jax.pretrained.frozen import first_stage_of, load_frozen
from ldm_jax.pretrained.load_stage import load_second_stage
from ldm_jax.pretrained.model_weights import WEIGHTS_FILE, ModelWeights
from ldm_jax.pretrained.open_weights import open_weights, to_sample_params
from ldm_jax.pretrained.posthoc_ema import make_average
from ldm_jax.training.diffusion_stage import (
    averages_folder,
    init_diffusion_params,
    sample_params,
)
from ldm_jax.training.diffusion_step import FrozenParams
from ldm_jax.training.digest import run_digest, tree_digest
from ldm_jax.training.train_tokenizer import with_own_tokenizer
from ldm_jax.types import InputError


class Run(NamedTuple):
    """A trained model, ready to sample."""

    config: Config
    """Config that made it."""
    model: LatentDiffusion
    """The model that the config builds."""
    params: SampleParams
    """Averaged parameters of all networks, and the latent scale."""
    digest: str
    """Digest of the parameters' source; that of `final.json` for a finished run."""
    step: int
    """Step of the diffusion stage; 0 for weights."""


def load_run(
    workdir: str | Path,
    *,
    tokenizer: Path | None = None,
    step: int | None = None,
    ema_length: float | None = None,
) -> Run:
    """Load a run for sampling.

    Args:
      workdir: Folder of the run, or weights in our own format.
      tokenizer: Folder of the tokenizer, if it is not where the config says.
      step: Step of the diffusion stage; None for the newest checkpoint.
      ema_length: Relative length of a post-hoc EMA of the weights, made of the averages
        that the run kept; None for the EMA of training.

    Raises:
      InputError: If the folder is not a run, has no finished checkpoint, or kept no
        averages that the length can be made of.
      RunError: If no checkpoint is intact.
    """
    workdir = Path(workdir)
    if (workdir / WEIGHTS_FILE).exists():
        if ema_length is not None:
            raise InputError(
                f"--ema-length: got {ema_length:g} with {workdir}, which holds weights "
                "and no averages, wanted none"
            )
        return load_weights(workdir, tokenizer=tokenizer)
    config = read_config(workdir)
    config = with_tokenizer(with_own_tokenizer(config, workdir), tokenizer)
    if "diffusion" not in config.stages:
        raise InputError(
            f"--workdir: {workdir} is a run of an autoencoder alone, wanted one with a "
            "diffusion stage; try --first-stage with it in a run of a diffusion model"
        )
    model = build_model(config)
    frozen_weights = load_frozen(config, model, workdir)
    first = first_stage_of(config, frozen_weights, workdir)
    # Averages are kept longer than the checkpoint of their step.
    checkpoint_step = step if ema_length is None else None
    second = load_second_stage(config, model, workdir, step=checkpoint_step)
    scale = second.tree["extra"]["latent_scale"]
    frozen = FrozenParams(first.params, scale, frozen_weights.conditioner)
    trained, digest, found_step = second.tree["state"].ema, second.digest, second.step
    if ema_length is not None:
        average = make_average(
            averages_folder(workdir),
            param_shapes(init_diffusion_params, model),
            lengths=config.diffusion.average_lengths,
            length=ema_length,
            step=step,
            newest=second.step,
            run=workdir,
        )
        trained, found_step = average.tree, average.step
        digest = tree_digest(average.tree)
    return Run(
        config,
        model,
        jax.device_put(sample_params(frozen, trained)),
        run_digest(
            {"autoencoder": first.digest, "diffusion": digest},
            changes=read_changes(workdir),
        ),
        found_step,
    )


def load_weights(
    path: str | Path,
    *,
    config_file: Path | None = None,
    tokenizer: Path | None = None,
) -> Run:
    """Load weights of any format for sampling.

    Args:
      path: A diffusers folder, a CompVis file, or a folder of our own format.
      config_file: Config of a file that does not carry one.
      tokenizer: Folder of the tokenizer, if the weights have none.

    Raises:
      InputError: If the weights do not fit their config exactly.
    """
    opened = open_weights(Path(path), config_file=config_file, tokenizer=tokenizer)
    params = to_sample_params(opened.read())
    return Run(opened.config, opened.model, params, tree_digest(params), 0)


def run_weights(workdir: Path) -> ModelWeights:
    """Load the averaged parameters of a run for an export.

    Args:
      workdir: Folder of a run of one stage or both, or weights in our own format.

    Raises:
      InputError: If the folder is no run or has no finished checkpoint.
    """
    if (workdir / WEIGHTS_FILE).exists():
        return open_weights(workdir).read()
    config = read_config(workdir)
    if "diffusion" not in config.stages:
        params, scale, _ = load_first_stage(config, workdir)
        scale = None if scale is None else float(scale)
        return ModelWeights(config, params, None, {}, scale)
    run = load_run(workdir)
    autoencoder, unet, conditioner, scale = run.params
    return ModelWeights(run.config, autoencoder, unet, conditioner, float(scale))
