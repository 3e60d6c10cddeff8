"""Names of our parameters in latent-diffusion and Stable Diffusion checkpoints."""

import re
from collections.abc import Mapping

import numpy as np

from ldm_jax.config import ConditionConfig, DiffusionConfig
from ldm_jax.pretrained.diffusers_names import clip_format, text_part, transformer_leaf
from ldm_jax.pretrained.layouts import (
    Format,
    HeadsFirst,
    Kernel,
    Path,
    Same,
    Split,
    Stored,
    module_leaf,
)
from ldm_jax.pretrained.tensors import Tensors

UNET_PREFIX = "model.diffusion_model."
AUTOENCODER_PREFIX = "first_stage_model."
CONDITIONER_PREFIX = "cond_stage_model."
EMA_PREFIX = "model_ema."
UNET_AVERAGE_PREFIX = f"{EMA_PREFIX}diffusion_model"
OTHER_CONDITIONER_PREFIX = "conditioner.embedders.0."
"""Prefix of the conditioner in files of Stability AI's later code, as of SD Turbo."""
FIRST_STAGE_KEY = "encoder.conv_in.weight"
"""A tensor of every first stage, without prefix in a file of one alone."""
AUTOENCODER_PARTS = (
    "encoder.",
    "decoder.",
    "quant_conv.",
    "post_quant_conv.",
    "quantize.",
)
UNUSED_AUTOENCODER_PREFIXES = ("loss.", EMA_PREFIX)
"""Losses and averages of a first stage, which no image depends on: the original and
diffusers decode by the parameters themselves."""

UNET_NAMES = {
    "time_0": "time_embed.0",
    "time_1": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "class_embedding": "label_emb",
    "context_pooled": "context_pooled",  # only our models have it
    "norm_out": "out.0",
    "conv_out": "out.2",
}
UNET_RES_NAMES = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "embedding": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "skip": "skip_connection",
}
MIDDLE_NAMES = {"block_0": "block_1", "attention_0": "attn_1", "block_1": "block_2"}
OPEN_CLIP_NAMES = {
    "norm1": "ln_1",
    "norm2": "ln_2",
    "out": "attn.out_proj",
    "mlp_in": "mlp.c_fc",
    "mlp_out": "mlp.c_proj",
}


def unet_format(diffusion: DiffusionConfig) -> Format:
    """Return the format of `UNetModel`, without `UNET_PREFIX`."""
    levels, num_blocks = len(diffusion.channel_multipliers), diffusion.num_res_blocks
    ones = 0 if diffusion.linear_projection else 2

    def block_of(place: str, level: int, i: int) -> str:
        if place == "down":
            return f"input_blocks.{1 + level * (num_blocks + 1) + i}"
        return f"output_blocks.{(levels - 1 - level) * (num_blocks + 1) + i}"

    def stored(path: Path) -> Stored:
        head = path[0]
        if head in UNET_NAMES:
            return module_leaf(path, UNET_NAMES[head])
        if resampler := re.fullmatch(r"(down|up)sample_(\d+)", head):
            place, level = resampler[1], int(resampler[2])
            block = block_of(place, level, num_blocks)
            attended = 2**level in diffusion.attention_downsampling
            # An upsampler is the last module of the block before it.
            slot = 0 if place == "down" else 1 + attended
            name = path[1]
            if name == "conv":
                name = "op" if place == "down" else "conv"
            return module_leaf(path, f"{block}.{slot}.{UNET_RES_NAMES.get(name, name)}")
        place, *numbers = head.split("_")
        if place == "mid":
            first = numbers[0] == "0"
            slots = ("middle_block.0" if first else "middle_block.2", "middle_block.1")
        else:
            block = block_of(place, *map(int, numbers))
            slots = (f"{block}.0", f"{block}.1")
        if path[1] == "res":
            return module_leaf(path, f"{slots[0]}.{UNET_RES_NAMES[path[2]]}")
        if path[1] == "transformer":
            return transformer_leaf(path, slots[1], ones)
        return _attention_leaf(path, slots[1], _num_heads(diffusion, head))

    return stored


def _num_heads(diffusion: DiffusionConfig, block: str) -> int:
    if not diffusion.head_channels:
        return diffusion.num_heads
    multipliers = diffusion.channel_multipliers
    is_middle = block.startswith("mid")
    level = len(multipliers) - 1 if is_middle else int(block.split("_")[1])
    return diffusion.channels * multipliers[level] // diffusion.head_channels


def _attention_leaf(path: Path, prefix: str, num_heads: int) -> Stored:
    name, leaf = path[-2:]
    if name == "norm":
        return module_leaf(path, f"{prefix}.norm")
    if name == "out":
        return module_leaf(path, f"{prefix}.proj_out", ones=1)
    usual = "bias" if leaf == "bias" else "weight"
    inner = Kernel(1) if leaf == "kernel" else Same()
    return Stored((f"{prefix}.qkv.{usual}",), HeadsFirst(num_heads, inner))


def ema_key(key: str) -> str:
    """Return the key of a UNet parameter's average; both without their prefix.

    Source:
      latent-diffusion `LitEma`.
    """
    return f"diffusion_model.{key}".replace(".", "")


def autoencoder_format(path: Path) -> Stored:
    """Apply the format of `AutoencoderKL` and `VQModel`, without the prefix."""
    side = path[0]
    if side == "codebook":
        return module_leaf(path, "quantize.embedding")
    if side not in ("encoder", "decoder"):
        return module_leaf(path, side)
    name = path[1]
    if name in ("conv_in", "conv_out", "norm_out"):
        return module_leaf(path, f"{side}.{name}")
    if name == "mid":
        return _block_leaf(path, f"{side}.mid.{MIDDLE_NAMES[path[2]]}")
    place, level = name.split("_")
    direction = place.removesuffix("sample")
    prefix = f"{side}.{direction}.{level}"
    if place.endswith("sample"):
        return module_leaf(path, f"{prefix}.{place}.conv")
    kind, index = path[2].split("_")
    kind = "attn" if kind == "attention" else kind
    return _block_leaf(path, f"{prefix}.{kind}.{index}")


def _block_leaf(path: Path, prefix: str) -> Stored:
    name, leaf = path[-2:]
    if name == "skip":
        return module_leaf(path, f"{prefix}.nin_shortcut")
    if name == "out":
        return module_leaf(path, f"{prefix}.proj_out", ones=2)
    if name != "qkv":
        return module_leaf(path, f"{prefix}.{name}")
    usual = "bias" if leaf == "bias" else "weight"
    keys = tuple(f"{prefix}.{part}.{usual}" for part in "qkv")
    return Stored(keys, Split(3, Kernel(2) if leaf == "kernel" else Same()))


def conditioner_format(condition: ConditionConfig) -> Format:
    """Return the format of the conditioner, without `CONDITIONER_PREFIX`."""
    # Stable Diffusion 1 has OpenAI's encoder, 2 has OpenCLIP's.
    is_open_clip = condition.clip.activation == "gelu"
    openai = clip_format("transformer.text_model.")
    encoders = {
        "class": lambda path: module_leaf(path, "embedding"),
        "text": _text_leaf,
        "clip": _open_clip_leaf if is_open_clip else openai,
    }

    def stored(path: Path) -> Stored:
        if path[0] == "rescaler":
            return module_leaf(path, "channel_mapper")
        return encoders[condition.context](path[1:])

    return stored


def _text_leaf(path: Path) -> Stored:
    name = path[0]
    if name == "token_embedding":
        return module_leaf(path, "transformer.token_emb")
    if name == "position_embedding":
        return module_leaf(path, "transformer.pos_emb.emb")
    if name == "norm_out":
        return module_leaf(path, "transformer.norm")
    layer, part = int(name.removeprefix("layer_")), text_part(path)
    index, name = {
        "norm1": (0, "0"),
        "norm2": (1, "0"),
        "mlp_in": (1, "1.net.0.0"),
        "mlp_out": (1, "1.net.2"),
    }.get(part, (0, f"1.to_{part}"))
    prefix = f"transformer.attn_layers.layers.{2 * layer + index}"
    return module_leaf(path, f"{prefix}.{name}")


def _open_clip_leaf(path: Path) -> Stored:
    name = path[0]
    if name == "position_embedding":
        return Stored(("model.positional_embedding",), Same())
    if name == "token_embedding":
        return module_leaf(path, "model.token_embedding")
    if name == "norm_out":
        return module_leaf(path, "model.ln_final")
    if name == "projection":
        return Stored(("model.text_projection",), Same())
    prefix = f"model.transformer.resblocks.{name.removeprefix('layer_')}"
    part = text_part(path)
    if part in OPEN_CLIP_NAMES:
        return module_leaf(path, f"{prefix}.{OPEN_CLIP_NAMES[part]}")
    usual = "bias" if path[-1] == "bias" else "weight"
    return module_leaf(
        path, f"{prefix}.attn.{part}_in_proj", leaf_names={path[-1]: usual}
    )


def with_usual_prefixes(tensors: Tensors) -> Tensors:
    """Give a conditioner under `OTHER_CONDITIONER_PREFIX` its usual prefix."""
    if any(key.startswith(CONDITIONER_PREFIX) for key in tensors):
        return tensors
    entries = {
        re.sub(f"^{re.escape(OTHER_CONDITIONER_PREFIX)}", CONDITIONER_PREFIX, key): e
        for key, e in tensors.entries.items()
    }
    return Tensors(entries, tensors.metadata)


def present_text_key(key: str) -> str:
    """Add `text_model.` to a key of OpenAI's CLIP of merges without it."""
    return re.sub(
        r"^transformer\.(embeddings|encoder|final_layer_norm)\.",
        r"transformer.text_model.\1.",
        key,
    )


def split_in_proj(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Split OpenCLIP's fused `in_proj_*` tensors into q, k and v."""
    found: dict[str, np.ndarray] = {}
    for key in tensors:
        prefix, fused, leaf = key.rpartition("in_proj_")
        if not fused:
            found[key] = tensors[key]
            continue
        for part, array in zip("qkv", np.split(tensors[key], 3), strict=True):
            found[f"{prefix}{part}_in_proj.{leaf}"] = array
    return found


def join_in_proj(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Undo `split_in_proj`."""
    found: dict[str, np.ndarray] = {}
    for key in tensors:
        match = re.fullmatch(r"(.*)([qkv])_in_proj\.(weight|bias)", key)
        if match is None:
            found[key] = tensors[key]
        elif match[2] == "q":
            parts = [f"{match[1]}{part}_in_proj.{match[3]}" for part in "qkv"]
            joined = np.concatenate([tensors[part] for part in parts])
            found[f"{match[1]}in_proj_{match[3]}"] = joined
    return found
