"""Between our config and the JSON configs of a diffusers folder."""

from collections.abc import Mapping
from typing import Any

from ldm_jax.config import Config
from ldm_jax.config.published import SD_LATENT_SCALE
from ldm_jax.interop.fields import Fields
from ldm_jax.types import InputError

SCHEDULES = {"scaled_linear": "ldm_linear", "linear": "linear"}
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
DOWN_ATTENTION = {
    "CrossAttnDownBlock2D": True,
    "AttnDownBlock2D": True,
    "DownBlock2D": False,
    "ResnetDownsampleBlock2D": False,
}
UP_ATTENTION = {
    "CrossAttnUpBlock2D": True,
    "AttnUpBlock2D": True,
    "UpBlock2D": False,
    "ResnetUpsampleBlock2D": False,
}
ENCODER_ATTENTION = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
DECODER_ATTENTION = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}

Settings = dict[str, Any]


def read_unet(class_name: str, values: Mapping[str, Any]) -> Settings:
    """Read a UNet's config.

    Args:
      class_name: `UNet2DModel` or `UNet2DConditionModel`.
      values: Its JSON.

    Returns:
      Fields of `DiffusionConfig`, and beside them `in_channels`, `out_channels`,
      `latent_side`, `context_width` and `num_classes` (real ones).

    Raises:
      InputError: If a field says what is not built here.
    """
    fields = Fields(values, what=class_name)
    crossed = class_name == "UNet2DConditionModel"
    settings = _widths(fields)
    multipliers = settings["channel_multipliers"]
    attended = _attention(fields, DOWN_ATTENTION, UP_ATTENTION, len(multipliers))
    rows = fields.value("num_class_embeds", 0)
    settings |= {
        "num_res_blocks": fields.number("layers_per_block", 2),
        "attention_downsampling": tuple(2**level for level in attended),
        "num_groups": fields.number("norm_num_groups", 32),
        "norm_epsilon": fields.number("norm_eps", 1e-5),
        "scale_shift_norm": fields.choice(
            "resnet_time_scale_shift",
            {"default": False, "scale_shift": True},
            "default",
        ),
        "in_channels": fields.number("in_channels", 4 if crossed else 3),
        "out_channels": fields.number("out_channels", 4 if crossed else 3),
        "latent_side": fields.number("sample_size"),
        "num_classes": rows - 1 if rows else 0,
    }
    if crossed:
        settings |= _crossed(fields, settings)
    else:
        settings |= _plain(fields, settings)
    fields.expect(
        act_fn="silu",
        flip_sin_to_cos=True,
        freq_shift=0,
        downsample_padding=1,
        mid_block_scale_factor=1,
        time_embedding_type="positional",
        center_input_sample=False,
        dropout=0.0,
    )
    fields.done()
    return settings


def _widths(fields: Fields) -> Settings:
    widths = fields.numbers("block_out_channels")
    if any(width % widths[0] for width in widths):
        raise fields.wrong(
            "block_out_channels", widths, "multiples of the first, as the paper has"
        )
    multipliers = tuple(width // widths[0] for width in widths)
    return {"channels": widths[0], "channel_multipliers": multipliers}


def _attention(
    fields: Fields,
    down: Mapping[str, bool],
    up: Mapping[str, bool],
    num_levels: int,
) -> tuple[int, ...]:
    """Return the levels with attention; the way up must mirror the way down."""
    names = {}
    for field, known in (("down_block_types", down), ("up_block_types", up)):
        value = fields.value(field, [])
        if len(value) != num_levels or any(name not in known for name in value):
            raise fields.wrong(
                field, value, f"{num_levels} of {', '.join(sorted(known))}"
            )
        names[field] = [known[name] for name in value]
    if names["down_block_types"] != names["up_block_types"][::-1]:
        wanted = "the mirror of down_block_types"
        raise fields.wrong("up_block_types", fields.value("up_block_types"), wanted)
    return tuple(level for level, has in enumerate(names["down_block_types"]) if has)


def _crossed(fields: Fields, settings: Settings) -> Settings:
    widths = [settings["channels"] * m for m in settings["channel_multipliers"]]
    # diffusers' own naming: attention_head_dim is the number of heads here.
    heads = fields.value("num_attention_heads", fields.value("attention_head_dim", 8))
    per_level = heads if isinstance(heads, list) else [heads] * len(widths)
    wanted = "heads that are the same, or as wide, at every level"
    if len(per_level) != len(widths) or not all(isinstance(n, int) for n in per_level):
        raise fields.wrong("attention_head_dim", heads, wanted)
    if len(set(per_level)) == 1:
        counted = {"num_heads": per_level[0], "head_channels": 0}
    else:
        sizes = {width / n for width, n in zip(widths, per_level, strict=True)}
        if len(sizes) != 1:
            raise fields.wrong("attention_head_dim", heads, wanted)
        counted = {"num_heads": 1, "head_channels": int(sizes.pop())}
    fields.expect(
        mid_block_type="UNetMidBlock2DCrossAttn",
        conv_in_kernel=3,
        conv_out_kernel=3,
        attention_type="default",
        resnet_out_scale_factor=1.0,
        only_cross_attention=False,
        dual_cross_attention=False,
    )
    fields.ignore("upcast_attention", "addition_embed_type_num_heads")
    return {
        **counted,
        "transformer_depth": fields.number("transformer_layers_per_block", 1),
        "linear_projection": fields.value("use_linear_projection", False),
        "resblock_updown": False,
        "context_width": fields.number("cross_attention_dim", 1280),
    }


def _plain(fields: Fields, settings: Settings) -> Settings:
    kinds = {"conv": False, "resnet": True}
    resnet = fields.choice("downsample_type", kinds, "conv")
    fields.expect(
        upsample_type="resnet" if resnet else "conv",
        mid_block_type="UNetMidBlock2D",
        add_attention=True,
    )
    # With scale-shift norms diffusers leaves the middle's own norm out, unless told.
    groups = fields.value("attn_norm_num_groups")
    if groups != settings["num_groups"] and (groups or settings["scale_shift_norm"]):
        raise fields.wrong("attn_norm_num_groups", groups, settings["num_groups"])
    fields.ignore("num_train_timesteps")
    return {
        "num_heads": 1,
        "head_channels": fields.number("attention_head_dim", 8),
        "transformer_depth": 0,
        "resblock_updown": resnet,
        "context_width": 0,
    }


def write_unet(config: Config) -> tuple[str, Settings]:
    """Write a UNet's config.

    Args:
      config: Of the run.

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
    kind = "CrossAttn" if crossed else "Attn"
    plain_down = "ResnetDownsampleBlock2D" if ours.resblock_updown else "DownBlock2D"
    plain_up = "ResnetUpsampleBlock2D" if ours.resblock_updown else "UpBlock2D"
    label = ours.condition.label
    common: Settings = {
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


def read_autoencoder(class_name: str, values: Mapping[str, Any]) -> Settings:
    """Read an autoencoder's config.

    Args:
      class_name: `AutoencoderKL` or `VQModel`.
      values: Its JSON.

    Returns:
      Fields of `AutoencoderConfig`, and beside them `image_channels` and
      `attention_levels`.

    Raises:
      InputError: If a field says what is not built here.
    """
    fields = Fields(values, what=class_name)
    settings = _widths(fields)
    num_levels = len(settings["channel_multipliers"])
    quantised = class_name == "VQModel"
    z_channels = fields.number("latent_channels", 3 if quantised else 4)
    latent = fields.number("vq_embed_dim", z_channels) if quantised else z_channels
    image_channels = fields.number("in_channels", 3)
    settings |= {
        "regularizer": "vq" if quantised else "kl",
        "num_res_blocks": fields.number("layers_per_block", 1),
        "mid_attention": fields.value("mid_block_add_attention", True),
        "latent_channels": latent,
        "z_channels": None if z_channels == latent else z_channels,
        "num_groups": fields.number("norm_num_groups", 32),
        "latent_scale": float(fields.number("scaling_factor", SD_LATENT_SCALE)),
        "image_channels": image_channels,
        "attention_levels": _attention(
            fields, ENCODER_ATTENTION, DECODER_ATTENTION, num_levels
        ),
    }
    if quantised:
        settings["codebook_size"] = fields.number("num_vq_embeddings", 256)
        fields.expect(norm_type="group", lookup_from_codebook=False)
    else:
        fields.expect(use_quant_conv=True, use_post_quant_conv=True)
    fields.expect(act_fn="silu", out_channels=image_channels)
    fields.ignore("sample_size", "force_upcast")
    fields.done()
    return settings


def write_autoencoder(config: Config, *, latent_scale: float) -> tuple[str, Settings]:
    """Write an autoencoder's config.

    Args:
      config: Of the run.
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
    settings: Settings = {
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


def read_clip(class_name: str, values: Mapping[str, Any]) -> Settings:
    """Read the config of CLIP's text encoder.

    Args:
      class_name: `CLIPTextModel` or `CLIPTextModelWithProjection`.
      values: Its JSON.

    Returns:
      Fields of `ClipConfig`.

    Raises:
      InputError: If a field says what is not built here.
    """
    fields = Fields(values, what=class_name)
    activations = {"quick_gelu": "quick_gelu", "gelu": "gelu"}
    settings = {
        "vocab_size": fields.number("vocab_size", 49_408),
        "length": fields.number("max_position_embeddings", 77),
        "width": fields.number("hidden_size", 512),
        "depth": fields.number("num_hidden_layers", 12),
        "num_heads": fields.number("num_attention_heads", 8),
        "mlp_width": fields.number("intermediate_size", 2048),
        "activation": fields.choice("hidden_act", activations, "quick_gelu"),
        "epsilon": float(fields.number("layer_norm_eps", 1e-5)),
        "projection_width": fields.number("projection_dim", 512),
        "eos_token_id": fields.number("eos_token_id", 49_407),
        "output": "pooled" if class_name.endswith("Projection") else "last",
    }
    fields.expect(attention_dropout=0.0)
    return settings


def write_clip(config: Config) -> tuple[str, Settings]:
    """Write the config of CLIP's text encoder.

    Args:
      config: Of the run.

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


def read_scheduler(class_name: str, values: Mapping[str, Any]) -> Settings:
    """Read the noise levels out of a scheduler's config; the sampler is the user's.

    Args:
      class_name: Of the scheduler.
      values: Its JSON.

    Returns:
      Fields of `DiffusionConfig`.

    Raises:
      InputError: If the noise levels are none that is built here.
    """
    fields = Fields(values, what=class_name)
    fields.expect(trained_betas=None, rescale_betas_zero_snr=False)
    return {
        "num_timesteps": fields.number("num_train_timesteps", 1000),
        "beta_start": float(fields.number("beta_start", 1e-4)),
        "beta_end": float(fields.number("beta_end", 0.02)),
        "schedule": fields.choice("beta_schedule", SCHEDULES, "linear"),
        "prediction": fields.choice("prediction_type", PREDICTIONS, "epsilon"),
    }


def write_scheduler(config: Config) -> tuple[str, Settings]:
    """Write a scheduler that visits the noise levels our DDIM visits."""
    ours = config.diffusion
    schedules = {mine: theirs for theirs, mine in SCHEDULES.items()}
    predictions = {mine: theirs for theirs, mine in PREDICTIONS.items()}
    return "DDIMScheduler", {
        "num_train_timesteps": ours.num_timesteps,
        "beta_start": ours.beta_start,
        "beta_end": ours.beta_end,
        "beta_schedule": schedules[ours.schedule],
        "prediction_type": predictions[ours.prediction],
        "timestep_spacing": "trailing",
        "set_alpha_to_one": True,
        "clip_sample": False,
    }
