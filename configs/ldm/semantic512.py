r"""Landscapes at 512x512 from segmentation maps: LDM-4 on vq_f4.

    ldm train --config ldm/semantic512 \
        --workdir runs/semantic512 \
        --first-stage runs/vq_f4

From the released config: global batch 8, learning rate 8e-6 (1e-6 for each image). The
steps are not published; the 100,000 here are a guess. The released weights were
fine-tuned from those of the 256x256 model, whose network is the same.
The published attention levels, 8, 16 and 32, lie below the network's three, so that
only its middle has attention.

Published: no figures.
Data: not in TFDS; make `landscapes` with a TFDS builder of your own: images, and maps
of 182 classes as `segmentation`. The published model saw crops of images at 768 pixels.

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
            source="tfds:landscapes",
            test_split="validation",
            image_size=512,
            image_channels=3,
            num_classes=0,
            num_train_examples=0,
        ),
        autoencoder=first_stage("vq_f4", image_size=512),
        diffusion=DiffusionConfig(
            channels=128,
            channel_multipliers=(1, 4, 8),
            num_res_blocks=2,
            attention_downsampling=(8, 16, 32),
            num_heads=8,
            condition=ConditionConfig(
                concat="segmentation",
                num_segments=182,
                rescale_stages=2,
                rescale_channels=3,
            ),
            condition_dropout=0.0,
            loss="l1",
            beta_end=0.0205,
            batch_size=8,
            steps=100_000,
            optim=adamw(8e-6),
        ),
        checkpoint=CheckpointConfig(every=5000, keep=2),
        log=LogConfig(every=100, images_every=5000),
        sampling=PreviewConfig(chunk=4, grid_steps=50, grid_guidance_scale=1.0),
    )
