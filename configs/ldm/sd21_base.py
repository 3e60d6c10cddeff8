r"""Stable Diffusion 2.1 base: 512x512 by text, with OpenCLIP ViT-H/14 as it is.

    ldm train --config ldm/sd21_base \
        --workdir runs/sd21_base \
        --first-stage runs/kl_f8 \
        --diffusion.condition.weights text_encoder \
        --diffusion.condition.tokenizer tokenizer

From its model card: global batch 2048, learning rate 1e-4 after 10,000 steps of
warm-up. The released weights saw 550,000 steps at 256x256, then 850,000 and, as 2.1,
220,000 at 512x512: the steps here are the sum of the latter. How many captions were
dropped is not published; here a tenth, as in version 1.

Published: no FID; guidance scales of 1.5 to 8 compared with 50 DDIM steps.
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
from ldm_jax.config.presets import (
    OPENCLIP_H,
    SD_BETAS,
    SD_LATENT_SCALE,
    adamw,
    first_stage,
)


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
            head_channels=64,
            transformer_depth=1,
            linear_projection=True,
            remat=True,
            condition=ConditionConfig(context="clip", clip=OPENCLIP_H, trained=False),
            condition_dropout=0.1,
            prediction="eps",
            beta_start=SD_BETAS[0],
            beta_end=SD_BETAS[1],
            batch_size=2048,
            steps=1_070_000,
            optim=adamw(1e-4, warmup_steps=10_000),
        ),
        checkpoint=CheckpointConfig(every=5000, keep=2),
        log=LogConfig(every=100, images_every=5000),
        sampling=PreviewConfig(chunk=4, grid_steps=50, grid_guidance_scale=7.5),
    )
