"""Import of a model from a checkpoint in CompVis naming."""

import re

import numpy as np

from ldm_jax.config import Config, DiffusionConfig
from ldm_jax.diffusion.schedules import make_schedule
from ldm_jax.pretrained import compvis_names
from ldm_jax.pretrained.diffusers_names import UNUSED_TEXT_TENSORS
from ldm_jax.pretrained.layouts import key_shapes, read_tree
from ldm_jax.pretrained.model_weights import (
    SCALE_TENSOR,
    ModelWeights,
    NetworkShapes,
    file_scale,
)
from ldm_jax.pretrained.tensors import Tensors
from ldm_jax.types import InputError, PyTree

ABAR_TOLERANCE = 1e-4
SCHEDULE_BUFFERS = re.compile(
    r"(betas|(sqrt_|log_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?|"
    r"sqrt_recip(m1)?_alphas_cumprod|posterior_\w+|lvlb_weights|logvar|global_step)"
)
"""Top-level tensors of a checkpoint that follow from its config."""


def read_compvis(
    tensors: Tensors, config: Config, shapes: NetworkShapes, *, what: str
) -> ModelWeights:
    """Read every parameter of a checkpoint in CompVis naming.

    If the file has the UNet's average, that is read, as the original sampler does.

    Args:
      tensors: A whole model, or a first stage alone.
      config: Config of the model; a wrong one fails by keys, shapes or noise levels.
      what: Name of the tensors in an error.

    Raises:
      InputError: If a tensor is missing, unexpected, or of another shape, or the noise
        levels differ from the config's.
    """
    scale = file_scale(tensors)
    if is_first_stage(tensors):
        tree = _autoencoder(tensors, shapes.autoencoder, what=what)
        return ModelWeights(config, tree, None, {}, scale)
    _check_keys(tensors, what=what)
    _check_levels(tensors, config.diffusion, what=what)
    autoencoder = tensors.under(compvis_names.AUTOENCODER_PREFIX)
    unet_format = compvis_names.unet_format(config.diffusion)
    unet = tensors.under(compvis_names.UNET_PREFIX)
    # Some files hold only the counters of the average.
    average = f"{compvis_names.EMA_PREFIX}diffusion_model"
    if any(key.startswith(average) for key in tensors):
        unet = _averages(tensors, list(key_shapes(shapes.unet, unet_format)))
    return ModelWeights(
        config,
        _autoencoder(autoencoder, shapes.autoencoder, what=f"{what}: first stage"),
        read_tree(shapes.unet, unet_format, unet, what=f"{what}: UNet"),
        _conditioner(tensors, config, shapes.conditioner, what=f"{what}: conditioner"),
        scale,
    )


def is_first_stage(tensors: Tensors) -> bool:
    """Return whether a file in CompVis naming holds a first stage alone."""
    return "encoder.conv_in.weight" in tensors


def _autoencoder(tensors: Tensors, shapes: PyTree, *, what: str) -> PyTree:
    entries = tensors.entries.items()
    kept = Tensors({k: entry for k, entry in entries if not k.startswith("loss.")})
    return read_tree(shapes, compvis_names.autoencoder_format, kept, what=what)


def _conditioner(
    tensors: Tensors, config: Config, shapes: PyTree, *, what: str
) -> PyTree:
    condition = config.diffusion.condition
    autoencoder = tensors.under(compvis_names.AUTOENCODER_PREFIX)
    tensors = tensors.under(compvis_names.CONDITIONER_PREFIX)
    kept = {
        key: entry
        for key, entry in tensors.entries.items()
        if not UNUSED_TEXT_TENSORS.fullmatch(key)
        and (condition.clip.output == "pooled" or key != "model.text_projection")
        # Inpainting models condition on the first stage: their file holds it twice.
        and key not in autoencoder
    }
    found = Tensors(kept)
    if condition.context == "class":
        found = _with_null_class(found, config.data.num_classes)
    if any("in_proj_" in key for key in found):
        found = Tensors.from_arrays(compvis_names.split_in_proj(found))
    format_ = compvis_names.conditioner_format(condition)
    return read_tree(shapes, format_, found, what=what)


def _with_null_class(tensors: Tensors, num_classes: int) -> Tensors:
    """Append a null class of zeros if the model was trained without one."""
    key = "embedding.weight"
    if key not in tensors or len(tensors.shape(key)) != 2:
        return tensors
    if tensors.shape(key)[0] != num_classes:
        return tensors
    padded = Tensors.from_arrays({key: np.pad(tensors[key], ((0, 1), (0, 0)))})
    return Tensors({**tensors.entries, **padded.entries}, tensors.metadata)


def _averages(tensors: Tensors, keys: list[str]) -> Tensors:
    """Rename a UNet's averages to its parameters; a missing average stays missing."""
    names = {key: compvis_names.EMA_PREFIX + compvis_names.ema_key(key) for key in keys}
    return Tensors(
        {k: tensors.entries[name] for k, name in names.items() if name in tensors}
    )


def _check_keys(tensors: Tensors, *, what: str) -> None:
    prefixes = (
        compvis_names.UNET_PREFIX,
        compvis_names.AUTOENCODER_PREFIX,
        compvis_names.CONDITIONER_PREFIX,
        compvis_names.EMA_PREFIX,
    )
    unknown = [
        key
        for key in tensors
        if not key.startswith(prefixes)
        and not SCHEDULE_BUFFERS.fullmatch(key)
        and key != SCALE_TENSOR
    ]
    if unknown:
        raise InputError(
            f"{what}: got {len(unknown)} keys that no latent diffusion checkpoint has: "
            f"{', '.join(unknown[:10])}; try the folder or file of another format"
        )


def _check_levels(tensors: Tensors, diffusion: DiffusionConfig, *, what: str) -> None:
    if "alphas_cumprod" not in tensors:
        return
    theirs = tensors["alphas_cumprod"]
    if diffusion.schedule == "flow" or diffusion.schedule == "edm":
        raise InputError(
            f"{what}: got a table of noise levels (alphas_cumprod), wanted none with "
            f"schedule {diffusion.schedule}; try another --config"
        )
    schedule = make_schedule(
        diffusion.schedule,
        num_timesteps=diffusion.num_timesteps,
        beta_start=diffusion.beta_start,
        beta_end=diffusion.beta_end,
        zero_terminal_snr=diffusion.zero_terminal_snr,
    )
    ours = schedule.abar
    if theirs.shape != ours.shape or np.abs(theirs - ours).max() > ABAR_TOLERANCE:
        raise InputError(
            f"{what}: got noise levels (alphas_cumprod, last {theirs[-1]:.5g}) other "
            f"than the config's (last {ours[-1]:.5g}); try another --config"
        )
