r"""OpenImages at 256x256 from layouts of boxes: LDM-4 on vq_f4.

    ldm train --config ldm/layout256 \
        --workdir runs/layout256 \
        --first-stage runs/vq_f4

From the released config and arXiv:2112.10752, tab. 15: global batch 24, learning rate
4.8e-5 (2e-6 for each image), 4,400,000 steps; the transformer that reads the boxes is
trained along.

Published (model zoo; tab. 9): FID 32.02, IS 15.92 with 200 DDIM steps, eta 0.
Ours: a tenth of the examples is trained without its layout, for guidance.
Data: make `open_images_layout` with a TFDS builder of your own: images, and as `tokens`
92 ids below 8192, for each box its class, top-left and bottom-right position.

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
    TextConfig,
)
from ldm_jax.config.presets import adamw, first_stage


def get_config() -> Config:
    """Return the config."""
    return Config(
        data=DataConfig(
            source="tfds:open_images_layout",
            test_split="validation",
            image_size=256,
            image_channels=3,
            num_classes=0,
            num_train_examples=1_743_042,
        ),
        autoencoder=first_stage("vq_f4"),
        diffusion=DiffusionConfig(
            channels=128,
            channel_multipliers=(1, 2, 3, 4),
            num_res_blocks=2,
            attention_downsampling=(2, 4, 8),
            head_channels=32,
            transformer_depth=3,
            condition=ConditionConfig(
                context="text",
                text=TextConfig(vocab_size=8192, length=92, width=512, depth=16),
            ),
            condition_dropout=0.1,
            loss="l1",
            beta_end=0.0205,
            batch_size=24,
            steps=4_400_000,
            optim=adamw(4.8e-5),
        ),
        checkpoint=CheckpointConfig(every=5000, keep=2),
        log=LogConfig(every=100, images_every=5000),
        sampling=PreviewConfig(chunk=8, grid_steps=50, grid_guidance_scale=2.0),
    )
