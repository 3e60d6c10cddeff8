r"""Handwritten digits, 32x32 grey, with a discriminator in the second half of stage 1.

    ldm train --config digits_adversarial \
        --workdir runs/digits_adversarial

Stage 2 is that of `digits.py`. Measured on two CPU cores that others used too: 151 s
for stage 1, 298 s for stage 2. `benchmarks/adversarial_switch.py` measures the held-out
digits at step 250, just before the discriminator is switched on, and at the end: 36.8
and 39.7 dB with seed 0, 36.5 and 39.7 with seed 1, 36.0 and 38.9 with seed 2, never
below the first in between.
"""

from ldm_jax.config import (
    AdversaryConfig,
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
            steps=500,
            scale_batches=40,
            # The rate falls from the step at which the discriminator is switched on: at
            # the full rate, its first steps undo the training so far.
            optim=OptimConfig(
                lr=2e-3, warmup_steps=20, decay_steps=250, b2=0.99, ema_decay=0.99
            ),
            adversary=AdversaryConfig(
                enabled=True,
                start_step=250,
                ramp_steps=50,
                weight=0.1,
                channels=16,
                num_layers=2,
                optim=OptimConfig(lr=5e-4, b1=0.5, b2=0.9, clip_norm=0.0),
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
