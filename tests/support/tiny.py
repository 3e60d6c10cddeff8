"""A config that trains in seconds: digits at 8x8 pixels, the smallest networks."""

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
    return Config(
        data=DataConfig(image_size=8),
        autoencoder=AutoencoderConfig(
            channels=8,
            channel_multipliers=(1, 1),
            num_res_blocks=1,
            latent_channels=2,
            num_groups=4,
            batch_size=8,
            steps=6,
            scale_batches=2,
            optim=OptimConfig(lr=1e-3, ema_decay=0.9),
        ),
        diffusion=DiffusionConfig(
            channels=8,
            channel_multipliers=(1, 1),
            num_res_blocks=1,
            attention_downsampling=(2,),
            num_heads=2,
            num_groups=4,
            condition=ConditionConfig(label=True),
            batch_size=8,
            steps=8,
            optim=OptimConfig(lr=1e-3, ema_decay=0.9),
        ),
        checkpoint=CheckpointConfig(every=2),
        log=LogConfig(every=1, images_every=4),
        sampling=PreviewConfig(chunk=4, grid_steps=3),
    )
