"""Text to image: one coloured shape, 32x32, on two CPU cores.

    ldm train --config examples/scenes/config.py --workdir runs/scenes
    ldm sample --workdir runs/scenes --prompt "a red circle" --seeds 0-7

The pictures are drawn and captioned by the data set itself
(`scenes_dataset_builder.py`); some pairs of colour and shape are held out. Byte pairs
are learned from the captions. docs/reference/benchmarks.md has the figures.
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
    TextConfig,
)


def get_config() -> Config:
    """Return the config."""
    return Config(
        seed=0,
        data=DataConfig(
            source="builder:examples/scenes/scenes_dataset_builder.py/one",
            image_size=32,
            image_channels=3,
            num_classes=64,
            num_train_examples=20_000,
        ),
        autoencoder=AutoencoderConfig(
            channels=16,
            channel_multipliers=(1, 2, 2),
            num_res_blocks=1,
            mid_attention=False,
            latent_channels=4,
            num_groups=8,
            reconstruction_loss="l2",
            # At 1e-6 half of a latent's variance is the posterior's own noise.
            kl_weight=1e-7,
            batch_size=16,
            steps=2400,
            scale_batches=40,
            optim=OptimConfig(
                lr=2e-3, warmup_steps=20, decay_steps=1500, b2=0.99, ema_decay=0.99
            ),
        ),
        diffusion=DiffusionConfig(
            channels=48,
            channel_multipliers=(1, 2),
            num_res_blocks=1,
            attention_downsampling=(1, 2),
            head_channels=48,
            transformer_depth=1,
            coordinates=True,
            scale_shift_norm=True,
            num_groups=16,
            prediction="v",
            # Shapes are decided where noise and signal are about equal, places where
            # there is hardly any signal: both count.
            loss_weight="debiased",
            loss_weight_gamma=0.6,
            condition=ConditionConfig(
                context="text",
                pooled=True,
                text=TextConfig(
                    vocab_size=512,
                    length=16,
                    width=128,
                    depth=1,
                    num_heads=4,
                    head_width=32,
                ),
                tokenizer="captions",
            ),
            batch_size=32,
            steps=3200,
            optim=OptimConfig(
                # With AdamW shapes are only beginning to be learned in this time.
                algorithm="muon",
                lr=3e-3,
                warmup_steps=100,
                decay_steps=1200,
                ema_decay=0.998,
            ),
        ),
        checkpoint=CheckpointConfig(every=500, keep=2),
        log=LogConfig(every=20, images_every=1000),
        sampling=PreviewConfig(chunk=16, grid_steps=20, grid_guidance_scale=2.0),
    )
