r"""Inpainting at 256x256 on Places: the big LDM-4 on vq_f4_noattn.

    ldm train --config ldm/inpaint_big \
        --workdir runs/inpaint_big \
        --first-stage runs/vq_f4_noattn

From arXiv:2112.10752, tab. 15, of the smaller inpainting model: global batch 128,
learning rate 1e-6, 360,000 steps. The released config of this one gives neither batch
nor steps; its rate, 1e-6 for each image, is multiplied by 0.001 to 0.1 in a warm-up of
1000 steps, then falls by a cosine to 0.0001 at step 50,000. Here the rate rises to 1e-6
in 1000 steps and stays.

Published (tab. 7), on 512x512 crops of Places: FID 1.50, LPIPS 0.137 after half an
epoch more at 512x512, FID 2.40, LPIPS 0.142 before it.
Ours: a hole is one rectangle. The published model's holes are LaMa's, of many shapes.

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
            source="tfds:places365_small",
            test_split="validation",
            image_size=256,
            image_channels=3,
            num_classes=0,
            num_train_examples=1_803_460,
        ),
        autoencoder=first_stage("vq_f4_noattn"),
        diffusion=DiffusionConfig(
            channels=256,
            channel_multipliers=(1, 2, 3, 4),
            num_res_blocks=2,
            attention_downsampling=(2, 4, 8),
            num_heads=8,
            resblock_updown=True,
            condition=ConditionConfig(concat="masked_image"),
            condition_dropout=0.0,
            loss="l1",
            beta_end=0.0205,
            batch_size=128,
            steps=360_000,
            optim=adamw(1e-6, warmup_steps=1000),
        ),
        checkpoint=CheckpointConfig(every=5000, keep=2),
        log=LogConfig(every=100, images_every=5000),
        sampling=PreviewConfig(chunk=16, grid_steps=50, grid_guidance_scale=1.0),
    )
