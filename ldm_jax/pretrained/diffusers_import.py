"""Import of a model from a diffusers folder: its config and its parameters."""

import json

from ldm_jax.config import (
    AutoencoderConfig,
    ClipConfig,
    ConditionConfig,
    Config,
    DataConfig,
    DiffusionConfig,
    PreviewConfig,
)
from ldm_jax.config import from_json as config_from_json
from ldm_jax.config.condition import ContextName
from ldm_jax.files import read_json
from ldm_jax.pretrained import diffusers_names
from ldm_jax.pretrained.clip_import import read_clip_component
from ldm_jax.pretrained.contained_path import contained
from ldm_jax.pretrained.diffusers_configs import (
    FieldValues,
    diffusers_version,
    read_autoencoder,
    read_clip,
    read_scheduler,
    read_unet,
)
from ldm_jax.pretrained.diffusers_folder import (
    AUTOENCODERS,
    CLIP_TOKENIZERS,
    OWN_CONFIG,
    TEXT_ENCODERS,
    UNETS,
    Component,
    Folder,
    component_tensors,
)
from ldm_jax.pretrained.layouts import Format, own_format, read_tree, used_tensors
from ldm_jax.pretrained.model_weights import ModelWeights, NetworkShapes
from ldm_jax.pretrained.tensors import open_tensors
from ldm_jax.types import InputError, PyTree

SD_LATENT_SIDE = 64

OWN_CONDITIONER = "conditioner"
"""Folder of a conditioner that no class of diffusers holds."""


def folder_config(folder: Folder) -> Config:
    """Read the config of a diffusers folder: ours if it holds one, else theirs.

    Raises:
      InputError: If it holds something that is not supported.
    """
    own = contained(folder.root, OWN_CONFIG)
    if own.is_file():
        return config_from_json(json.dumps(read_json(own)))
    if folder.pipeline == "LDMTextToImagePipeline":
        raise InputError(
            f"{folder.root}: got a LDMTextToImagePipeline, whose text encoder is not "
            "supported, wanted a StableDiffusionPipeline or LDMPipeline; try the "
            "original file with --config ldm/text2img256_kl8_1p4b"
        )
    autoencoder = folder.get(AUTOENCODERS)
    unet = folder.find(UNETS)
    unet_fields = _read_unet(folder, unet) if unet else None
    reads_text = unet_fields is not None and unet_fields["context_width"] > 0
    clip = folder.find(TEXT_ENCODERS) if reads_text else None
    tokenizer = folder.find(CLIP_TOKENIZERS) if clip else None
    scheduler = folder.scheduler if unet else None
    used = (autoencoder, unet, clip, tokenizer, scheduler)
    for component in folder.components.values():
        if component not in used:
            raise InputError(
                f"{folder.root}: got a {component.class_name} named {component.name}, "
                "which no other component uses, wanted none; try the folder of a whole "
                "pipeline that is supported"
            )
    return assemble_config(
        autoencoder=read_autoencoder(autoencoder.class_name, autoencoder.config),
        unet=unet_fields,
        clip=read_clip(clip.class_name, clip.config) if clip else None,
        scheduler=(
            read_scheduler(scheduler.class_name, scheduler.config)
            if scheduler
            else None
        ),
        tokenizer=str(tokenizer.directory) if tokenizer else None,
    )


def _read_unet(folder: Folder, unet: Component) -> FieldValues:
    """Read a UNet's config, with the latents of old folders of Stable Diffusion.

    Those of before diffusers 0.9 state the side 32; diffusers takes them for 64.
    """
    fields = read_unet(unet.class_name, unet.config)
    version = diffusers_version(unet.config)
    is_old = version is not None and version < (0, 9)
    if is_old and str(folder.pipeline).startswith("StableDiffusion"):
        fields["latent_side"] = max(fields["latent_side"], SD_LATENT_SIDE)
    return fields


def assemble_config(
    *,
    autoencoder: FieldValues,
    unet: FieldValues | None = None,
    clip: FieldValues | None = None,
    scheduler: FieldValues | None = None,
    tokenizer: str | None = None,
) -> Config:
    """Join what was read of a pipeline's models into one config.

    Args:
      autoencoder: Result of `read_autoencoder`.
      unet: Result of `read_unet`; None for an autoencoder alone.
      clip: Result of `read_clip`, if there is a text encoder.
      scheduler: Result of `read_scheduler`, if there is one.
      tokenizer: Folder of the tokenizer, if there is one.

    Returns:
      A config that builds the same networks, with one image a sampling call.

    Raises:
      InputError: If the models do not fit together.
    """
    autoencoder = dict(autoencoder)
    image_channels = autoencoder.pop("image_channels")
    levels = autoencoder.pop("attention_levels")
    factor = 2 ** (len(autoencoder["channel_multipliers"]) - 1)
    unet = None if unet is None else dict(unet)
    side = unet.pop("latent_side") if unet else 8
    image_size = side * factor
    resolutions = tuple(image_size // 2**level for level in levels)
    first = AutoencoderConfig(**autoencoder, attention_resolutions=resolutions)
    num_classes, second = 0, DiffusionConfig()
    if unet is not None:
        num_classes = unet.pop("num_classes")
        condition = _condition(unet, first, num_classes, clip, tokenizer)
        second = DiffusionConfig(**unet, **(scheduler or {}), condition=condition)
    return Config(
        stages=("autoencoder", "diffusion") if unet else ("autoencoder",),
        data=DataConfig(
            image_size=image_size,
            image_channels=image_channels,
            num_classes=num_classes,
            num_train_examples=0,
        ),
        autoencoder=first,
        diffusion=second,
        sampling=PreviewConfig(chunk=1),
    )


def _condition(
    unet: FieldValues,
    first: AutoencoderConfig,
    num_classes: int,
    clip: FieldValues | None,
    tokenizer: str | None,
) -> ConditionConfig:
    latent, out = first.latent_channels, unet.pop("out_channels")
    extra, width = unet.pop("in_channels") - latent, unet.pop("context_width")
    if out != latent:
        raise InputError(
            f"unet: out_channels: got {out}, wanted the {latent} of the autoencoder's "
            "latents"
        )
    if extra:
        # Stable Diffusion's inpainting concatenates a mask in {0, 1} before the masked
        # image, ours one in {-1, 1} after it: equal shapes, different images.
        raise InputError(
            f"unet: in_channels: got {latent + extra}, wanted the {latent} of the "
            "latent: inpainting models and others with more inputs are not supported; "
            "try a model without"
        )
    context: ContextName = "none"
    if width:
        context = "embedding" if clip is None else "clip"
    condition = ConditionConfig(
        label=num_classes > 0,
        context=context,
        embedding_width=width or 1,
        clip=ClipConfig(**(clip or {})),
        trained=False,
        tokenizer=tokenizer,
    )
    if condition.context_width != width:
        raise InputError(
            f"unet: cross_attention_dim: got {width}, wanted the "
            f"{condition.context_width} of the text encoder"
        )
    return condition


def read_folder(folder: Folder, config: Config, shapes: NetworkShapes) -> ModelWeights:
    """Read every parameter of a diffusers folder.

    Args:
      config: Result of `folder_config`.

    Raises:
      InputError: If a tensor is missing or of another shape.
    """
    autoencoder = folder.get(AUTOENCODERS)
    fields = read_autoencoder(autoencoder.class_name, autoencoder.config)
    unet, unet_tree = folder.find(UNETS), None
    if unet is not None:
        format_ = diffusers_names.unet_format(config.diffusion)
        unet_tree = _read_component(unet, format_, shapes.unet)
    return ModelWeights(
        config,
        read_autoencoder_component(autoencoder, config.autoencoder, shapes.autoencoder),
        unet_tree,
        _conditioner(folder, config.diffusion.condition.clip, shapes.conditioner),
        fields["latent_scale"],
    )


def read_autoencoder_component(
    component: Component, autoencoder: AutoencoderConfig, shapes: PyTree
) -> PyTree:
    """Read the parameters of an autoencoder.

    Raises:
      InputError: If a tensor is missing or of another shape.
    """
    format_ = diffusers_names.autoencoder_format(autoencoder)
    return _read_component(component, format_, shapes)


def _read_component(component: Component, format_: Format, shapes: PyTree) -> PyTree:
    what = str(component.directory)
    tensors = component_tensors(component)
    used = used_tensors(shapes, format_, tensors, what=what)
    return read_tree(shapes, format_, used, what=what)


def _conditioner(folder: Folder, clip: ClipConfig, shapes: PyTree) -> PyTree:
    if not shapes:
        return {}
    own = contained(folder.root, f"{OWN_CONDITIONER}/model.safetensors")
    if own.is_file():
        return read_tree(shapes, own_format, open_tensors(own), what=str(own))
    component = folder.get(TEXT_ENCODERS)
    return {"encoder": read_clip_component(component, clip, shapes["encoder"])}
