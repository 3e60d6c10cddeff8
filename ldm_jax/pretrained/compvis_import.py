"""Import of a model from a checkpoint in CompVis naming."""

import re

import ml_dtypes
import numpy as np

from ldm_jax.build import build_schedule
from ldm_jax.config import Config, DiffusionConfig
from ldm_jax.diffusion.schedules import DiscreteSchedule
from ldm_jax.files import printable
from ldm_jax.pretrained import compvis_names
from ldm_jax.pretrained.clip_import import read_text_tree
from ldm_jax.pretrained.diffusers_names import text_tensors
from ldm_jax.pretrained.layouts import key_shapes, read_tree
from ldm_jax.pretrained.model_weights import (
    SCALE_TENSOR,
    ModelWeights,
    NetworkShapes,
    file_scale,
)
from ldm_jax.pretrained.tensor_entry import Entry
from ldm_jax.pretrained.tensors import NUM_NAMED, Tensors, warn_of_unused
from ldm_jax.types import InputError, PyTree

HALF_TYPES = {"BF16": ml_dtypes.bfloat16, "F16": np.float16}
"""Types of half precision by safetensors' name, the coarsest first."""
ABAR_TOLERANCE = 1e-4
"""Largest difference of two tables of noise levels, beside that of their precision."""
MATRIX_OF_ATTENTION = re.compile(r".*\.attn(_1|\.\d+)\.(q|k|v|proj_out)\.weight")
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
    scale = _latent_scale(tensors, config.autoencoder.latent_scale)
    if is_first_stage(tensors) or not shapes.unet:
        first = _first_stage(tensors, what=what)
        tree = _autoencoder(first, shapes.autoencoder, what=what)
        return ModelWeights(config, tree, None, {}, scale)
    tensors = _known_tensors(tensors, what=what)
    _check_levels(tensors, config.diffusion, what=what)
    autoencoder = tensors.under(compvis_names.AUTOENCODER_PREFIX)
    unet_format = compvis_names.unet_format(config.diffusion)
    unet = tensors.under(compvis_names.UNET_PREFIX)
    # Some files hold only the counters of the average.
    if any(key.startswith(compvis_names.UNET_AVERAGE_PREFIX) for key in tensors):
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
    prefix = compvis_names.AUTOENCODER_PREFIX
    return compvis_names.FIRST_STAGE_KEY in tensors or (
        f"{prefix}{compvis_names.FIRST_STAGE_KEY}" in tensors
        and not _holds_unet(tensors)
    )


def _holds_unet(tensors: Tensors) -> bool:
    prefixes = (compvis_names.UNET_PREFIX, compvis_names.UNET_AVERAGE_PREFIX)
    return any(key.startswith(prefixes) for key in tensors)


def _first_stage(tensors: Tensors, *, what: str) -> Tensors:
    """Return the first stage of any file, and name what is beside one alone."""
    if compvis_names.FIRST_STAGE_KEY not in tensors:
        return tensors.under(compvis_names.AUTOENCODER_PREFIX)
    parts = compvis_names.AUTOENCODER_PARTS
    unused = compvis_names.UNUSED_AUTOENCODER_PREFIXES
    beside = [key for key in tensors if not key.startswith((*parts, *unused))]
    warn_of_unused([key for key in beside if key != SCALE_TENSOR], what=what)
    entries = tensors.entries.items()
    return Tensors({key: entry for key, entry in entries if key.startswith(parts)})


def _latent_scale(tensors: Tensors, known: float | None) -> float | None:
    """Read the latent scale, or the known one if the file holds it rounded."""
    stated = file_scale(tensors)
    if stated is None or known is None:
        return stated
    stored = tensors.dtype(SCALE_TENSOR) if SCALE_TENSOR in tensors else ""
    rounded = np.asarray(known, HALF_TYPES.get(stored, np.float32))
    return known if rounded.astype(np.float32) == np.float32(stated) else stated


def _stored_precision(values: np.ndarray) -> float:
    """Return the relative precision of the coarsest type that holds all values.

    A file in float32 may hold values that were rounded to half precision before.
    """
    for dtype in HALF_TYPES.values():
        if np.array_equal(values.astype(dtype).astype(values.dtype), values):
            return float(ml_dtypes.finfo(dtype).eps)
    return 0.0


def _autoencoder(tensors: Tensors, shapes: PyTree, *, what: str) -> PyTree:
    kept = {
        key: _as_convolution(entry) if MATRIX_OF_ATTENTION.fullmatch(key) else entry
        for key, entry in tensors.entries.items()
        if not key.startswith(compvis_names.UNUSED_AUTOENCODER_PREFIXES)
    }
    format_ = compvis_names.autoencoder_format
    return read_tree(shapes, format_, Tensors(kept), what=what)


def _as_convolution(entry: Entry) -> Entry:
    """View a matrix as the 1x1 convolution that the original stores."""
    if len(entry.shape) != 2:
        return entry
    shape = (*entry.shape, 1, 1)
    return Entry(shape, entry.dtype, lambda: entry.read().reshape(shape))


def _conditioner(
    tensors: Tensors, config: Config, shapes: PyTree, *, what: str
) -> PyTree:
    condition = config.diffusion.condition
    autoencoder = tensors.under(compvis_names.AUTOENCODER_PREFIX)
    tensors = tensors.under(compvis_names.CONDITIONER_PREFIX)
    kept = {
        compvis_names.present_text_key(key): entry
        for key, entry in tensors.entries.items()
        # Inpainting models condition on the first stage: their file holds it twice.
        if key not in autoencoder
        and not key.startswith(compvis_names.UNUSED_AUTOENCODER_PREFIXES)
    }
    is_clip = condition.context == "clip"
    found = text_tensors(Tensors(kept), condition.clip if is_clip else None)
    if shapes and not found:
        raise InputError(
            f"{what}: got none of its tensors ({compvis_names.CONDITIONER_PREFIX}*), "
            "wanted the encoder of its condition; try a file of the whole model, or a "
            "diffusers folder with its text_encoder"
        )
    if condition.context == "class":
        found = _with_null_class(found, config.data.num_classes)
    if any("in_proj_" in key for key in found):
        found = Tensors.from_arrays(compvis_names.split_in_proj(found))
    format_ = compvis_names.conditioner_format(condition)
    if not is_clip:
        return read_tree(shapes, format_, found, what=what)
    # Beside the text encoder there may be a rescaler.
    rest = {name: tree for name, tree in shapes.items() if name != "encoder"}
    keys = key_shapes(rest, format_)
    others = Tensors({key: e for key, e in found.entries.items() if key in keys})
    texts = Tensors({key: e for key, e in found.entries.items() if key not in keys})
    encoder = read_text_tree(
        shapes["encoder"],
        lambda path: format_(("encoder", *path)),
        texts,
        condition.clip,
        what=what,
    )
    return {**read_tree(rest, format_, others, what=what), "encoder": encoder}


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


def _known_tensors(tensors: Tensors, *, what: str) -> Tensors:
    """Return the tensors of a latent diffusion model, and name the others in a warning.

    Other programs pass over what they do not know beside the networks, such as the
    state of a trainer; inside of a network nothing may be unknown.
    """
    tensors = compvis_names.with_usual_prefixes(tensors)
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
    if unknown and not _holds_unet(tensors):
        names = ", ".join(printable(key) for key in unknown[:NUM_NAMED])
        raise InputError(
            f"{what}: got {len(unknown)} keys that no latent diffusion checkpoint has: "
            f"{names}; try the folder or file of another format"
        )
    warn_of_unused(unknown, what=what)
    return tensors


def _check_levels(tensors: Tensors, diffusion: DiffusionConfig, *, what: str) -> None:
    if "alphas_cumprod" not in tensors:
        return
    theirs = tensors["alphas_cumprod"]
    schedule = build_schedule(diffusion)
    if not isinstance(schedule, DiscreteSchedule):
        raise InputError(
            f"{what}: got a table of noise levels (alphas_cumprod), wanted none with "
            f"schedule {diffusion.schedule}; try another --config"
        )
    ours = schedule.abar
    if theirs.shape != ours.shape:
        raise InputError(
            f"{what}: got noise levels (alphas_cumprod) of shape {theirs.shape}, "
            f"wanted the config's {ours.shape}; try another --config"
        )
    tolerance = ABAR_TOLERANCE + _stored_precision(theirs) * ours
    if not (np.abs(theirs - ours) <= tolerance).all():
        raise InputError(
            f"{what}: got noise levels (alphas_cumprod, last {theirs[-1]:.5g}) other "
            f"than the config's (last {ours[-1]:.5g}); try another --config"
        )
