r"""CelebA-HQ at 256x256, without conditions: LDM-4 on vq_f4.

    ldm train --config ldm/celebahq256_vq4 \
        --workdir runs/celebahq256_vq4 \
        --first-stage runs/vq_f4

From the released config and arXiv:2112.10752, tab. 12: global batch 48, learning rate
9.6e-5 (2e-6 for each image), 410,000 steps.

Published: FID 5.11, IS 3.29, precision 0.72, recall 0.49 with DDIM at eta 0, in 200
steps (model zoo) or 500 (tab. 1).
Data: 25,000 images to train on and 5,000 held out, as published, but not the same ones.

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
            source="tfds:celeb_a_hq/256",
            train_split="train[:25000]",
            test_split="train[25000:]",
            image_size=256,
            image_channels=3,
            num_classes=0,
            num_train_examples=25_000,
        ),
        autoencoder=first_stage("vq_f4"),
        diffusion=DiffusionConfig(
            channels=224,
            channel_multipliers=(1, 2, 3, 4),
            num_res_blocks=2,
            attention_downsampling=(2, 4, 8),
            head_channels=32,
            condition_dropout=0.0,
            batch_size=48,
            steps=410_000,
            optim=adamw(9.6e-5),
        ),
        checkpoint=CheckpointConfig(every=5000, keep=2),
        log=LogConfig(every=100, images_every=5000),
        sampling=PreviewConfig(chunk=16, grid_steps=50, grid_guidance_scale=1.0),
    )
