"""Handwritten digits, 32x32 grey, with a codebook in place of the Gaussian.

    ldm train --config digits_vq --workdir runs/digits_vq

Stage 2 is that of `digits.py`. Measured on two CPU cores that others used too: 86 s for
stage 1, 267 s for stage 2. The held-out digits come back at 35.8 dB, and the latents of
a batch, 1024 of them, fall on 87 codes, effectively, of 256 (`perplexity`); with seeds
1 and 2 at 38.2 and 35.5 dB, on 109 and 96. `benchmarks/digits_quality.py` reads 99.7 %
of the guided samples right and 90.3 % of the unguided.
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
            regularizer="vq",
            channels=16,
            channel_multipliers=(1, 2, 2),
            num_res_blocks=1,
            latent_channels=3,
            num_groups=8,
            reconstruction_loss="l2",
            codebook_size=256,
            # Codes start within 1/256 of 0 and Adam moves them by its rate a step. The
            # paper's beta, 0.25, leaves the latents so far out that a few codes serve
            # them all; 1 draws them in and more codes into use.
            commitment_beta=1.0,
            batch_size=16,
            steps=500,
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
            condition=ConditionConfig(label=True),
            batch_size=32,
            steps=1350,
            optim=OptimConfig(
                lr=1e-3,
                warmup_steps=50,
                decay_steps=350,
                weight_decay=0.0,
                ema_decay=0.998,
            ),
        ),
        checkpoint=CheckpointConfig(every=200, keep=2),
        log=LogConfig(every=10, images_every=675),
        sampling=PreviewConfig(chunk=16, grid_steps=20, grid_guidance_scale=2.0),
    )
