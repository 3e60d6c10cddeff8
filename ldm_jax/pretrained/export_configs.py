"""The JSON configs of a diffusers folder out of our config."""

from ldm_jax.config import Config
from ldm_jax.pretrained.diffusers_configs import (
    FLOW_SCHEDULER,
    PREDICTIONS,
    SCHEDULES,
    SamplingConfig,
)
from ldm_jax.types import InputError


def write_unet(config: Config) -> tuple[str, SamplingConfig]:
    """Write a UNet's config.

    Returns:
      The class that holds it, and its JSON.

    Raises:
      InputError: If no class of diffusers holds it.
    """
    ours, levels = config.diffusion, range(len(config.diffusion.channel_multipliers))
    attended = [2**level in ours.attention_downsampling for level in levels]
    crossed = ours.transformer_depth > 0
    widths = [ours.channels * m for m in ours.channel_multipliers]
    if ours.channel_multipliers[0] != 1:
        raise _no_class("channel_multipliers", ours.channel_multipliers, "1 first")
    if crossed and ours.resblock_updown:
        raise _no_class("resblock_updown", True, "false beside spatial transformers")
    if crossed and ours.condition.context == "none":
        raise _no_class("condition.context", "none", "one beside spatial transformers")
    if ours.condition.pooled:
        raise _no_class("condition.pooled", True, "false")
    if ours.coordinates:
        raise _no_class("coordinates", True, "false")
    kind = "CrossAttn" if crossed else "Attn"
    plain_down = "ResnetDownsampleBlock2D" if ours.resblock_updown else "DownBlock2D"
    plain_up = "ResnetUpsampleBlock2D" if ours.resblock_updown else "UpBlock2D"
    label = ours.condition.label
    common: SamplingConfig = {
        "sample_size": config.latent_side,
        "in_channels": config.autoencoder.latent_channels + config.concat_channels,
        "out_channels": config.autoencoder.latent_channels,
        "block_out_channels": widths,
        "layers_per_block": ours.num_res_blocks,
        "down_block_types": [
            f"{kind}DownBlock2D" if has else plain_down for has in attended
        ],
        "up_block_types": [
            f"{kind}UpBlock2D" if has else plain_up for has in attended[::-1]
        ],
        "norm_num_groups": ours.num_groups,
        "norm_eps": ours.norm_epsilon,
        "resnet_time_scale_shift": (
            "scale_shift" if ours.scale_shift_norm else "default"
        ),
        "num_class_embeds": config.data.num_classes + 1 if label else None,
        "act_fn": "silu",
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "center_input_sample": False,
    }
    if crossed:
        heads = [
            width // ours.head_channels if ours.head_channels else ours.num_heads
            for width in widths
        ]
        return "UNet2DConditionModel", {
            **common,
            "attention_head_dim": heads if ours.head_channels else ours.num_heads,
            "cross_attention_dim": ours.condition.context_width,
            "transformer_layers_per_block": ours.transformer_depth,
            "use_linear_projection": ours.linear_projection,
        }
    used = {width for width, has in zip(widths, attended, strict=True) if has}
    used.add(widths[-1])
    sizes = {ours.head_channels or width // ours.num_heads for width in used}
    if len(sizes) != 1:
        raise _no_class("num_heads", ours.num_heads, "heads as wide at every level")
    resample = "resnet" if ours.resblock_updown else "conv"
    return "UNet2DModel", {
        **common,
        "attention_head_dim": sizes.pop(),
        "attn_norm_num_groups": ours.num_groups,
        "downsample_type": resample,
        "upsample_type": resample,
    }


def _no_class(name: str, value: object, wanted: str) -> InputError:
    return InputError(
        f"diffusion.{name}: no UNet of diffusers has {value!r}, wanted {wanted}; try "
        "--format compvis"
    )


def write_autoencoder(
    config: Config, *, latent_scale: float
) -> tuple[str, SamplingConfig]:
    """Write an autoencoder's config.

    Args:
      latent_scale: What its latents are multiplied by.

    Returns:
      The class that holds it, and its JSON.

    Raises:
      InputError: If no class of diffusers holds it.
    """
    ours = config.autoencoder
    if ours.channel_multipliers[0] != 1:
        raise InputError(
            "autoencoder.channel_multipliers: no autoencoder of diffusers has "
            f"{ours.channel_multipliers}, wanted 1 first; try --format compvis"
        )
    quantised = ours.regularizer == "vq"
    if not quantised and ours.encoder_channels != ours.latent_channels:
        raise InputError(
            "autoencoder.z_channels: no AutoencoderKL has "
            f"{ours.z_channels}, wanted the latent's; try --format compvis"
        )
    attended = ours.attention_levels(config.data.image_size)
    levels = range(len(ours.channel_multipliers))
    down = ["Attn" * (level in attended) + "DownEncoderBlock2D" for level in levels]
    up = ["Attn" * (level in attended) + "UpDecoderBlock2D" for level in levels]
    settings: SamplingConfig = {
        "in_channels": config.data.image_channels,
        "out_channels": config.data.image_channels,
        "down_block_types": down,
        "up_block_types": up[::-1],
        "block_out_channels": [ours.channels * m for m in ours.channel_multipliers],
        "layers_per_block": ours.num_res_blocks,
        "latent_channels": ours.encoder_channels,
        "norm_num_groups": ours.num_groups,
        "sample_size": config.data.image_size,
        "scaling_factor": latent_scale,
        "mid_block_add_attention": ours.mid_attention,
        "act_fn": "silu",
    }
    if quantised:
        settings["num_vq_embeddings"] = ours.codebook_size
        settings["vq_embed_dim"] = ours.latent_channels
    return ("VQModel" if quantised else "AutoencoderKL"), settings


def write_clip(config: Config) -> tuple[str, SamplingConfig]:
    """Write the config of CLIP's text encoder.

    Returns:
      The class that holds it, and its JSON; one layer fewer where the last one is not
      used, since transformers' model gives its last layer's output.
    """
    ours = config.diffusion.condition.clip
    unused = ours.output == "penultimate"
    pooled = ours.output == "pooled"
    name = "CLIPTextModelWithProjection" if pooled else "CLIPTextModel"
    return name, {
        "architectures": [name],
        "model_type": "clip_text_model",
        "vocab_size": ours.vocab_size,
        "max_position_embeddings": ours.length,
        "hidden_size": ours.width,
        "num_hidden_layers": ours.depth - 1 if unused else ours.depth,
        "num_attention_heads": ours.num_heads,
        "intermediate_size": ours.mlp_width,
        "hidden_act": ours.activation,
        "layer_norm_eps": ours.epsilon,
        "projection_dim": ours.projection_width,
        "eos_token_id": ours.eos_token_id,
    }


def write_scheduler(config: Config) -> tuple[str, SamplingConfig]:
    """Write a scheduler for our noise levels.

    Returns:
      The class that holds them, and its JSON. A `DDIMScheduler` visits our DDIM's
      levels if the steps divide T; otherwise it rounds the timesteps where we floor
      them.

    Raises:
      InputError: If no class of diffusers holds them.
    """
    ours = config.diffusion
    schedules = {mine: theirs for theirs, mine in SCHEDULES.items()}
    predictions = {mine: theirs for theirs, mine in PREDICTIONS.items()}
    if ours.schedule == "flow" and ours.prediction == "flow":
        return FLOW_SCHEDULER, {"num_train_timesteps": ours.num_timesteps, "shift": 1.0}
    if ours.schedule not in schedules or ours.prediction not in predictions:
        raise InputError(
            f"diffusion.prediction: no scheduler of diffusers has {ours.prediction!r} "
            f"with schedule {ours.schedule}, wanted eps, v or x0 with "
            f"{', '.join(schedules)}, or flow with flow; try --format compvis"
        )
    return "DDIMScheduler", {
        "num_train_timesteps": ours.num_timesteps,
        "beta_start": ours.beta_start,
        "beta_end": ours.beta_end,
        "beta_schedule": schedules[ours.schedule],
        "rescale_betas_zero_snr": ours.zero_terminal_snr,
        "prediction_type": predictions[ours.prediction],
        "timestep_spacing": "trailing",
        "set_alpha_to_one": True,
        "clip_sample": False,
    }
