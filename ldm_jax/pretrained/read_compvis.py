"""A model read from a file in CompVis naming, or not at all."""

import re

import numpy as np

from ldm_jax.config import Config
from ldm_jax.diffusion.schedules import make_schedule
from ldm_jax.pretrained import compvis
from ldm_jax.pretrained.layouts import key_shapes, read_tree
from ldm_jax.pretrained.model import (
    SCALE_TENSOR,
    UNUSED_CONDITIONER,
    ModelWeights,
    Shapes,
    file_scale,
)
from ldm_jax.pretrained.tensors import Entry, Tensors
from ldm_jax.types import InputError, PyTree

ABAR_TOLERANCE = 1e-4
SCHEDULE_BUFFERS = re.compile(
    r"(betas|(sqrt_|log_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?|"
    r"sqrt_recip(m1)?_alphas_cumprod|posterior_\w+|lvlb_weights|logvar|global_step)"
)
"""Top-level tensors of a CompVis checkpoint that follow from its config."""


def read_compvis(
    tensors: Tensors, config: Config, shapes: Shapes, *, what: str
) -> ModelWeights:
    """Read every parameter of a checkpoint in CompVis naming.

    The average of the UNet is taken where the file has one, as the original samples.

    Args:
      tensors: Of the file: a whole model, or a first stage alone.
      config: Ours; a wrong one is noticed by keys, shapes and noise levels.
      shapes: Of the networks that the config builds.
      what: What to call it in an error.

    Returns:
      The model.

    Raises:
      InputError: If a tensor is missing, unexpected, or of another shape, or the noise
        levels are others.
    """
    if is_first_stage(tensors):
        tree = _compvis_autoencoder(tensors, config, shapes.autoencoder, what=what)
        return ModelWeights(config, tree, None, {}, file_scale(tensors))
    _check_rest(tensors, what=what)
    _check_levels(tensors, config, what=what)
    unet_format = compvis.unet_format(config)
    unet_tensors = tensors.under(compvis.UNET_PREFIX)
    # Some files keep only the counters of the average.
    if any(key.startswith(f"{compvis.EMA_PREFIX}diffusion_model") for key in tensors):
        unet_tensors = _averages(tensors, list(key_shapes(shapes.unet, unet_format)))
    return ModelWeights(
        config,
        _compvis_autoencoder(
            tensors.under(compvis.AUTOENCODER_PREFIX),
            config,
            shapes.autoencoder,
            what=f"{what}: first stage",
        ),
        read_tree(shapes.unet, unet_format, unet_tensors, what=f"{what}: UNet"),
        _compvis_conditioner(tensors, config, shapes.conditioner, what=what),
        file_scale(tensors),
    )


def is_first_stage(tensors: Tensors) -> bool:
    """Tell whether a file in CompVis naming is a first stage alone."""
    return "encoder.conv_in.weight" in tensors


def _compvis_autoencoder(
    tensors: Tensors, config: Config, shapes: PyTree, *, what: str
) -> PyTree:
    kept = {k: e for k, e in tensors.entries.items() if not k.startswith("loss.")}
    format_ = compvis.autoencoder_format(config)
    return read_tree(shapes, format_, Tensors(kept), what=what)


def _compvis_conditioner(
    tensors: Tensors, config: Config, shapes: PyTree, *, what: str
) -> PyTree:
    first_stage = tensors.under(compvis.AUTOENCODER_PREFIX)
    tensors = tensors.under(compvis.CONDITIONER_PREFIX)
    pooled = config.diffusion.condition.clip.output == "pooled"
    kept = {
        key: entry
        for key, entry in tensors.entries.items()
        if not UNUSED_CONDITIONER.fullmatch(key)
        and (pooled or key != "model.text_projection")
        # Inpainting conditions on the first stage, which its file then holds twice.
        and key not in first_stage
    }
    found = _with_null_class(Tensors(kept), config)
    if any("in_proj_" in key for key in found):
        found = Tensors.from_arrays(compvis.split_in_proj(found))
    format_ = compvis.conditioner_format(config)
    return read_tree(shapes, format_, found, what=f"{what}: conditioner")


def _with_null_class(tensors: Tensors, config: Config) -> Tensors:
    """Append a null class of zeros where a class model was trained without one."""
    key, num_classes = "embedding.weight", config.data.num_classes
    is_class = config.diffusion.condition.context == "class"
    if not is_class or key not in tensors or len(tensors.shape(key)) != 2:
        return tensors
    if tensors.shape(key)[0] != num_classes:
        return tensors
    padded = Tensors.from_arrays({key: np.pad(tensors[key], ((0, 1), (0, 0)))})
    return Tensors({**tensors.entries, **padded.entries}, tensors.metadata)


def _averages(tensors: Tensors, keys: list[str]) -> Tensors:
    """Rename the averages of a UNet to its parameters; a missing one is noticed."""
    entries: dict[str, Entry] = {}
    for key in keys:
        name = compvis.EMA_PREFIX + compvis.ema_key(key)
        if name in tensors:
            entries[key] = tensors.entries[name]
    return Tensors(entries)


def _check_rest(tensors: Tensors, *, what: str) -> None:
    prefixes = (
        compvis.UNET_PREFIX,
        compvis.AUTOENCODER_PREFIX,
        compvis.CONDITIONER_PREFIX,
        compvis.EMA_PREFIX,
    )
    strange = [
        key
        for key in tensors
        if not key.startswith(prefixes)
        and not SCHEDULE_BUFFERS.fullmatch(key)
        and key != SCALE_TENSOR
    ]
    if strange:
        raise InputError(
            f"{what}: {len(strange)} keys are none of a latent diffusion checkpoint: "
            f"{', '.join(strange[:10])}; try the folder or file of another format"
        )


def _check_levels(tensors: Tensors, config: Config, *, what: str) -> None:
    if "alphas_cumprod" not in tensors:
        return
    settings = config.diffusion
    theirs = tensors["alphas_cumprod"]
    if settings.schedule == "flow" or settings.schedule == "edm":
        raise InputError(
            f"{what}: got a table of noise levels (alphas_cumprod), wanted none with "
            f"schedule {settings.schedule}; try another --config"
        )
    schedule = make_schedule(
        settings.schedule,
        num_timesteps=settings.num_timesteps,
        beta_start=settings.beta_start,
        beta_end=settings.beta_end,
        zero_terminal_snr=settings.zero_terminal_snr,
    )
    ours = schedule.abar
    if theirs.shape != ours.shape or np.abs(theirs - ours).max() > ABAR_TOLERANCE:
        raise InputError(
            f"{what}: its noise levels (alphas_cumprod, last {theirs[-1]:.5g}) are "
            f"not the config's (last {ours[-1]:.5g}); try another --config"
        )
