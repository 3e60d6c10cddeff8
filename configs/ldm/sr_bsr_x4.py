r"""Super-resolution from 64x64 to 256x256 on OpenImages: LDM-4 on vq_f4.

    ldm train --config ldm/sr_bsr_x4 \
        --workdir runs/sr_bsr_x4 \
        --first-stage runs/vq_f4

From the released config: global batch 64, learning rate 6.4e-5 (1e-6 for each image).
From arXiv:2112.10752, tab. 15, of the same network on ImageNet: 860,000 steps.

Published: nothing of this model. The one of tab. 5, trained on images made small by
bicubic interpolation, has FID 2.8 and 4.8 (against validation and training images), IS
166.3, PSNR 24.4, SSIM 0.69 with 100 steps.
Ours: the small image is the mean of blocks of 4x4 pixels. The published model's images
were made small by a milder form of BSRGAN's blur, noise and JPEG compression.

Hours: not measured here.
"""

from ldm_jax.config import (
    CheckpointConfig,
    ConditionConfig,
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
            source="tfds:open_images_v4",
            test_split="validation",
            image_size=256,
            image_channels=3,
            num_classes=0,
            num_train_examples=1_743_042,
        ),
        autoencoder=first_stage("vq_f4"),
        diffusion=DiffusionConfig(
            channels=160,
            channel_multipliers=(1, 2, 2, 4),
            num_res_blocks=2,
            attention_downsampling=(8, 16),
            head_channels=32,
            condition=ConditionConfig(concat="low_resolution", low_resolution_factor=4),
            condition_dropout=0.0,
            beta_end=0.0155,
            batch_size=64,
            steps=860_000,
            optim=adamw(6.4e-5),
        ),
        checkpoint=CheckpointConfig(every=5000, keep=2),
        log=LogConfig(every=100, images_every=5000),
        sampling=PreviewConfig(chunk=16, grid_steps=50, grid_guidance_scale=1.0),
    )
