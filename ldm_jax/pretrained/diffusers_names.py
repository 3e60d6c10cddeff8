"""Names of our parameters in diffusers and transformers."""

import re

from ldm_jax.config import AutoencoderConfig, ClipConfig, DiffusionConfig
from ldm_jax.pretrained.layouts import (
    Format,
    Kernel,
    Path,
    Same,
    Split,
    Stored,
    module_leaf,
)
from ldm_jax.pretrained.tensors import Tensors

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
"""Self-attention in files written before diffusers 0.15."""
OLD_ATTENTION = re.compile(r"(.*attentions\.\d+\.)(query|key|value|proj_attn)\.")
UNUSED_TEXT_TENSORS = re.compile(
    r"(.*\.)?(position_ids|logit_scale|logit_bias|attn_mask)|"
    r"((transformer|model)\.)?(vision_model|visual_projection|visual)\..*|"
    r"transformer\.to_logits\.(weight|bias)"
)
"""Tensors of a text encoder's or a whole CLIP's file that no text depends on."""
TEXT_PROJECTION = re.compile(r"((transformer|model)\.)?text_projection(\.weight)?")
"""Projection of a text's one vector, which only a pooled output uses."""


def unet_format(diffusion: DiffusionConfig) -> Format:
    """Return the format of `UNet2DModel` and `UNet2DConditionModel`."""
    last = len(diffusion.channel_multipliers) - 1
    ones = 0 if diffusion.linear_projection else 2

    def stored(path: Path) -> Stored:
        head = path[0]
        if head in UNET_NAMES:
            return module_leaf(path, UNET_NAMES[head])
        if resampler := re.fullmatch(r"(down|up)sample_(\d+)", head):
            direction, level = resampler[1], int(resampler[2])
            block = level if direction == "down" else last - level
            prefix = f"{direction}_blocks.{block}.{direction}samplers.0"
            name = path[1]
            return module_leaf(path, f"{prefix}.{RES_NAMES.get(name, name)}")
        place, *numbers = head.split("_")
        if place == "mid":
            prefix, index = "mid_block", int(numbers[0])
        else:
            level, index = map(int, numbers)
            block = level if place == "down" else last - level
            prefix = f"{place}_blocks.{block}"
        return _level_leaf(path, prefix, index, ones)

    return stored


def _level_leaf(path: Path, prefix: str, index: int, ones: int) -> Stored:
    part = path[1]
    if part == "res":
        return module_leaf(path, f"{prefix}.resnets.{index}.{RES_NAMES[path[2]]}")
    prefix = f"{prefix}.attentions.{index}"
    if part == "attention":
        return _attention_leaf(path, prefix)
    return transformer_leaf(path, prefix, ones)


def _attention_leaf(path: Path, prefix: str) -> Stored:
    """Store a self-attention with fused q, k, v as three separate projections."""
    name, leaf = path[-2:]
    if name != "qkv":
        suffix = "group_norm" if name == "norm" else "to_out.0"
        return module_leaf(path, f"{prefix}.{suffix}")
    usual = "bias" if leaf == "bias" else "weight"
    keys = tuple(f"{prefix}.to_{part}.{usual}" for part in "qkv")
    return Stored(keys, Split(3, Kernel() if leaf == "kernel" else Same()))


def transformer_leaf(path: Path, prefix: str, ones: int) -> Stored:
    """Store a leaf of a spatial transformer; CompVis uses the same names.

    Args:
      path: Our path, from the level block on.
      prefix: Their name of the transformer.
      ones: Trailing axes of its projections: 2 as 1x1 convolutions, 0 as matrices.
    """
    name = path[2]
    if not name.startswith("block_"):
        is_projection = name.startswith("proj")
        return module_leaf(path, f"{prefix}.{name}", ones=ones if is_projection else 0)
    prefix = f"{prefix}.transformer_blocks.{name.removeprefix('block_')}"
    name = path[3]
    if name in TRANSFORMER_BLOCK_NAMES:
        return module_leaf(path, f"{prefix}.{TRANSFORMER_BLOCK_NAMES[name]}")
    return module_leaf(path, f"{prefix}.{name}.{ATTENTION_NAMES[path[4]]}")


def autoencoder_format(autoencoder: AutoencoderConfig) -> Format:
    """Return the format of `AutoencoderKL` and `VQModel`."""
    last = len(autoencoder.channel_multipliers) - 1

    def stored(path: Path) -> Stored:
        side = path[0]
        if side == "codebook":
            return module_leaf(path, "quantize.embedding")
        if side not in ("encoder", "decoder"):
            return module_leaf(path, side)
        name = path[1]
        if name == "mid":
            return _autoencoder_block_leaf(path, f"{side}.mid_block")
        if name in ("conv_in", "conv_out"):
            return module_leaf(path, f"{side}.{name}")
        if name == "norm_out":
            return module_leaf(path, f"{side}.conv_norm_out")
        place, number = name.split("_")
        direction = place.removesuffix("sample")
        block = int(number) if direction == "down" else last - int(number)
        prefix = f"{side}.{direction}_blocks.{block}"
        if place.endswith("sample"):
            return module_leaf(path, f"{prefix}.{place}rs.0.conv")
        return _autoencoder_block_leaf(path, prefix)

    return stored


def _autoencoder_block_leaf(path: Path, prefix: str) -> Stored:
    kind, index = path[2].split("_")
    if kind == "attention":
        return _attention_leaf(path, f"{prefix}.attentions.{index}")
    return module_leaf(path, f"{prefix}.resnets.{index}.{RES_NAMES[path[3]]}")


def rename_old_attention(tensors: Tensors) -> Tensors:
    """Give the attention of an old file of any network its present names."""
    renamed = {
        OLD_ATTENTION.sub(lambda m: f"{m[1]}{OLD_ATTENTION_NAMES[m[2]]}.", key): entry
        for key, entry in tensors.entries.items()
    }
    return Tensors(renamed, tensors.metadata)


def text_tensors(tensors: Tensors, clip: ClipConfig | None) -> Tensors:
    """Return the tensors of a text encoder's file that its output may depend on.

    Args:
      clip: Config of CLIP; None for another text encoder.
    """
    is_projected = clip is not None and clip.output == "pooled"
    entries = {
        key: entry
        for key, entry in tensors.entries.items()
        if not UNUSED_TEXT_TENSORS.fullmatch(key)
        and (is_projected or not TEXT_PROJECTION.fullmatch(key))
    }
    return Tensors(entries, tensors.metadata)


def clip_format(prefix: str = "text_model.") -> Format:
    """Return the format of CLIP's text encoder in transformers.

    Args:
      prefix: Prefix of every key but the projection's.
    """

    def stored(path: Path) -> Stored:
        name = path[0]
        if name.endswith("_embedding"):
            return module_leaf(path, f"{prefix}embeddings.{name}")
        if name == "norm_out":
            return module_leaf(path, f"{prefix}final_layer_norm")
        if name == "projection":
            return module_leaf(path, "text_projection")
        layer = f"{prefix}encoder.layers.{name.removeprefix('layer_')}"
        return module_leaf(path, f"{layer}.{CLIP_NAMES[text_part(path)]}")

    return stored


def text_part(path: Path) -> str:
    """Return the part of a text layer of a leaf, such as `norm1`, `q` or `mlp_in`."""
    group = path[1]
    if group == "attention":
        return path[2]
    return f"mlp_{path[2]}" if group == "mlp" else group
