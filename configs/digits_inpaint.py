"""Holes in handwritten digits, filled by a model of inpainting, on two CPU cores.

    ldm train --config digits_inpaint --workdir runs/digits_inpaint
    ldm sample --workdir runs/digits_inpaint --image digit.png --mask mask.png

Stage 1 is that of `digits.py`; to use a trained one: --first-stage runs/digits.
The UNet sees the image with its hole, and the hole, beside the noise. The figures
are in docs/reference/benchmarks.md.
"""

from ldm_jax.config import (
    AutoencoderConfig,
    CheckpointConfig,
    ConditionConfig,
    Config,
    DataConfig,
    DiffusionConfig,
    LogConfig,
    OptimConfig,
    PreviewConfig,
)


def get_config() -> Config:
    """Return the config."""
    return Config(
        seed=0,
        data=DataConfig(
            source="tfds:digits", image_size=32, image_channels=1, num_classes=10
        ),
        autoencoder=AutoencoderConfig(
            channels=16,
            channel_multipliers=(1, 2, 2),
            num_res_blocks=1,
            latent_channels=3,
            num_groups=8,
            reconstruction_loss="l2",
            kl_weight=5e-6,
            batch_size=16,
            steps=400,
            scale_batches=40,
            optim=OptimConfig(
                lr=2e-3, warmup_steps=20, decay_steps=150, b2=0.99, ema_decay=0.99
            ),
        ),
        diffusion=DiffusionConfig(
            channels=48,
            channel_multipliers=(1, 2),
            num_res_blocks=1,
            attention_downsampling=(2,),
            num_heads=4,
            num_groups=16,
            condition=ConditionConfig(concat="masked_image"),
            condition_dropout=0.0,
            prediction="v",
            batch_size=32,
            steps=1200,
            optim=OptimConfig(
                lr=1e-3,
                warmup_steps=50,
                decay_steps=400,
                weight_decay=0.0,
                ema_decay=0.998,
            ),
        ),
        checkpoint=CheckpointConfig(every=200, keep=2),
        log=LogConfig(every=10, images_every=600),
        sampling=PreviewConfig(chunk=16, grid_steps=20),
    )
