"""A model read from a diffusers folder, or not at all."""

import json
from pathlib import Path

import numpy as np

from ldm_jax.config import Config
from ldm_jax.config import from_json as config_from_json
from ldm_jax.pretrained import diffusers
from ldm_jax.pretrained.assemble_config import assemble_config
from ldm_jax.pretrained.diffusers_configs import (
    read_autoencoder,
    read_clip,
    read_scheduler,
    read_unet,
)
from ldm_jax.pretrained.diffusers_folder import (
    SCHEDULERS,
    Component,
    Folder,
    component_tensors,
    open_folder,
)
from ldm_jax.pretrained.layouts import flatten, read_tree, unflatten
from ldm_jax.pretrained.model import (
    OWN_CONFIG,
    UNUSED_CONDITIONER,
    ModelWeights,
    Shapes,
)
from ldm_jax.pretrained.strict_json import read_json
from ldm_jax.pretrained.tensors import Tensors, match_keys, open_tensors
from ldm_jax.types import InputError, PyTree

AUTOENCODERS = ("AutoencoderKL", "VQModel")
UNETS = ("UNet2DModel", "UNet2DConditionModel")
TEXT_ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection")
TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")


def folder_config(folder: Folder) -> Config:
    """Read the config of a diffusers folder: ours if it is there, or theirs.

    Raises:
      InputError: If something in it is not built here.
    """
    own = folder.root / OWN_CONFIG
    if own.is_file():
        return config_from_json(json.dumps(read_json(own)))
    if folder.pipeline == "LDMTextToImagePipeline":
        raise InputError(
            f"{folder.root}: got a LDMTextToImagePipeline, whose text encoder is not "
            "read, wanted a StableDiffusionPipeline or LDMPipeline; try the original "
            "file with --config configs/ldm/text2img256_kl8_1p4b.py"
        )
    autoencoder = one_of(folder, AUTOENCODERS)
    unet = find_one(folder, UNETS)
    settings = read_unet(unet.class_name, unet.config) if unet else None
    reads_text = settings is not None and settings["context_width"] > 0
    clip = find_one(folder, TEXT_ENCODERS) if reads_text else None
    tokenizer = find_one(folder, TOKENIZERS) if clip else None
    scheduler = find_one(folder, SCHEDULERS) if unet else None
    _check_all_read(folder, (autoencoder, unet, clip, tokenizer, scheduler))
    return assemble_config(
        autoencoder=read_autoencoder(autoencoder.class_name, autoencoder.config),
        unet=settings,
        clip=read_clip(clip.class_name, clip.config) if clip else None,
        scheduler=(
            read_scheduler(scheduler.class_name, scheduler.config)
            if scheduler
            else None
        ),
        tokenizer=str(tokenizer.directory) if tokenizer else None,
    )


def _check_all_read(folder: Folder, read: tuple[Component | None, ...]) -> None:
    for component in folder.components.values():
        if component not in read:
            raise InputError(
                f"{folder.root}: got a {component.class_name} named {component.name}, "
                "which nothing beside it reads, wanted none; try the folder of a whole "
                "pipeline that is built here"
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


def find_one(folder: Folder, classes: tuple[str, ...]) -> Component | None:
    """Return the component of one of these classes; None if there is none."""
    for component in folder.components.values():
        if component.class_name in classes:
            return component
    return None


def one_of(folder: Folder, classes: tuple[str, ...]) -> Component:
    """Return the component of one of these classes.

    Raises:
      InputError: If there is none.
    """
    component = find_one(folder, classes)
    if component is None:
        raise InputError(
            f"{folder.root}: got {', '.join(folder.components) or 'nothing'}, wanted a "
            f"{' or '.join(classes)} among it; try the folder of the whole pipeline"
        )
    return component


def read_folder(folder: Folder, config: Config, shapes: Shapes) -> ModelWeights:
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
    unet = find_one(folder, UNETS)
    scale = read_autoencoder(autoencoder.class_name, autoencoder.config)["latent_scale"]
    return ModelWeights(
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
