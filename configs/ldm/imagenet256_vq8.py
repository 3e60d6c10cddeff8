r"""ImageNet at 256x256 by class, through cross-attention: LDM-8 on vq_f8.

    ldm train --config ldm/imagenet256_vq8 \
        --workdir runs/imagenet256_vq8 \
        --first-stage runs/vq_f8

From the released config: global batch 64, learning rate 6.4e-5 (1e-6 for each image).
From arXiv:2112.10752, tab. 10: 4,800,000 steps; its tab. 13 compares models at 2M.

Published (model zoo), with 200 DDIM steps, eta 1: FID 15.82, IS 78.82; with guidance by
a classifier, which this library lacks, FID 7.77, IS 201.56. Tab. 10 has FID 15.51 and
7.76.
Ours: a tenth of the examples is trained without its class, so that classifier-free
guidance works; the class embedding has one row more for it.

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
            source="tfds:imagenet2012",
            test_split="validation",
            image_size=256,
            image_channels=3,
            num_classes=1000,
            num_train_examples=1_281_167,
        ),
        autoencoder=first_stage("vq_f8"),
        diffusion=DiffusionConfig(
            channels=256,
            channel_multipliers=(1, 2, 4),
            num_res_blocks=2,
            attention_downsampling=(1, 2, 4),
            head_channels=32,
            transformer_depth=1,
            condition=ConditionConfig(context="class", class_width=512),
            condition_dropout=0.1,
            batch_size=64,
            steps=4_800_000,
            optim=adamw(6.4e-5),
        ),
        checkpoint=CheckpointConfig(every=5000, keep=2),
        log=LogConfig(every=100, images_every=5000),
        sampling=PreviewConfig(chunk=16, grid_steps=50, grid_guidance_scale=3.0),
    )
