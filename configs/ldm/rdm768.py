r"""Images at 768x768 from CLIP embeddings of their neighbours: RDM on kl_f16.

    ldm train --config ldm/rdm768 \
        --workdir runs/rdm768 \
        --first-stage runs/kl_f16

The released config is for sampling only: it gives the networks, the noise schedule, the
latent scale and a learning rate of 1e-4. Batch and steps are not published; the global
batch of 256 and the 500,000 steps here are a guess. See arXiv:2204.11824.

Published: no figures of this model.
The condition is a set of CLIP ViT-L/14 embeddings, here of 20 neighbours; their number
changes no parameter. Without a condition they are zeros.
Data: make `neighbours` with a TFDS builder of your own: images, and for each 20
vectors of length 768 as `embedding`.

Hours: not measured here.
"""

import dataclasses

from ldm_jax.config import (
    CheckpointConfig,
    ConditionConfig,
    Config,
    DataConfig,
    DiffusionConfig,
    LogConfig,
    PreviewConfig,
)
from ldm_jax.config.presets import RDM_LATENT_SCALE, adamw, first_stage


def get_config() -> Config:
    """Return the config."""
    return Config(
        data=DataConfig(
            source="tfds:neighbours",
            image_size=768,
            image_channels=3,
            num_classes=0,
            num_train_examples=0,
        ),
        autoencoder=dataclasses.replace(
            first_stage("kl_f16", image_size=768), latent_scale=RDM_LATENT_SCALE
        ),
        diffusion=DiffusionConfig(
            channels=448,
            channel_multipliers=(1, 2, 3, 4),
            num_res_blocks=2,
            attention_downsampling=(1, 2, 4),
            head_channels=32,
            transformer_depth=1,
            remat=True,
            condition=ConditionConfig(
                context="embedding",
                embedding_width=768,
                embedding_length=20,
                trained=False,
            ),
            condition_dropout=0.1,
            beta_end=0.015,
            batch_size=256,
            steps=500_000,
            optim=adamw(1e-4),
        ),
        checkpoint=CheckpointConfig(every=5000, keep=2),
        log=LogConfig(every=100, images_every=5000),
        sampling=PreviewConfig(chunk=4, grid_steps=50, grid_guidance_scale=5.0),
    )
