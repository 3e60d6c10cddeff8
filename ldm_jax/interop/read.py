"""A whole model read from a stranger's folder or file, or not at all."""

import dataclasses
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ldm_jax.config import Config
from ldm_jax.config import from_json as config_from_json
from ldm_jax.interop import compvis, diffusers
from ldm_jax.interop.assemble import assemble_config
from ldm_jax.interop.folders import Component, Folder, component_tensors, open_folder
from ldm_jax.interop.model_configs import (
    read_autoencoder,
    read_clip,
    read_scheduler,
    read_unet,
)
from ldm_jax.interop.names import flatten, key_shapes, read_tree, unflatten
from ldm_jax.interop.weights import Entry, Tensors, match_keys, open_tensors
from ldm_jax.types import InputError, PyTree

CONFIG_METADATA = "ldm_jax.config"
SCALE_METADATA = "ldm_jax.latent_scale"
OWN_CONFIG = "ldm_jax.json"
AUTOENCODERS = ("AutoencoderKL", "VQModel")
UNETS = ("UNet2DModel", "UNet2DConditionModel")
TEXT_ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection")
TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
ABAR_TOLERANCE = 1e-4

SCHEDULE_BUFFERS = re.compile(
    r"(betas|(sqrt_|log_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?|"
    r"sqrt_recip(m1)?_alphas_cumprod|posterior_\w+|lvlb_weights|logvar|global_step)"
)
"""Top-level tensors of a CompVis checkpoint that follow from its config."""
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


def folder_config(folder: Folder) -> Config:
    """Read the config of a diffusers folder: ours if it is there, or theirs.

    Raises:
      InputError: If something in it is not built here.
    """
    own = folder.root / OWN_CONFIG
    if own.is_file():
        return config_from_json(own.read_text())
    autoencoder = one_of(folder, AUTOENCODERS)
    unet = one_of(folder, UNETS, required=False)
    clip = one_of(folder, TEXT_ENCODERS, required=False)
    tokenizer = one_of(folder, TOKENIZERS, required=False)
    scheduler = next(
        (c for c in folder.components.values() if c.class_name.endswith("Scheduler")),
        None,
    )
    return assemble_config(
        autoencoder=read_autoencoder(autoencoder.class_name, autoencoder.config),
        unet=read_unet(unet.class_name, unet.config) if unet else None,
        clip=read_clip(clip.class_name, clip.config) if clip else None,
        scheduler=(
            read_scheduler(scheduler.class_name, scheduler.config)
            if scheduler
            else None
        ),
        tokenizer=str(tokenizer.directory) if tokenizer else None,
    )


def open_any_folder(path: Path) -> Folder:
    """Open a diffusers folder, one model of it, or models side by side.

    Raises:
      InputError: If there is none.
    """
    if (path / "model_index.json").exists() or not (path / OWN_CONFIG).exists():
        return open_folder(path)
    components: dict[str, Component] = {}
    for part in sorted(path.iterdir()):
        if (part / "config.json").exists():
            components |= open_folder(part).components
    return Folder(path, None, components)


def one_of(
    folder: Folder, classes: tuple[str, ...], *, required: bool = True
) -> Component | None:
    """Return the component of one of these classes.

    Raises:
      InputError: If it is required and there is none.
    """
    for component in folder.components.values():
        if component.class_name in classes:
            return component
    if required:
        raise InputError(
            f"{folder.root}: got {', '.join(folder.components) or 'nothing'}, wanted a "
            f"{' or '.join(classes)} among it; try the folder of the whole pipeline"
        )
    return None


def read_folder(folder: Folder, config: Config, shapes: Shapes) -> Model:
    """Read every parameter of a diffusers folder.

    Args:
      folder: What is in it.
      config: Its own.
      shapes: Of the networks that the config builds.

    Returns:
      The model.

    Raises:
      InputError: If a tensor is missing, unexpected, or of another shape.
    """
    autoencoder = one_of(folder, AUTOENCODERS)
    unet = one_of(folder, UNETS, required=False)
    scale = read_autoencoder(autoencoder.class_name, autoencoder.config)["latent_scale"]
    return Model(
        config,
        read_autoencoder_component(autoencoder, config, shapes.autoencoder),
        None
        if unet is None
        else read_tree(
            shapes.unet,
            diffusers.unet_format(config),
            component_tensors(unet),
            what=str(unet.directory),
        ),
        _folder_conditioner(folder, config, shapes.conditioner),
        scale,
    )


def read_autoencoder_component(
    component: Component, config: Config, shapes: PyTree
) -> PyTree:
    """Read an autoencoder of diffusers, of any age.

    Raises:
      InputError: If a tensor is missing, unexpected, or of another shape.
    """
    tensors = component_tensors(component)
    renamed = {
        diffusers.rename_old_attention(key): entry
        for key, entry in tensors.entries.items()
    }
    return read_tree(
        shapes,
        diffusers.autoencoder_format(config),
        Tensors(renamed),
        what=str(component.directory),
    )


def _folder_conditioner(folder: Folder, config: Config, shapes: PyTree) -> PyTree:
    if not shapes:
        return {}
    own = folder.root / "conditioner" / "model.safetensors"
    if own.is_file():
        return read_own(own, shapes)
    clip = one_of(folder, TEXT_ENCODERS)
    encoder = read_clip_tensors(
        component_tensors(clip), config, shapes["encoder"], what=str(clip.directory)
    )
    return {"encoder": encoder}


def read_own(path: Path, shapes: PyTree) -> PyTree:
    """Read a conditioner that no class of diffusers holds, by our own names.

    Raises:
      InputError: If a tensor is missing, unexpected, or of another shape.
    """
    tensors = open_tensors(path)
    wanted = {key: leaf.shape for key, leaf in flatten(shapes).items()}
    match_keys(wanted, tensors, what=str(path))
    return unflatten({key: tensors[key] for key in tensors})


def read_clip_tensors(
    tensors: Tensors, config: Config, shapes: PyTree, *, what: str
) -> PyTree:
    """Read CLIP's text encoder in transformers' naming, with or without its prefix.

    A model that uses the layer before the last may come without the last one, which
    is then zero here: nothing reads it.

    Args:
      tensors: Of the file; a whole CLIP's will do.
      config: Ours.
      shapes: Of our encoder.
      what: What to call it in an error.

    Returns:
      Our encoder's parameters.

    Raises:
      InputError: If a tensor is missing, unexpected, or of another shape.
    """
    clip = config.diffusion.condition.clip
    prefix = "text_model." if any(k.startswith("text_model.") for k in tensors) else ""
    keep = {
        key: entry
        for key, entry in tensors.entries.items()
        if not UNUSED_CONDITIONER.fullmatch(key)
        and not key.startswith(("vision_model.", "visual_projection."))
        and (clip.output == "pooled" or key != "text_projection.weight")
    }
    last = f"layer_{clip.depth - 1}"
    missing = not any(
        key.startswith(f"{prefix}encoder.layers.{clip.depth - 1}.") for key in keep
    )
    if clip.output == "penultimate" and missing:
        shapes, unused = dict(shapes), shapes[last]
        del shapes[last]
        tree = read_tree(
            shapes, diffusers.clip_format(prefix), Tensors(keep), what=what
        )
        return {**tree, last: _zeros(unused)}
    return read_tree(shapes, diffusers.clip_format(prefix), Tensors(keep), what=what)


def _zeros(shapes: PyTree) -> PyTree:
    if isinstance(shapes, dict):
        return {name: _zeros(value) for name, value in shapes.items()}
    return np.zeros(shapes.shape, np.float32)


def read_compvis(
    tensors: Tensors, config: Config, shapes: Shapes, *, what: str
) -> Model:
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
    if "encoder.conv_in.weight" in tensors:
        tree = _compvis_autoencoder(tensors, config, shapes.autoencoder, what=what)
        return Model(config, tree, None, {}, None)
    _check_rest(tensors, what=what)
    _check_levels(tensors, config, what=what)
    unet_format = compvis.unet_format(config)
    unet_tensors = tensors.under(compvis.UNET_PREFIX)
    if any(key.startswith(compvis.EMA_PREFIX) for key in tensors):
        unet_tensors = _averages(tensors, list(key_shapes(shapes.unet, unet_format)))
    scale: float | None = None
    if "scale_factor" in tensors:
        scale = float(tensors["scale_factor"])
    return Model(
        config,
        _compvis_autoencoder(
            tensors.under(compvis.AUTOENCODER_PREFIX),
            config,
            shapes.autoencoder,
            what=f"{what}: first stage",
        ),
        read_tree(shapes.unet, unet_format, unet_tensors, what=f"{what}: UNet"),
        _compvis_conditioner(tensors, config, shapes.conditioner, what=what),
        scale,
    )


def _compvis_autoencoder(
    tensors: Tensors, config: Config, shapes: PyTree, *, what: str
) -> PyTree:
    kept = {k: e for k, e in tensors.entries.items() if not k.startswith("loss.")}
    format_ = compvis.autoencoder_format(config)
    return read_tree(shapes, format_, Tensors(kept), what=what)


def _compvis_conditioner(
    tensors: Tensors, config: Config, shapes: PyTree, *, what: str
) -> PyTree:
    tensors = tensors.under(compvis.CONDITIONER_PREFIX)
    pooled = config.diffusion.condition.clip.output == "pooled"
    kept = {
        key: entry
        for key, entry in tensors.entries.items()
        if not UNUSED_CONDITIONER.fullmatch(key)
        and (pooled or key != "model.text_projection")
    }
    found = Tensors(kept)
    if any("in_proj_" in key for key in found):
        found = Tensors.from_arrays(compvis.split_in_proj(found))
    format_ = compvis.conditioner_format(config)
    return read_tree(shapes, format_, found, what=f"{what}: conditioner")


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
        and key != "scale_factor"
    ]
    if strange:
        raise InputError(
            f"{what}: {len(strange)} keys are none of a latent diffusion checkpoint: "
            f"{', '.join(strange[:10])}; try the folder or file of another format"
        )


def _check_levels(tensors: Tensors, config: Config, *, what: str) -> None:
    if "alphas_cumprod" not in tensors:
        return
    from ldm_jax.diffusion.schedules import make_schedule

    settings = config.diffusion
    schedule = make_schedule(
        settings.schedule,
        num_timesteps=settings.num_timesteps,
        beta_start=settings.beta_start,
        beta_end=settings.beta_end,
    )
    theirs = tensors["alphas_cumprod"]
    ours = schedule.abar
    if theirs.shape != ours.shape or np.abs(theirs - ours).max() > ABAR_TOLERANCE:
        raise InputError(
            f"{what}: its noise levels (alphas_cumprod, last {theirs[-1]:.5g}) are "
            f"not the config's (last {ours[-1]:.5g}); try another --config"
        )


def file_config(tensors: Tensors) -> Config | None:
    """Read the config that a file carries, if it was written here."""
    text = tensors.metadata.get(CONFIG_METADATA)
    return None if text is None else config_from_json(text)


def file_scale(tensors: Tensors) -> float | None:
    """Read the latent scale that a file carries, if it was written here."""
    text = tensors.metadata.get(SCALE_METADATA)
    return None if text is None else float(text)


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
