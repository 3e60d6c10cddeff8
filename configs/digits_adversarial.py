"""Handwritten digits, 32x32 grey, with a discriminator from half of stage 1 on."""

import dataclasses

from configs import digits
from ldm_jax.config import AdversaryConfig, Config, OptimConfig


def get_config() -> Config:
    """Return the config."""
    config = digits.get_config()
    adversary = AdversaryConfig(
        enabled=True,
        start_step=250,
        ramp_steps=50,
        weight=0.5,
        channels=16,
        num_layers=2,
        optim=OptimConfig(lr=5e-4, b1=0.5, b2=0.9, clip_norm=0.0),
    )
    first = dataclasses.replace(config.autoencoder, steps=500, adversary=adversary)
    return dataclasses.replace(config, autoencoder=first)
