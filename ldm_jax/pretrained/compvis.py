"""The names that latent-diffusion and Stable Diffusion checkpoints have."""

import re
from collections.abc import Mapping

import numpy as np

from ldm_jax.config import Config
from ldm_jax.pretrained.diffusers import clip_format, text_part, transformer_home
from ldm_jax.pretrained.layouts import (
    Format,
    HeadsFirst,
    Home,
    Kernel,
    Path,
    Same,
    Split,
    plain,
)

UNET_PREFIX = "model.diffusion_model."
AUTOENCODER_PREFIX = "first_stage_model."
CONDITIONER_PREFIX = "cond_stage_model."
EMA_PREFIX = "model_ema."

UNET_NAMES = {
    "time_0": "time_embed.0",
    "time_1": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "class_embedding": "label_emb",
    "context_pooled": "context_pooled",  # of no model but ours
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


def unet_format(config: Config) -> Format:
    """Name the UNet as `UNetModel` does, without the prefix."""
    settings = config.diffusion
    levels, num_blocks = len(settings.channel_multipliers), settings.num_res_blocks
    ones = 0 if settings.linear_projection else 2

    def block_of(place: str, level: int, i: int) -> str:
        if place == "down":
            return f"input_blocks.{1 + level * (num_blocks + 1) + i}"
        return f"output_blocks.{(levels - 1 - level) * (num_blocks + 1) + i}"

    def home(path: Path) -> Home:
        head = path[0]
        if head in UNET_NAMES:
            return plain(path, UNET_NAMES[head])
        if resampler := re.fullmatch(r"(down|up)sample_(\d+)", head):
            place, level = resampler[1], int(resampler[2])
            block = block_of(place, level, num_blocks)
            attended = 2**level in settings.attention_downsampling
            # An upsampler is the last module of the block before it.
            slot = 0 if place == "down" else 1 + attended
            name = path[1]
            if name == "conv":
                name = "op" if place == "down" else "conv"
            return plain(path, f"{block}.{slot}.{UNET_RES_NAMES.get(name, name)}")
        place, *numbers = head.split("_")
        if place == "mid":
            first = numbers[0] == "0"
            slots = ("middle_block.0" if first else "middle_block.2", "middle_block.1")
        else:
            block = block_of(place, *map(int, numbers))
            slots = (f"{block}.0", f"{block}.1")
        if path[1] == "res":
            return plain(path, f"{slots[0]}.{UNET_RES_NAMES[path[2]]}")
        if path[1] == "transformer":
            return transformer_home(path, slots[1], ones)
        return _attention_home(path, slots[1], _num_heads(config, head))

    return home


def _num_heads(config: Config, block: str) -> int:
    settings = config.diffusion
    if not settings.head_channels:
        return settings.num_heads
    multipliers = settings.channel_multipliers
    is_middle = block.startswith("mid")
    level = len(multipliers) - 1 if is_middle else int(block.split("_")[1])
    return settings.channels * multipliers[level] // settings.head_channels


def _attention_home(path: Path, prefix: str, num_heads: int) -> Home:
    name, leaf = path[-2:]
    if name == "norm":
        return plain(path, f"{prefix}.norm")
    if name == "out":
        return plain(path, f"{prefix}.proj_out", ones=1)
    usual = "bias" if leaf == "bias" else "weight"
    inner = Kernel(1) if leaf == "kernel" else Same()
    return Home((f"{prefix}.qkv.{usual}",), HeadsFirst(num_heads, inner))


def ema_key(key: str) -> str:
    """Name the average of a UNet's parameter, without the prefix.

    Args:
      key: Of the parameter, without its prefix.

    Returns:
      The key, which has no dots.

    Source:
      latent-diffusion `LitEma`.
    """
    return f"diffusion_model.{key}".replace(".", "")


def autoencoder_format(config: Config) -> Format:
    """Name the autoencoder as `AutoencoderKL` and `VQModel` do, without the prefix."""
    del config

    def home(path: Path) -> Home:
        side = path[0]
        if side == "codebook":
            return plain(path, "quantize.embedding")
        if side not in ("encoder", "decoder"):
            return plain(path, side)
        name = path[1]
        if name in ("conv_in", "conv_out", "norm_out"):
            return plain(path, f"{side}.{name}")
        if name == "mid":
            return _block_home(path, f"{side}.mid.{MIDDLE_NAMES[path[2]]}")
        place, level = name.split("_")
        direction = place.removesuffix("sample")
        prefix = f"{side}.{direction}.{level}"
        if place.endswith("sample"):
            return plain(path, f"{prefix}.{place}.conv")
        kind, index = path[2].split("_")
        kind = "attn" if kind == "attention" else kind
        return _block_home(path, f"{prefix}.{kind}.{index}")

    return home


def _block_home(path: Path, prefix: str) -> Home:
    name, leaf = path[-2:]
    if name == "skip":
        return plain(path, f"{prefix}.nin_shortcut")
    if name == "out":
        return plain(path, f"{prefix}.proj_out", ones=2)
    if name != "qkv":
        return plain(path, f"{prefix}.{name}")
    usual = "bias" if leaf == "bias" else "weight"
    keys = tuple(f"{prefix}.{part}.{usual}" for part in "qkv")
    return Home(keys, Split(3, Kernel(2) if leaf == "kernel" else Same()))


def conditioner_format(config: Config) -> Format:
    """Name the conditioner as latent-diffusion does, without the prefix."""
    encoders = {
        "class": _class_home,
        "text": _text_home,
        "clip": _clip_home(config.diffusion.condition.clip.activation == "gelu"),
    }

    def home(path: Path) -> Home:
        if path[0] == "rescaler":
            return plain(path, "channel_mapper")
        return encoders[config.diffusion.condition.context](path[1:])

    return home


def _class_home(path: Path) -> Home:
    return plain(path, "embedding")


def _text_home(path: Path) -> Home:
    name = path[0]
    if name == "token_embedding":
        return plain(path, "transformer.token_emb")
    if name == "position_embedding":
        return plain(path, "transformer.pos_emb.emb")
    if name == "norm_out":
        return plain(path, "transformer.norm")
    layer, part = int(name.removeprefix("layer_")), text_part(path)
    index, name = {
        "norm1": (0, "0"),
        "norm2": (1, "0"),
        "mlp_in": (1, "1.net.0.0"),
        "mlp_out": (1, "1.net.2"),
    }.get(part, (0, f"1.to_{part}"))
    prefix = f"transformer.attn_layers.layers.{2 * layer + index}"
    return plain(path, f"{prefix}.{name}")


def _clip_home(is_open_clip: bool) -> Format:
    """Choose by the activation: Stable Diffusion 1 has OpenAI's, 2 has OpenCLIP's."""
    return _open_clip_home if is_open_clip else clip_format("transformer.text_model.")


def _open_clip_home(path: Path) -> Home:
    name = path[0]
    if name == "position_embedding":
        return Home(("model.positional_embedding",), Same())
    if name == "token_embedding":
        return plain(path, "model.token_embedding")
    if name == "norm_out":
        return plain(path, "model.ln_final")
    if name == "projection":
        return Home(("model.text_projection",), Same())
    prefix = f"model.transformer.resblocks.{name.removeprefix('layer_')}"
    part = text_part(path)
    if part in OPEN_CLIP_NAMES:
        return plain(path, f"{prefix}.{OPEN_CLIP_NAMES[part]}")
    usual = "bias" if path[-1] == "bias" else "weight"
    return plain(path, f"{prefix}.attn.{part}_in_proj", leaf_names={path[-1]: usual})


def split_in_proj(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Cut OpenCLIP's fused `in_proj_*` into one tensor each for q, k and v."""
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
