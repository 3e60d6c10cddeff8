r"""Stable Diffusion 1.5: 512x512 by text, with CLIP ViT-L/14 as it is.

    ldm train --config ldm/sd15 \
        --workdir runs/sd15 \
        --first-stage runs/kl_f8 \
        --diffusion.condition.weights text_encoder \
        --diffusion.condition.tokenizer tokenizer

From its released config and model card: global batch 2048, learning rate 1e-4 after
10,000 steps of warm-up, a tenth of the captions dropped. The released weights saw
237,000 steps at 256x256, then 194,000, 515,000 and 595,000 at 512x512: the steps here
are the sum of the latter.

Published: no FID; guidance scales of 1.5 to 8 compared with 50 PLMS steps. The usual
scale is 7.5.
Data: not in TFDS; make `laion_aesthetics` with a TFDS builder of your own: images, and
the 77 token ids of their captions as `tokens`.

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
from ldm_jax.config.presets import SD_BETAS, SD_LATENT_SCALE, adamw, first_stage


def get_config() -> Config:
    """Return the config."""
    return Config(
        data=DataConfig(
            source="tfds:laion_aesthetics",
            image_size=512,
            image_channels=3,
            num_classes=0,
            num_train_examples=0,
        ),
        autoencoder=dataclasses.replace(
            first_stage("kl_f8", image_size=512), latent_scale=SD_LATENT_SCALE
        ),
        diffusion=DiffusionConfig(
            channels=320,
            channel_multipliers=(1, 2, 4, 4),
            num_res_blocks=2,
            attention_downsampling=(1, 2, 4),
            num_heads=8,
            transformer_depth=1,
            remat=True,
            condition=ConditionConfig(context="clip", trained=False),
            condition_dropout=0.1,
            beta_start=SD_BETAS[0],
            beta_end=SD_BETAS[1],
            batch_size=2048,
            steps=1_304_000,
            optim=adamw(1e-4, warmup_steps=10_000),
        ),
        checkpoint=CheckpointConfig(every=5000, keep=2),
        log=LogConfig(every=100, images_every=5000),
        sampling=PreviewConfig(chunk=4, grid_steps=50, grid_guidance_scale=7.5),
    )
