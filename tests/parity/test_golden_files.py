"""The golden files against the libraries they came from.

`python -m tests.parity.test_golden_files` writes them again: diffusers', and
latent-diffusion's where `LDM_ORIGINALS` names its packages (see `compvis_models`).
"""

import jax
import numpy as np
import pytest

from ldm_jax.interop.names import read_tree
from ldm_jax.interop.weights import Tensors
from tests.golden_cases import (
    FORMATS,
    digest,
    make_config,
    make_inputs,
    read_golden,
    run_ours,
    summary,
    summary_error,
    tree_shapes,
    write_golden,
)
from tests.parity import compvis_models

UNET = {
    "channels": 16,
    "channel_multipliers": [1, 2],
    "num_res_blocks": 1,
    "attention_downsampling": [2],
    "num_heads": 2,
    "num_groups": 4,
}
EVERYWHERE = {"attention_downsampling": [1, 2]}
TRANSFORMER = {
    "transformer_depth": 1,
    "condition": {"context": "embedding", "embedding_width": 12},
}
FIRST = {
    "channels": 8,
    "channel_multipliers": [1, 2],
    "num_res_blocks": 1,
    "num_groups": 4,
    "codebook_size": 24,
}
VQ = {"regularizer": "vq", "z_channels": 5}
TEXT = {"vocab_size": 30, "length": 7, "width": 12, "depth": 2, "num_heads": 3}
PENULTIMATE = {"output": "penultimate", "projection_width": 8, "eos_token_id": 29}
PIXELS = {"image_size": 32}


def unet(*, data: dict | None = None, **fields) -> dict:
    fields = {"diffusion": {**UNET, **fields}}
    return {"data": {**PIXELS, **(data or {})}, **fields}


def first_stage(**fields) -> dict:
    return {"data": {"image_size": 16}, "autoencoder": {**FIRST, **fields}}


def conditioner(*, data: dict | None = None, **fields) -> dict:
    fields = {"transformer_depth": 1, "condition": fields}
    return {"data": {**PIXELS, **(data or {})}, "diffusion": fields}


COMPVIS = {
    "heads by number, not at the top": ("unet", unet()),
    "heads by width, three levels": (
        "unet",
        unet(channel_multipliers=[1, 2, 3], head_channels=8, **EVERYWHERE),
    ),
    "resampling in blocks, scale and shift": (
        "unet",
        unet(resblock_updown=True, scale_shift_norm=True, **EVERYWHERE),
    ),
    "resampling in blocks, a masked image": (
        "unet",
        unet(resblock_updown=True, condition={"concat": "masked_image"}),
    ),
    "attention in the middle only, a map": (
        "unet",
        unet(
            num_res_blocks=2,
            attention_downsampling=[8],
            condition={"concat": "segmentation"},
        ),
    ),
    "a class in the time embedding": (
        "unet",
        unet(data={"num_classes": 6}, condition={"label": True}),
    ),
    "one level": (
        "unet",
        unet(channel_multipliers=[1], num_res_blocks=2, attention_downsampling=[1]),
    ),
    "transformers everywhere, heads by width": (
        "unet",
        unet(head_channels=8, **EVERYWHERE, **TRANSFORMER),
    ),
    "transformers of three blocks, not at the top": (
        "unet",
        unet(**{**TRANSFORMER, "transformer_depth": 3}),
    ),
    "transformers of one wide head, 32 groups": (
        "unet",
        unet(channels=32, num_heads=1, num_groups=32, **TRANSFORMER),
    ),
    "kl": ("autoencoder", first_stage()),
    "kl, attention at a height": (
        "autoencoder",
        first_stage(attention_resolutions=[8], latent_channels=4, num_res_blocks=2),
    ),
    "vq, attention at two heights": (
        "autoencoder",
        first_stage(**VQ, attention_resolutions=[16, 8]),
    ),
    "vq, no attention": ("autoencoder", first_stage(**VQ, mid_attention=False)),
    "kl, 32 groups": ("autoencoder", first_stage(channels=32, num_groups=32)),
    "a class as a token": (
        "conditioner",
        conditioner(data={"num_classes": 6}, context="class", class_width=12),
    ),
    "a text": (
        "conditioner",
        conditioner(context="text", text={**TEXT, "head_width": 5}),
    ),
    "a text for Stable Diffusion 2": (
        "conditioner",
        conditioner(
            context="clip",
            clip={**TEXT, "mlp_width": 48, "activation": "gelu", **PENULTIMATE},
        ),
    ),
    "a map": ("conditioner", conditioner(concat="segmentation", num_segments=9)),
}
