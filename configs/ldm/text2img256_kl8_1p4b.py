r"""LAION-400M at 256x256 by text: LDM-8 on kl_f8, 1.45 billion parameters.

    ldm train --config ldm/text2img256_kl8_1p4b \
        --workdir runs/text2img256_kl8_1p4b \
        --first-stage runs/kl_f8 \
        --diffusion.condition.tokenizer bert_base_uncased

From arXiv:2112.10752, tab. 15: global batch 680, learning rate 1e-4, 390,000 steps; the
text transformer is trained along. The released config is for sampling only; it gives
the networks, the noise schedule and the latent scale.

Published (tab. 2), on COCO with 250 DDIM steps: FID 12.63, IS 30.29 at guidance scale
1.5; FID 23.31, IS 20.03 without guidance.
How often the published model was trained without its caption is not known; here 0.1.
Data: not in TFDS; make `laion400m` with a TFDS builder of your own: images, and the 77
token ids of their captions as `tokens`.

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
    TextConfig,
)
from ldm_jax.config.presets import SD_BETAS, SD_LATENT_SCALE, adamw, first_stage


def get_config() -> Config:
    """Return the config."""
    return Config(
        data=DataConfig(
            source="tfds:laion400m",
            image_size=256,
            image_channels=3,
            num_classes=0,
            num_train_examples=0,
        ),
        autoencoder=dataclasses.replace(
            first_stage("kl_f8"), latent_scale=SD_LATENT_SCALE
        ),
        diffusion=DiffusionConfig(
            channels=320,
            channel_multipliers=(1, 2, 4, 4),
            num_res_blocks=2,
            attention_downsampling=(1, 2, 4),
            num_heads=8,
            transformer_depth=1,
            remat=True,
            condition=ConditionConfig(
                context="text", text=TextConfig(width=1280, depth=32)
            ),
            condition_dropout=0.1,
            beta_start=SD_BETAS[0],
            beta_end=SD_BETAS[1],
            batch_size=680,
            steps=390_000,
            optim=adamw(1e-4),
        ),
        checkpoint=CheckpointConfig(every=5000, keep=2),
        log=LogConfig(every=100, images_every=5000),
        sampling=PreviewConfig(chunk=8, grid_steps=50, grid_guidance_scale=5.0),
    )
