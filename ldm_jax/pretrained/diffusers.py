"""The names that diffusers and transformers give to our parameters."""

import re

from ldm_jax.config import Config
from ldm_jax.pretrained.layouts import Format, Home, Kernel, Path, Same, Split, plain

RES_NAMES = {
    "norm1": "norm1",
    "conv1": "conv1",
    "embedding": "time_emb_proj",
    "norm2": "norm2",
    "conv2": "conv2",
    "skip": "conv_shortcut",
}
TRANSFORMER_BLOCK_NAMES = {
    "norm1": "norm1",
    "norm2": "norm2",
    "norm3": "norm3",
    "mlp_in": "ff.net.0.proj",
    "mlp_out": "ff.net.2",
}
ATTENTION_NAMES = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
UNET_NAMES = {
    "conv_in": "conv_in",
    "time_0": "time_embedding.linear_1",
    "time_1": "time_embedding.linear_2",
    "class_embedding": "class_embedding",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
}
CLIP_NAMES = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "out": "self_attn.out_proj",
    "mlp_in": "mlp.fc1",
    "mlp_out": "mlp.fc2",
}
OLD_ATTENTION_NAMES = {
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "to_out.0",
}
"""What files written before diffusers 0.15 call the autoencoder's attention."""


def unet_format(config: Config) -> Format:
    """Name the UNet as `UNet2DModel` and `UNet2DConditionModel` do."""
    last = len(config.diffusion.channel_multipliers) - 1
    ones = 0 if config.diffusion.linear_projection else 2

    def home(path: Path) -> Home:
        head = path[0]
        if head in UNET_NAMES:
            return plain(path, UNET_NAMES[head])
        if resampler := re.fullmatch(r"(down|up)sample_(\d+)", head):
            direction, level = resampler[1], int(resampler[2])
            block = level if direction == "down" else last - level
            prefix = f"{direction}_blocks.{block}.{direction}samplers.0"
            name = path[1]
            return plain(path, f"{prefix}.{RES_NAMES.get(name, name)}")
        place, *numbers = head.split("_")
        if place == "mid":
            prefix, index = "mid_block", int(numbers[0])
        else:
            level, index = map(int, numbers)
            block = level if place == "down" else last - level
            prefix = f"{place}_blocks.{block}"
        return _level_home(path, prefix, index, ones)

    return home


def _level_home(path: Path, prefix: str, index: int, ones: int) -> Home:
    part = path[1]
    if part == "res":
        return plain(path, f"{prefix}.resnets.{index}.{RES_NAMES[path[2]]}")
    prefix = f"{prefix}.attentions.{index}"
    if part == "attention":
        return fused_attention(path, prefix)
    return transformer_home(path, prefix, ones)


def fused_attention(path: Path, prefix: str) -> Home:
    """Give a self-attention with a fused q, k, v its home among separate ones."""
    name, leaf = path[-2:]
    if name != "qkv":
        return plain(path, f"{prefix}.{'group_norm' if name == 'norm' else 'to_out.0'}")
    usual = "bias" if leaf == "bias" else "weight"
    keys = tuple(f"{prefix}.to_{part}.{usual}" for part in "qkv")
    return Home(keys, Split(3, Kernel() if leaf == "kernel" else Same()))


def transformer_home(path: Path, prefix: str, ones: int) -> Home:
    """Give a leaf of a spatial transformer its home; CompVis has the same names.

    Args:
      path: Ours, from the level block on.
      prefix: Their name of the transformer.
      ones: Axes that its projections have as 1x1 convolutions.

    Returns:
      The home.
    """
    name = path[2]
    if not name.startswith("block_"):
        is_projection = name.startswith("proj")
        return plain(path, f"{prefix}.{name}", ones=ones if is_projection else 0)
    prefix = f"{prefix}.transformer_blocks.{name.removeprefix('block_')}"
    name = path[3]
    if name in TRANSFORMER_BLOCK_NAMES:
        return plain(path, f"{prefix}.{TRANSFORMER_BLOCK_NAMES[name]}")
    return plain(path, f"{prefix}.{name}.{ATTENTION_NAMES[path[4]]}")


def autoencoder_format(config: Config) -> Format:
    """Name the autoencoder as `AutoencoderKL` and `VQModel` do."""
    last = len(config.autoencoder.channel_multipliers) - 1

    def home(path: Path) -> Home:
        side = path[0]
        if side == "codebook":
            return plain(path, "quantize.embedding")
        if side not in ("encoder", "decoder"):
            return plain(path, side)
        name = path[1]
        if name == "mid":
            return _stage_home(path, f"{side}.mid_block")
        if name in ("conv_in", "conv_out"):
            return plain(path, f"{side}.{name}")
        if name == "norm_out":
            return plain(path, f"{side}.conv_norm_out")
        place, number = name.split("_")
        direction = place.removesuffix("sample")
        block = int(number) if direction == "down" else last - int(number)
        prefix = f"{side}.{direction}_blocks.{block}"
        if place.endswith("sample"):
            return plain(path, f"{prefix}.{place}rs.0.conv")
        return _stage_home(path, prefix)

    return home


def _stage_home(path: Path, prefix: str) -> Home:
    kind, index = path[2].split("_")
    if kind == "attention":
        return fused_attention(path, f"{prefix}.attentions.{index}")
    return plain(path, f"{prefix}.resnets.{index}.{RES_NAMES[path[3]]}")


def rename_old_attention(key: str) -> str:
    """Give a key of an old autoencoder file its present name."""
    return re.sub(
        r"(attentions\.0\.)(query|key|value|proj_attn)\.",
        lambda found: f"{found[1]}{OLD_ATTENTION_NAMES[found[2]]}.",
        key,
    )


def clip_format(prefix: str = "text_model.") -> Format:
    """Name CLIP's text encoder as transformers does.

    Args:
      prefix: Of every key but the projection's.

    Returns:
      The format.
    """

    def home(path: Path) -> Home:
        name = path[0]
        if name.endswith("_embedding"):
            return plain(path, f"{prefix}embeddings.{name}")
        if name == "norm_out":
            return plain(path, f"{prefix}final_layer_norm")
        if name == "projection":
            return plain(path, "text_projection")
        layer = f"{prefix}encoder.layers.{name.removeprefix('layer_')}"
        return plain(path, f"{layer}.{CLIP_NAMES[text_part(path)]}")

    return home


def text_part(path: Path) -> str:
    """Name the part of a text layer that a leaf belongs to: `norm1`, `q`, `mlp_in`."""
    group = path[1]
    if group == "attention":
        return path[2]
    return f"mlp_{path[2]}" if group == "mlp" else group
