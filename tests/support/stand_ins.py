"""Formulas in place of networks, so that a whole command compiles fast."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.config import ConditionConfig, Config
from ldm_jax.images import write_png
from ldm_jax.models.tiled_decoding import decode_in_tiles
from ldm_jax.parallel.make_layout import PmapLayout
from ldm_jax.sampling import editing as edit
from ldm_jax.sampling import editing as inversion
from ldm_jax.sampling import pipeline as pipeline
from ldm_jax.sampling import program as chunk
from ldm_jax.sampling import sample_fn as generate
from tests.support import tiny

SIDE = 8  # of the images of `tests.support.tiny`
FACTOR = 2  # of the autoencoder of `tests.support.tiny`
MADE: dict[Any, Any] = {}


def picture(path: Any, *, height: int = SIDE, width: int = SIDE, seed: int = 0) -> Any:
    """Write a grey image of noise."""
    pixels = np.random.RandomState(seed).randint(0, 256, (height, width, 1))
    write_png(path, pixels.astype(np.uint8))
    return path


def config_with(condition: ConditionConfig | None = None, **diffusion: Any) -> Config:
    """Return `tests.support.tiny` with one level of a UNet, and another condition."""
    config = tiny.get_config()
    first = dataclasses.replace(config.autoencoder, mid_attention=False)
    second = {
        "channel_multipliers": (1,),
        "condition": condition or ConditionConfig(label=True),
        "prediction": "x0",
        **diffusion,
    }
    return dataclasses.replace(
        config,
        autoencoder=first,
        diffusion=dataclasses.replace(config.diffusion, **second),
    )


def denoiser_of(model: Any, params: Any) -> Any:
    """Make a denoiser that depends on all inputs of a UNet."""
    kernel = params.unet["conv_in"]["kernel"][1, 1]

    def denoise(x_t, t, cond):
        offset = t.astype(jnp.float32) / 1000.0
        if cond.label is not None:
            label = cond.label.astype(jnp.float32)
            if label.ndim == 2:
                label = (label * jnp.arange(label.shape[1], dtype=jnp.float32)).sum(1)
            offset = offset + jnp.sin(label)
        if cond.context is not None:
            offset = offset + cond.context[..., 0].mean(axis=1)
        seen = [x_t] if cond.concat is None else [x_t, cond.concat]
        features = jnp.concatenate(seen, axis=-1) @ kernel
        mixed = 0.3 * (features[..., : x_t.shape[-1]] + x_t)
        return jnp.tanh(mixed + 0.2 * offset[:, None, None, None])

    return denoise


def encode_images(model: Any, params: Any, images: Any) -> Any:
    """Take every other pixel, in every channel of a latent."""
    return jnp.repeat(images[:, ::FACTOR, ::FACTOR], model.latent_shape[-1], axis=-1)


def double(latents: Any) -> Any:
    """Double a latent's first channel."""
    return latents[..., :1].repeat(FACTOR, axis=1).repeat(FACTOR, axis=2)


def decode(model: Any, params: Any, latents: Any, *, tile: int = 0) -> Any:
    """Double a latent's first channel, at once or tile by tile."""
    if tile:
        pixels = decode_in_tiles(double, latents, tile=tile, factor=FACTOR)
    else:
        pixels = double(latents)
    return jnp.clip(pixels, -1.0, 1.0)


def one_device() -> PmapLayout:
    return PmapLayout(jax.devices()[:1])


def make_once(model: Any, *, weak: Any, layout: Any, **settings: Any) -> Any:
    """Make a sample function, cached by model and settings."""
    pair = [n and n._replace(schedule=None) for n in (model, weak)]
    key = (*pair, *sorted(settings.items()))
    if key not in MADE:
        MADE[key] = generate.make_sample_fn(model, weak=weak, layout=layout, **settings)
    return MADE[key]


@contextmanager
def no_networks() -> Iterator[None]:
    """Replace the networks by formulas, on one device, with cached sample functions."""
    with pytest.MonkeyPatch.context() as patch:
        for room in (chunk, inversion):
            patch.setattr(room, "denoiser_of", denoiser_of)
        for room in (edit, inversion):
            patch.setattr(room, "encode_images", encode_images)
        patch.setattr(chunk, "decode", decode)
        patch.setattr(pipeline, "PmapLayout", one_device)
        patch.setattr(pipeline, "make_sample_fn", make_once)
        yield
