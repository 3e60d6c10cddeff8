r"""LSUN-Churches at 256x256, without conditions: LDM-8 on kl_f8.

    ldm train --config ldm/lsun_churches256_kl8 \
        --workdir runs/lsun_churches256_kl8 \
        --first-stage runs/kl_f8

From the released config and arXiv:2112.10752, tab. 12: global batch 96, learning rate
5e-5 after 10,000 steps of warm-up, 500,000 steps. The rate is absolute: a comment in
the released config says to switch off its scaling by the batch.

Published: FID 4.02, IS 2.72, precision 0.64, recall 0.52 with DDIM at eta 0, in 400
steps (model zoo) or 200 (tab. 1).
Latents are scaled by their measured standard deviation, as published.
Data: the published model held out images of its own choice; here LSUN's validation
images are held out.

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
            source="tfds:lsun/church_outdoor",
            test_split="validation",
            image_size=256,
            image_channels=3,
            num_classes=0,
            num_train_examples=126_227,
        ),
        autoencoder=first_stage("kl_f8"),
        diffusion=DiffusionConfig(
            channels=192,
            channel_multipliers=(1, 2, 2, 4, 4),
            num_res_blocks=2,
            attention_downsampling=(1, 2, 4, 8),
            num_heads=8,
            scale_shift_norm=True,
            resblock_updown=True,
            condition_dropout=0.0,
            loss="l1",
            beta_end=0.0155,
            batch_size=96,
            steps=500_000,
            optim=adamw(5e-5, warmup_steps=10_000),
        ),
        checkpoint=CheckpointConfig(every=5000, keep=2),
        log=LogConfig(every=100, images_every=5000),
        sampling=PreviewConfig(chunk=16, grid_steps=50, grid_guidance_scale=1.0),
    )
