"""JSON configs of diffusers and transformers models, read as fields of our config."""

import re
from collections.abc import Mapping
from typing import Any

from ldm_jax.config.presets import SD_LATENT_SCALE
from ldm_jax.pretrained.strict_json import Fields, is_count

FieldValues = dict[str, Any]
"""Fields of one of our config classes."""

SCHEDULES = {
    "scaled_linear": "ldm_linear",
    "linear": "linear",
    "squaredcos_cap_v2": "cosine",
}
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
SCHEDULER_DEFAULTS: Mapping[str, tuple[float, float, str]] = {
    **dict.fromkeys(
        (
            "DDIMScheduler",
            "DDIMInverseScheduler",
            "DDIMParallelScheduler",
            "DDPMScheduler",
            "DDPMParallelScheduler",
            "DEISMultistepScheduler",
            "DPMSolverMultistepScheduler",
            "DPMSolverMultistepInverseScheduler",
            "DPMSolverSinglestepScheduler",
            "EulerAncestralDiscreteScheduler",
            "EulerDiscreteScheduler",
            "LMSDiscreteScheduler",
            "PNDMScheduler",
            "RePaintScheduler",
            "SASolverScheduler",
            "UniPCMultistepScheduler",
        ),
        (1e-4, 0.02, "linear"),
    ),
    **dict.fromkeys(
        (
            "DPMSolverSDEScheduler",
            "HeunDiscreteScheduler",
            "KDPM2AncestralDiscreteScheduler",
            "KDPM2DiscreteScheduler",
        ),
        (0.00085, 0.012, "linear"),
    ),
    **dict.fromkeys(
        ("LCMScheduler", "TCDScheduler"), (0.00085, 0.012, "scaled_linear")
    ),
}
"""First and last noise variance and their schedule where a config omits them."""
FLOW_SCHEDULER = "FlowMatchEulerDiscreteScheduler"
FLOW_SCHEDULERS = (
    FLOW_SCHEDULER,
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
)
LAST_KNOWN_VERSION = (0, 42)
"""Version of diffusers of which every field is known here."""
UNSUPPORTED_FIELDS: Mapping[str, tuple[str, ...]] = {
    "UNet2DModel": ("time_embedding_dim", "class_embed_type"),
    "UNet2DConditionModel": (
        "reverse_transformer_layers_per_block",
        "encoder_hid_dim",
        "encoder_hid_dim_type",
        "class_embed_type",
        "addition_embed_type",
        "addition_time_embed_dim",
        "resnet_skip_time_act",
        "time_embedding_dim",
        "time_embedding_act_fn",
        "timestep_post_act",
        "time_cond_proj_dim",
        "projection_class_embeddings_input_dim",
        "class_embeddings_concat",
        "mid_block_only_cross_attention",
        "cross_attention_norm",
    ),
    "AutoencoderKL": ("shift_factor", "latents_mean", "latents_std"),
    "VQModel": (),
}
"""Fields of a class that must be null or false. Others that are not read mean nothing
to `LAST_KNOWN_VERSION`, such as those of a trainer's average."""
NEVER_NULL = (
    "add_attention",
    "flip_sin_to_cos",
    "mid_block_add_attention",
    "mid_block_type",
    "norm_num_groups",
    "use_post_quant_conv",
    "use_quant_conv",
)
"""Fields of which null builds another network than the default."""
AUTOENCODER_WIDTHS: FieldValues = {
    "block_out_channels": [64],
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
}
DEFAULT_WIDTHS: Mapping[str, FieldValues] = {
    "UNet2DModel": {
        "block_out_channels": [224, 448, 672, 896],
        "down_block_types": ["DownBlock2D", *["AttnDownBlock2D"] * 3],
        "up_block_types": [*["AttnUpBlock2D"] * 3, "UpBlock2D"],
    },
    "UNet2DConditionModel": {
        "block_out_channels": [320, 640, 1280, 1280],
        "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
        "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    },
    "AutoencoderKL": AUTOENCODER_WIDTHS,
    "VQModel": AUTOENCODER_WIDTHS,
}
"""Widths and blocks where a config omits them."""
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


def read_unet(class_name: str, values: Mapping[str, Any]) -> FieldValues:
    """Read a UNet's config.

    Args:
      class_name: `UNet2DModel` or `UNet2DConditionModel`.
      values: Its JSON.

    Returns:
      Fields of `DiffusionConfig`, and `in_channels`, `out_channels`, `latent_side`,
      `context_width` and `num_classes` (without the null class).

    Raises:
      InputError: If a field has a value that is not supported.
    """
    fields = _fields(class_name, values)
    crossed = class_name == "UNet2DConditionModel"
    found = _widths(fields)
    multipliers = found["channel_multipliers"]
    attended = _attention(fields, DOWN_ATTENTION, UP_ATTENTION, len(multipliers))
    found |= {
        "num_res_blocks": fields.count("layers_per_block", 2),
        "attention_downsampling": tuple(2**level for level in attended),
        "num_groups": fields.count("norm_num_groups", 32),
        "norm_epsilon": fields.number("norm_eps", 1e-5),
        "scale_shift_norm": fields.choice(
            "resnet_time_scale_shift",
            {"default": False, "scale_shift": True},
            "default",
        ),
        "in_channels": fields.count("in_channels", 4 if crossed else 3),
        "out_channels": fields.count("out_channels", 4 if crossed else 3),
        "latent_side": _side(fields),
        # The last row of a class table is the null class.
        "num_classes": _num_rows(fields) - 1,
    }
    found |= _crossed(fields, found) if crossed else _self_attention(fields, found)
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
    _done(fields, class_name, values)
    return found


def diffusers_version(values: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the version of diffusers that wrote a config, if it says so."""
    match = re.match(r"(\d{1,4})\.(\d{1,4})", str(values.get("_diffusers_version")))
    return None if match is None else (int(match[1]), int(match[2]))


def _fields(class_name: str, values: Mapping[str, Any]) -> Fields:
    """Wrap a model's config, with the defaults of its class."""
    fields = Fields({**DEFAULT_WIDTHS[class_name], **values}, what=class_name)
    for name in NEVER_NULL:
        if name in values and values[name] is None:
            raise fields.wrong(name, None, "a value: nothing else is supported")
    return fields


def _done(fields: Fields, class_name: str, values: Mapping[str, Any]) -> None:
    """Check that no unread field means anything to diffusers."""
    version = diffusers_version(values)
    if version is not None and version <= LAST_KNOWN_VERSION:
        known = UNSUPPORTED_FIELDS[class_name]
        fields.ignore(*(name for name in values if name not in known))
    fields.done()


def _side(fields: Fields) -> int:
    """Return the side of the latents; some configs state height and width."""
    value = fields.value("sample_size")
    if isinstance(value, list | tuple) and len(value) == 2 and value[0] == value[1]:
        return Fields({"sample_size": value[0]}, what="UNet").count("sample_size")
    return fields.count("sample_size")


def _widths(fields: Fields) -> FieldValues:
    widths = fields.counts("block_out_channels")
    if any(width % widths[0] for width in widths):
        raise fields.wrong("block_out_channels", widths, "multiples of the first")
    multipliers = tuple(width // widths[0] for width in widths)
    return {"channels": widths[0], "channel_multipliers": multipliers}


def _num_rows(fields: Fields) -> int:
    """Return the rows of the class table; 1 where there is none."""
    if fields.value("num_class_embeds") is None:
        return 1
    return fields.count("num_class_embeds", low=2)


def _attention(
    fields: Fields,
    down: Mapping[str, bool],
    up: Mapping[str, bool],
    num_levels: int,
) -> tuple[int, ...]:
    """Return the levels with attention; the way up must mirror the way down."""
    names = {}
    for field, known in (("down_block_types", down), ("up_block_types", up)):
        names[field] = [known[name] for name in fields.words(field, known, num_levels)]
    if names["down_block_types"] != names["up_block_types"][::-1]:
        wanted = "the mirror of down_block_types"
        raise fields.wrong("up_block_types", fields.value("up_block_types"), wanted)
    return tuple(level for level, has in enumerate(names["down_block_types"]) if has)


def _crossed(fields: Fields, found: FieldValues) -> FieldValues:
    widths = [found["channels"] * m for m in found["channel_multipliers"]]
    # In this class diffusers calls the number of heads attention_head_dim.
    heads = fields.value("num_attention_heads", fields.value("attention_head_dim", 8))
    per_level = heads if isinstance(heads, list | tuple) else [heads] * len(widths)
    wanted = "equal numbers or equal widths of heads at all levels"
    if len(per_level) != len(widths) or not all(is_count(n) for n in per_level):
        raise fields.wrong("attention_head_dim", heads, wanted)
    if len(set(per_level)) == 1:
        counted = {"num_heads": per_level[0], "head_channels": 0}
    else:
        sizes = {divmod(width, n) for width, n in zip(widths, per_level, strict=True)}
        size, rest = sizes.pop()
        if sizes or rest:
            raise fields.wrong("attention_head_dim", heads, wanted)
        counted = {"num_heads": 1, "head_channels": size}
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
        "transformer_depth": fields.count("transformer_layers_per_block", 1),
        "linear_projection": fields.value("use_linear_projection", False),
        "resblock_updown": False,
        "context_width": fields.count("cross_attention_dim", 1280),
    }


def _self_attention(fields: Fields, found: FieldValues) -> FieldValues:
    kinds = {"conv": False, "resnet": True}
    resnet = fields.choice("downsample_type", kinds, "conv")
    fields.expect(
        upsample_type="resnet" if resnet else "conv",
        mid_block_type="UNetMidBlock2D",
        add_attention=True,
    )
    # With scale-shift norms, null leaves out the norm of the middle's attention.
    groups = fields.value("attn_norm_num_groups")
    matters = groups is not None or found["scale_shift_norm"]
    if matters and groups != found["num_groups"]:
        raise fields.wrong("attn_norm_num_groups", groups, found["num_groups"])
    fields.ignore("num_train_timesteps")
    # Null is one head over the whole width.
    one_head = fields.is_null("attention_head_dim")
    return {
        "num_heads": 1,
        "head_channels": 0 if one_head else fields.count("attention_head_dim", 8),
        "transformer_depth": 0,
        "resblock_updown": resnet,
        "context_width": 0,
    }


def read_autoencoder(class_name: str, values: Mapping[str, Any]) -> FieldValues:
    """Read an autoencoder's config.

    Args:
      class_name: `AutoencoderKL` or `VQModel`.
      values: Its JSON.

    Returns:
      Fields of `AutoencoderConfig`, and `image_channels` and `attention_levels`.

    Raises:
      InputError: If a field has a value that is not supported.
    """
    fields = _fields(class_name, values)
    found = _widths(fields)
    num_levels = len(found["channel_multipliers"])
    quantised = class_name == "VQModel"
    z_channels = fields.count("latent_channels", 3 if quantised else 4)
    latent = fields.count("vq_embed_dim", z_channels) if quantised else z_channels
    image_channels = fields.count("in_channels", 3)
    found |= {
        "regularizer": "vq" if quantised else "kl",
        "num_res_blocks": fields.count("layers_per_block", 1),
        "mid_attention": fields.value("mid_block_add_attention", True),
        "latent_channels": latent,
        "z_channels": None if z_channels == latent else z_channels,
        "num_groups": fields.count("norm_num_groups", 32),
        "latent_scale": fields.number("scaling_factor", SD_LATENT_SCALE),
        "image_channels": image_channels,
        "attention_levels": _attention(
            fields, ENCODER_ATTENTION, DECODER_ATTENTION, num_levels
        ),
    }
    if quantised:
        found["codebook_size"] = fields.count("num_vq_embeddings", 256)
        fields.expect(norm_type="group", lookup_from_codebook=False)
    else:
        fields.expect(use_quant_conv=True, use_post_quant_conv=True)
    fields.expect(act_fn="silu", out_channels=image_channels)
    fields.ignore("sample_size", "force_upcast")
    _done(fields, class_name, values)
    return found


def read_clip(class_name: str, values: Mapping[str, Any]) -> FieldValues:
    """Read the config of CLIP's text encoder.

    Args:
      class_name: `CLIPTextModel`, `CLIPTextModelWithProjection` or `CLIPModel`.
      values: Its JSON, or that of the whole CLIP it is a part of.

    Returns:
      Fields of `ClipConfig`.

    Raises:
      InputError: If a field has a value that is not supported.
    """
    whole = values.get("model_type") == "clip" and values.get("text_config")
    fields = Fields(whole if isinstance(whole, dict) else values, what=class_name)
    activations = {"quick_gelu": "quick_gelu", "gelu": "gelu"}
    found = {
        "vocab_size": fields.count("vocab_size", 49_408),
        "length": fields.count("max_position_embeddings", 77),
        "width": fields.count("hidden_size", 512),
        "depth": fields.count("num_hidden_layers", 12),
        "num_heads": fields.count("num_attention_heads", 8),
        "mlp_width": fields.count("intermediate_size", 2048),
        "activation": fields.choice("hidden_act", activations, "quick_gelu"),
        "epsilon": fields.number("layer_norm_eps", 1e-5),
        "projection_width": fields.count("projection_dim", 512),
        "eos_token_id": fields.count("eos_token_id", 49_407, low=0),
        "output": "pooled" if class_name.endswith("Projection") else "last",
    }
    fields.expect(attention_dropout=0.0)
    return found


def read_scheduler(class_name: str, values: Mapping[str, Any]) -> FieldValues:
    """Read the noise levels from a scheduler's config; the sampler is not read.

    Args:
      class_name: Class of the scheduler.
      values: Its JSON.

    Returns:
      Fields of `DiffusionConfig`.

    Raises:
      InputError: If the noise levels are not supported.
    """
    fields = Fields(values, what=class_name)
    if class_name in FLOW_SCHEDULERS:
        fields.expect(
            shift=1.0,
            use_dynamic_shifting=False,
            invert_sigmas=False,
            shift_terminal=None,
        )
        return {
            "num_timesteps": fields.count("num_train_timesteps", 1000),
            "schedule": "flow",
            "prediction": "flow",
        }
    fields.expect(
        trained_betas=None,
        use_flow_sigmas=False,
        timestep_type="discrete",
        snr_shift_scale=1.0,
    )
    zero_terminal_snr = fields.value("rescale_betas_zero_snr", False)
    if not isinstance(zero_terminal_snr, bool):
        raise fields.wrong("rescale_betas_zero_snr", zero_terminal_snr, "true or false")
    # Before diffusers 0.10 a model that predicts the image said so here.
    predicts_eps = fields.value("predict_epsilon", True)
    return {
        "num_timesteps": fields.count("num_train_timesteps", 1000),
        **_betas(fields, class_name),
        "zero_terminal_snr": zero_terminal_snr,
        "prediction": fields.choice(
            "prediction_type", PREDICTIONS, "epsilon" if predicts_eps else "sample"
        ),
    }


def _betas(fields: Fields, class_name: str) -> FieldValues:
    """Read the noise variances of any class of scheduler whose config has them."""
    start, end, schedule = SCHEDULER_DEFAULTS.get(class_name, (None, None, None))
    stated = fields.value("beta_schedule", schedule)
    if not isinstance(stated, str) or stated not in SCHEDULES:
        raise fields.wrong("beta_schedule", stated, f"one of {', '.join(SCHEDULES)}")
    if SCHEDULES[stated] == "cosine" and start is None:
        start, end = 1e-4, 0.02  # not used
    return {
        "beta_start": fields.number("beta_start", start),
        "beta_end": fields.number("beta_end", end),
        "schedule": SCHEDULES[stated],
    }
