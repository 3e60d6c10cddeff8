r"""FFHQ at 256x256, without conditions: LDM-4 on vq_f4.

    ldm train --config ldm/ffhq256_vq4 \
        --workdir runs/ffhq256_vq4 \
        --first-stage runs/vq_f4

From the released config and arXiv:2112.10752, tab. 12: global batch 42, learning rate
8.4e-5 (2e-6 for each image), 635,000 steps.

Published (model zoo; tab. 1): FID 4.98, IS 4.50, precision 0.73, recall 0.50 with 200
DDIM steps, eta 1.
Data: not in TFDS; make `ffhq` with a TFDS builder of your own: 60,000 images to train
on and 10,000 held out, as published.

Hours: not measured here.
"""

from ldm_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    DiffusionConfig,
    LogConfig,
    PreviewConfig,
)
from ldm_jax.config.presets import adamw, first_stage


def get_config() -> Config:
    """Return the config."""
    return Config(
        data=DataConfig(
            source="tfds:ffhq",
            image_size=256,
            image_channels=3,
            num_classes=0,
            num_train_examples=60_000,
        ),
        autoencoder=first_stage("vq_f4"),
        diffusion=DiffusionConfig(
            channels=224,
            channel_multipliers=(1, 2, 3, 4),
            num_res_blocks=2,
            attention_downsampling=(2, 4, 8),
            head_channels=32,
            condition_dropout=0.0,
            batch_size=42,
            steps=635_000,
            optim=adamw(8.4e-5),
        ),
        checkpoint=CheckpointConfig(every=5000, keep=2),
        log=LogConfig(every=100, images_every=5000),
        sampling=PreviewConfig(chunk=14, grid_steps=50, grid_guidance_scale=1.0),
    )
