"""Formulas in the place of networks: a whole command, compiled in a blink."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from ldm_jax import edit, generate, inversion, studio
from ldm_jax.config import ConditionConfig, Config
from ldm_jax.training.parallel import PmapLayout
from tests import tiny

FACTOR = 2  # of the autoencoder of `tests.tiny`


def config_with(condition: ConditionConfig | None = None, **diffusion: Any) -> Config:
    """Return `tests.tiny` with one level of a UNet, and another condition."""
    config = tiny.get_config()
    first = dataclasses.replace(config.autoencoder, mid_attention=False)
    second = dataclasses.replace(
        config.diffusion,
        channel_multipliers=(1,),
        condition=condition or ConditionConfig(label=True),
        **diffusion,
    )
    return dataclasses.replace(config, autoencoder=first, diffusion=second)


def denoiser_of(networks: Any, params: Any) -> Any:
    """Make a denoiser that depends on all that a UNet does."""
    weight = jax.tree.leaves(params.unet)[0].ravel()[0]

    def denoise(x_t, t, cond):
        told = jnp.zeros(x_t.shape[0])
        if cond.label is not None:
            told = cond.label.astype(jnp.float32)
            if told.ndim == 2:
                told = (told * jnp.arange(told.shape[1], dtype=jnp.float32)).sum(1)
        told = jnp.sin(told) + t.astype(jnp.float32) / 1000.0
        return jnp.tanh(x_t * (1.0 + weight) + 0.3 * told[:, None, None, None])

    return denoise


def encode_images(networks: Any, params: Any, images: Any) -> Any:
    """Take every other pixel, in every channel of a latent."""
    return jnp.repeat(images[:, ::FACTOR, ::FACTOR], networks.latent_shape[-1], axis=-1)


def decode(networks: Any, params: Any, latents: Any, *, tile: int = 0) -> Any:
    """Double a latent's first channel."""
    pixels = latents[..., :1].repeat(FACTOR, axis=1).repeat(FACTOR, axis=2)
    return jnp.clip(pixels, -1.0, 1.0)


def one_device() -> PmapLayout:
    return PmapLayout(jax.devices()[:1])


@contextmanager
def no_networks() -> Iterator[None]:
    """Put the formulas in place, on one device."""
    with pytest.MonkeyPatch.context() as patch:
        for room in (generate, inversion):
            patch.setattr(room, "denoiser_of", denoiser_of)
        for room in (edit, inversion):
            patch.setattr(room, "encode_images", encode_images)
        patch.setattr(generate, "decode", decode)
        patch.setattr(studio, "PmapLayout", one_device)
        yield
