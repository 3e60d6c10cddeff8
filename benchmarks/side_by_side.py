"""Shared by benchmarks against diffusers: models, weights, and taking turns."""

import importlib
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from ldm_jax.config import (
    AutoencoderConfig,
    ConditionConfig,
    Config,
    DataConfig,
    DiffusionConfig,
)
from ldm_jax.pretrained.model_weights import ModelWeights
from ldm_jax.pretrained.open_weights import network_shapes

LATENT_SCALE = 0.5
REST, SHORTEST = 0.3, 0.5
"""Seconds before each turn, and of the shortest."""


class Peers(NamedTuple):
    """The libraries that we are compared with."""

    torch: Any
    """PyTorch."""
    diffusers: Any
    """Its diffusion models."""
    device: str
    """Where they compute: `cuda` or `cpu`."""


def import_peers() -> Peers:
    """Import torch and diffusers, by name: the extra `parity` may not be installed."""
    torch: Any = importlib.import_module("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        diffusers: Any = importlib.import_module("diffusers")
    torch.set_float32_matmul_precision("high")  # JAX's default on GPUs too
    return Peers(torch, diffusers, "cuda" if torch.cuda.is_available() else "cpu")


def text_config() -> Config:
    """Return a small text-to-image model: cross-attention to 77 vectors everywhere."""
    return Config(
        data=DataConfig(image_size=64, image_channels=3),
        autoencoder=AutoencoderConfig(
            channels=32, channel_multipliers=(1, 2, 4), num_res_blocks=1,
            latent_channels=4, num_groups=16, latent_scale=LATENT_SCALE,
        ),
        diffusion=DiffusionConfig(
            channels=64, channel_multipliers=(1, 2, 4), num_res_blocks=1,
            attention_downsampling=(1, 2, 4), num_heads=4, transformer_depth=1,
            num_groups=32,
            condition=ConditionConfig(
                context="embedding", embedding_length=77, embedding_width=256
            ),
        ),
    )  # fmt: skip


def draw_model(config: Config) -> ModelWeights:
    """Draw parameters that keep the scale of what goes through: no layer is zero."""
    random = np.random.Generator(np.random.SFC64(0))

    def draw(path: tuple[Any, ...], leaf: Any) -> np.ndarray:
        name, shape = path[-1].key, leaf.shape
        if name == "kernel":
            deviation = np.float32(np.prod(shape[:-1]) ** -0.5)
            return random.standard_normal(shape, np.float32) * deviation
        if name == "bias":
            return np.zeros(shape, np.float32)
        return np.ones(shape, np.float32)

    shapes = network_shapes(config)
    first, second, conditioner = (
        jax.tree_util.tree_map_with_path(draw, tree) for tree in shapes
    )
    return ModelWeights(config, first, second, conditioner, LATENT_SCALE)


def alternate(
    draws: dict[str, Callable[[], Any]], *, rounds: int
) -> dict[str, list[float]]:
    """Time everything once a round, so that a slow moment of the machine hits all.

    Before each the machine rests, as threads of one library linger and disturb the
    next; what is short is done several times.

    Args:
      draws: What to time; each was called before.
      rounds: How often.

    Returns:
      Seconds of each round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in draws}
    for _ in range(rounds):
        for name, draw in draws.items():
            time.sleep(REST)
            draw()
            times, began = 0, time.perf_counter()
            while not times or time.perf_counter() - began < SHORTEST:
                draw()
                times += 1
            seconds[name].append((time.perf_counter() - began) / times)
    return seconds
