"""Handwritten digits, 32x32 grey: the whole system in minutes on two CPU cores.

    ldm train --config digits --workdir runs/digits

docs/reference/benchmarks.md has the figures, with their commands.
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
    ParallelConfig,
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
        # Steps are short: ten at a time, and each core has its own images. Sums in one
        # order cost little with a shard a core, and give one digest on any cores.
        parallel=ParallelConfig(
            reduction="exact", shards=2, steps_per_dispatch=10, cpu_devices=2
        ),
        checkpoint=CheckpointConfig(every=200, keep=2),
        log=LogConfig(every=10, images_every=450),
        sampling=PreviewConfig(chunk=16, grid_steps=20, grid_guidance_scale=2.0),
    )
