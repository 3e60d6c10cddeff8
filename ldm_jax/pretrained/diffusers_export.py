"""Export of a model as a diffusers folder: its configs and its parameters."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ldm_jax.config import (
    AutoencoderConfig,
    ClipConfig,
    ConditionConfig,
    Config,
    DataConfig,
    DiffusionConfig,
    to_json,
)
from ldm_jax.config.run import without_tokenizer
from ldm_jax.data.tokenizer import WORDPIECE_FILE, copy_tokenizer
from ldm_jax.files import write_safetensors
from ldm_jax.pretrained import diffusers_names
from ldm_jax.pretrained.diffusers_configs import (
    FLOW_SCHEDULER,
    PREDICTIONS,
    SCHEDULES,
)
from ldm_jax.pretrained.diffusers_folder import IGNORED_COMPONENTS, OWN_CONFIG
from ldm_jax.pretrained.diffusers_import import OWN_CONDITIONER
from ldm_jax.pretrained.layouts import own_format, write_tree
from ldm_jax.pretrained.model_weights import (
    DtypeName,
    ModelWeights,
    cast,
    known_scale,
)
from ldm_jax.types import InputError

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
TEXT_WEIGHTS_NAME = "model.safetensors"

Json = dict[str, Any]


class _Part(NamedTuple):
    """One model of the folder."""

    class_name: str
    config: Json
    tensors: dict[str, np.ndarray]


def write_folder(
    weights: ModelWeights, out: Path, *, dtype: DtypeName = "float32"
) -> None:
    """Write a folder that diffusers opens, with a pipeline index if a pipeline fits.

    It also holds our config, which adds the conditions, the training and the data.

    Args:
      out: An empty folder.
      dtype: Dtype of the parameters; float32 is lossless.

    Raises:
      InputError: If no class of diffusers holds a network, or a number is too large
        for the dtype.
      OSError: If a file cannot be written.
    """
    config = weights.config
    pipeline = _pipeline(config) if weights.unet is not None else None
    parts = _parts(weights, pipeline)
    for role, part in parts.items():
        folder = out / role
        folder.mkdir()
        _write_json(folder / "config.json", _with_class(part.class_name, part.config))
        file = TEXT_WEIGHTS_NAME if role == "text_encoder" else WEIGHTS_NAME
        write_safetensors(folder / file, cast(part.tensors, dtype), {"format": "pt"})
    if weights.conditioner and "text_encoder" not in parts:
        folder = out / OWN_CONDITIONER
        folder.mkdir()
        tensors = write_tree(weights.conditioner, own_format)
        write_safetensors(folder / TEXT_WEIGHTS_NAME, cast(tensors, dtype))
    index = {role: ["diffusers", part.class_name] for role, part in parts.items()}
    if weights.unet is not None:
        name, scheduler = scheduler_json(config.diffusion)
        (out / "scheduler").mkdir()
        path = out / "scheduler" / "scheduler_config.json"
        _write_json(path, _with_class(name, scheduler))
        index["scheduler"] = ["diffusers", name]
    _write_tokenizer(config.diffusion.condition, out / "tokenizer")
    (out / OWN_CONFIG).write_text(to_json(without_tokenizer(config)))
    if pipeline is not None:
        _write_index(out, pipeline, index, has_tokenizer=(out / "tokenizer").exists())


def _parts(weights: ModelWeights, pipeline: str | None) -> dict[str, _Part]:
    """Return the models of the folder by the names that diffusers gives them."""
    config = weights.config
    scale = known_scale(weights)
    format_ = diffusers_names.autoencoder_format(config.autoencoder)
    parts = {
        "vqvae" if pipeline == "LDMPipeline" else "vae": _Part(
            *autoencoder_json(config.autoencoder, config.data, latent_scale=scale),
            write_tree(weights.autoencoder, format_),
        )
    }
    if weights.unet is not None:
        format_ = diffusers_names.unet_format(config.diffusion)
        parts["unet"] = _Part(*unet_json(config), write_tree(weights.unet, format_))
    condition = config.diffusion.condition
    if condition.context == "clip" and weights.conditioner:
        encoder = dict(weights.conditioner["encoder"])
        if condition.clip.output == "penultimate":
            del encoder[f"layer_{condition.clip.depth - 1}"]
        tensors = write_tree(encoder, diffusers_names.clip_format())
        parts["text_encoder"] = _Part(*clip_json(condition.clip), tensors)
    return parts


def _pipeline(config: Config) -> str | None:
    """Return the pipeline class that runs the model; None if diffusers has none."""
    condition = config.diffusion.condition
    if condition.label or condition.concat != "none":
        return None
    if config.diffusion.schedule == "flow":
        return None  # the flow scheduler lacks `init_noise_sigma`, which they read
    if condition.context == "clip" and condition.clip.output != "pooled":
        return "StableDiffusionPipeline"
    return "LDMPipeline" if condition.context == "none" else None


def _write_index(
    out: Path, pipeline: str, index: dict[str, Any], *, has_tokenizer: bool
) -> None:
    if pipeline == "StableDiffusionPipeline":
        if not has_tokenizer:
            return
        index["text_encoder"] = ["transformers", index["text_encoder"][1]]
        index["tokenizer"] = ["transformers", "CLIPTokenizer"]
        index |= {name: [None, None] for name in IGNORED_COMPONENTS}
        index["requires_safety_checker"] = False
    _write_json(out / "model_index.json", _with_class(pipeline, index))


def _write_tokenizer(condition: ConditionConfig, folder: Path) -> None:
    if condition.tokenizer is None:
        return
    copy_tokenizer(Path(condition.tokenizer), folder)
    path = folder / "tokenizer_config.json"
    if not path.exists():
        name = "PreTrainedTokenizerFast"
        if condition.context == "clip":
            name = "CLIPTokenizer"
        elif (folder / WORDPIECE_FILE).exists():
            name = "BertTokenizer"
        length = condition.num_tokens
        _write_json(path, {"tokenizer_class": name, "model_max_length": length})


def _with_class(name: str, values: Json) -> Json:
    return {"_class_name": name, **values}


def _write_json(path: Path, value: Json) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def unet_json(config: Config) -> tuple[str, Json]:
    """Return the diffusers class of the UNet and its JSON config.

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
    common: Json = {
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


def autoencoder_json(
    autoencoder: AutoencoderConfig, data: DataConfig, *, latent_scale: float
) -> tuple[str, Json]:
    """Return the diffusers class of the autoencoder and its JSON config.

    Raises:
      InputError: If no class of diffusers holds it.
    """
    if autoencoder.channel_multipliers[0] != 1:
        raise InputError(
            "autoencoder.channel_multipliers: no autoencoder of diffusers has "
            f"{autoencoder.channel_multipliers}, wanted 1 first; try --format compvis"
        )
    quantised = autoencoder.regularizer == "vq"
    if not quantised and autoencoder.encoder_channels != autoencoder.latent_channels:
        raise InputError(
            "autoencoder.z_channels: no AutoencoderKL has "
            f"{autoencoder.z_channels}, wanted the latent's; try --format compvis"
        )
    attended = autoencoder.attention_levels(data.image_size)
    levels = range(len(autoencoder.channel_multipliers))
    down = ["Attn" * (level in attended) + "DownEncoderBlock2D" for level in levels]
    up = ["Attn" * (level in attended) + "UpDecoderBlock2D" for level in levels]
    settings: Json = {
        "in_channels": data.image_channels,
        "out_channels": data.image_channels,
        "down_block_types": down,
        "up_block_types": up[::-1],
        "block_out_channels": [
            autoencoder.channels * m for m in autoencoder.channel_multipliers
        ],
        "layers_per_block": autoencoder.num_res_blocks,
        "latent_channels": autoencoder.encoder_channels,
        "norm_num_groups": autoencoder.num_groups,
        "sample_size": data.image_size,
        "scaling_factor": latent_scale,
        "mid_block_add_attention": autoencoder.mid_attention,
        "act_fn": "silu",
    }
    if quantised:
        settings["num_vq_embeddings"] = autoencoder.codebook_size
        settings["vq_embed_dim"] = autoencoder.latent_channels
    return ("VQModel" if quantised else "AutoencoderKL"), settings


def clip_json(clip: ClipConfig) -> tuple[str, Json]:
    """Return the transformers class of CLIP's text encoder and its JSON config.

    If the layer before the last is read, the config has one layer fewer: transformers'
    model returns the output of its last layer.
    """
    unused = clip.output == "penultimate"
    pooled = clip.output == "pooled"
    name = "CLIPTextModelWithProjection" if pooled else "CLIPTextModel"
    return name, {
        "architectures": [name],
        "model_type": "clip_text_model",
        "vocab_size": clip.vocab_size,
        "max_position_embeddings": clip.length,
        "hidden_size": clip.width,
        "num_hidden_layers": clip.depth - 1 if unused else clip.depth,
        "num_attention_heads": clip.num_heads,
        "intermediate_size": clip.mlp_width,
        "hidden_act": clip.activation,
        "layer_norm_eps": clip.epsilon,
        "projection_dim": clip.projection_width,
        "eos_token_id": clip.eos_token_id,
    }


def scheduler_json(diffusion: DiffusionConfig) -> tuple[str, Json]:
    """Return a diffusers scheduler with our noise levels and its JSON config.

    `DDIMScheduler` visits the levels of our DDIM if the number of steps divides T;
    otherwise it rounds the timesteps and ours are floored.

    Raises:
      InputError: If no scheduler of diffusers has these levels.
    """
    schedules = {mine: theirs for theirs, mine in SCHEDULES.items()}
    predictions = {mine: theirs for theirs, mine in PREDICTIONS.items()}
    if diffusion.schedule == "flow" and diffusion.prediction == "flow":
        return FLOW_SCHEDULER, {
            "num_train_timesteps": diffusion.num_timesteps,
            "shift": 1.0,
        }
    if diffusion.schedule not in schedules or diffusion.prediction not in predictions:
        raise InputError(
            "diffusion.prediction: no scheduler of diffusers has "
            f"{diffusion.prediction!r} with schedule {diffusion.schedule}, wanted eps, "
            f"v or x0 with {', '.join(schedules)}, or flow with flow; try --format "
            "compvis"
        )
    return "DDIMScheduler", {
        "num_train_timesteps": diffusion.num_timesteps,
        "beta_start": diffusion.beta_start,
        "beta_end": diffusion.beta_end,
        "beta_schedule": schedules[diffusion.schedule],
        "rescale_betas_zero_snr": diffusion.zero_terminal_snr,
        "prediction_type": predictions[diffusion.prediction],
        "timestep_spacing": "trailing",
        "set_alpha_to_one": True,
        "clip_sample": False,
    }
