r"""ImageNet at 256x256 by class, for classifier-free guidance: LDM-4 on vq_f4.

    ldm train --config ldm/imagenet256_vq4_cfg \
        --workdir runs/imagenet256_vq4_cfg \
        --first-stage runs/vq_f4

From arXiv:2112.10752, tab. 15: global batch 1200, learning rate 1e-4, 178,000 steps.
The released config is for sampling only; it gives the network, with one head of all
channels, and 1001 classes, the last of which is none.

Published (tab. 10), with 250 DDIM steps: FID 3.60, IS 247.67 at guidance scale 1.5; FID
3.95, IS 178.22 at 1.25; FID 10.56, IS 103.49 without guidance.
How often the published model was trained without its class is not known; here 0.1.

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
        autoencoder=first_stage("vq_f4"),
        diffusion=DiffusionConfig(
            channels=192,
            channel_multipliers=(1, 2, 3, 5),
            num_res_blocks=2,
            attention_downsampling=(2, 4, 8),
            num_heads=1,
            transformer_depth=1,
            condition=ConditionConfig(context="class", class_width=512),
            condition_dropout=0.1,
            batch_size=1200,
            steps=178_000,
            optim=adamw(1e-4),
        ),
        checkpoint=CheckpointConfig(every=5000, keep=2),
        log=LogConfig(every=100, images_every=5000),
        sampling=PreviewConfig(chunk=16, grid_steps=50, grid_guidance_scale=3.0),
    )
