"""Our config from the configs of a stranger's models."""

from typing import Any

from ldm_jax.config import (
    AutoencoderConfig,
    ClipConfig,
    ConditionConfig,
    Config,
    DataConfig,
    DiffusionConfig,
    PreviewConfig,
)
from ldm_jax.config.diffusion import ContextName
from ldm_jax.types import InputError

Settings = dict[str, Any]


def assemble_config(
    *,
    autoencoder: Settings,
    unet: Settings | None = None,
    clip: Settings | None = None,
    scheduler: Settings | None = None,
    tokenizer: str | None = None,
) -> Config:
    """Join what was read of a stranger's models into one config.

    Args:
      autoencoder: As `read_autoencoder` gives it.
      unet: As `read_unet` gives it; None for an autoencoder alone.
      clip: As `read_clip` gives it, where there is one.
      scheduler: As `read_scheduler` gives it, where there is one.
      tokenizer: Folder of the tokenizer, where there is one.

    Returns:
      A config that builds the same networks. It samples one image at a time, since
      such models are large.

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
    unet: Settings,
    first: AutoencoderConfig,
    num_classes: int,
    clip: Settings | None,
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
        # Stable Diffusion's inpainting stacks a mask in {0, 1} before the masked image,
        # ours one in {-1, 1} after it: the same shapes, and other pictures.
        raise InputError(
            f"unet: in_channels: got {latent + extra}, wanted the {latent} of the "
            "latent: a model that reads more beside it, as for inpainting, is not "
            "read; try one without"
        )
    context: ContextName = "none"
    if width:
        context = "embedding" if clip is None else "clip"
    clip_config = ClipConfig() if clip is None else ClipConfig(**clip)
    condition = ConditionConfig(
        label=num_classes > 0,
        context=context,
        embedding_width=width or 1,
        clip=clip_config,
        trained=False,
        tokenizer=tokenizer,
    )
    if condition.context_width != width:
        raise InputError(
            f"unet: cross_attention_dim: got {width}, wanted the "
            f"{condition.context_width} of the text encoder"
        )
    return condition
