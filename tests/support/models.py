"""Small models of every kind, with parameters drawn from their names."""

import dataclasses

import jax
import numpy as np

from ldm_jax.config import (
    AutoencoderConfig,
    ClipConfig,
    ConditionConfig,
    Config,
    DataConfig,
    DiffusionConfig,
    PreviewConfig,
    TextConfig,
)
from ldm_jax.pretrained.layouts import flatten, unflatten
from ldm_jax.pretrained.model_weights import ModelWeights
from ldm_jax.pretrained.open_weights import network_shapes
from tests.support.weights import random_tensors

KL = AutoencoderConfig(
    channels=16,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    latent_channels=4,
    num_groups=8,
    latent_scale=0.5,
)
VQ = dataclasses.replace(
    KL, regularizer="vq", codebook_size=24, latent_channels=3, mid_attention=False
)
CLIP = ClipConfig(
    vocab_size=521, width=16, depth=2, num_heads=2, mlp_width=32, eos_token_id=520
)
TEXT = TextConfig(vocab_size=50, length=6, width=16, depth=2, num_heads=2, head_width=8)
CONDITIONS = {
    "none": ConditionConfig(),
    "label": ConditionConfig(label=True),
    "class": ConditionConfig(context="class", class_width=12),
    "text": ConditionConfig(context="text", text=TEXT),
    "clip": ConditionConfig(context="clip", clip=CLIP, trained=False),
    "open_clip": ConditionConfig(
        context="clip",
        trained=False,
        clip=dataclasses.replace(
            CLIP, depth=3, activation="gelu", output="penultimate"
        ),
    ),
    "segmentation": ConditionConfig(
        concat="segmentation", num_segments=5, rescale_stages=1
    ),
    "masked_image": ConditionConfig(concat="masked_image"),
    "low_resolution": ConditionConfig(concat="low_resolution", low_resolution_factor=2),
    "embedding": ConditionConfig(context="embedding", embedding_width=12),
}


def config_of(kind: str, **fields) -> Config:
    """Return the config of a small model with a kind of condition."""
    condition = CONDITIONS[kind]
    crossed = condition.context != "none"
    second = {
        "channels": 32,
        "channel_multipliers": (1, 2),
        "num_res_blocks": 1,
        "attention_downsampling": (2,),
        "num_heads": 4,
        "head_channels": 8 if kind == "open_clip" else 0,
        "transformer_depth": 1 if crossed else 0,
        "linear_projection": kind == "open_clip",
        "prediction": "v" if kind == "open_clip" else "eps",
        "num_groups": 16,
        "condition": condition,
        **fields,
    }
    return Config(
        data=DataConfig(image_size=16, image_channels=3, num_classes=10),
        autoencoder=VQ if kind == "none" else KL,
        diffusion=DiffusionConfig(**second),
        sampling=PreviewConfig(chunk=2),
    )


def model_of(config: Config, seed: int = 0) -> ModelWeights:
    """Draw a model's parameters; no network is compiled."""
    shapes = network_shapes(config)
    trees = []
    for tree in shapes:
        flat = {key: leaf.shape for key, leaf in flatten(tree).items()}
        # As in `random_tensors`, but with our axes: the fan-in is not the last one.
        reversed_shapes = {_leaf_name(k): s[::-1] for k, s in flat.items()}
        drawn = random_tensors(reversed_shapes, seed)
        trees.append(
            unflatten({k: np.array(drawn[_leaf_name(k)].T, order="C") for k in flat})
        )
    return ModelWeights(config, *trees, config.autoencoder.latent_scale or 1.0)


def _leaf_name(key: str) -> str:
    return key.replace("/", ".")


def same(ours, theirs) -> bool:
    """Tell whether two trees are equal, bit for bit."""
    equal = jax.tree.map(
        lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), ours, theirs
    )
    return all(jax.tree.leaves(equal))
