"""Text to image from real art: the emoji of this machine's font, 64x64, by name.

    apt-get install fonts-noto-color-emoji
    python train.py --config configs/emoji.py --workdir runs/emoji
    python sample.py --workdir runs/emoji --prompt "woman astronaut, dark skin tone"

Meant for one GPU. The pictures come from Noto Color Emoji, the captions from Unicode's
names; skin tones of a subject, and kinds of people of some roles, are held out, to be
asked for afterwards (split `held_out`). How far it was run stands in
docs/benchmarks.md.
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
    SamplingConfig,
    TextConfig,
)


def get_config() -> Config:
    """Return the config."""
    return Config(
        seed=0,
        data=DataConfig(
            source="tfds:emoji/64",
            test_split="held_out",
            image_size=64,
            image_channels=3,
            num_classes=0,
            num_train_examples=0,  # as many as the font has
            latents="own",  # encoded once, not in every step
        ),
        autoencoder=AutoencoderConfig(
            channels=64,
            channel_multipliers=(1, 2, 2),
            num_res_blocks=2,
            mid_attention=False,
            latent_channels=4,
            reconstruction_loss="l1",
            kl_weight=1e-6,
            batch_size=32,
            steps=8000,
            scale_batches=40,
            optim=OptimConfig(
                lr=1e-3, warmup_steps=100, decay_steps=3000, b2=0.99, ema_decay=0.995
            ),
        ),
        diffusion=DiffusionConfig(
            channels=128,
            channel_multipliers=(1, 2, 2),
            num_res_blocks=2,
            attention_downsampling=(1, 2),
            head_channels=32,
            transformer_depth=1,
            condition=ConditionConfig(
                context="text",
                text=TextConfig(
                    vocab_size=2048,
                    length=32,
                    width=256,
                    depth=4,
                    num_heads=4,
                    head_width=64,
                ),
                tokenizer="captions",
            ),
            batch_size=128,
            steps=15_000,
            optim=OptimConfig(
                lr=5e-4, warmup_steps=500, decay_steps=5000, ema_decay=0.9995
            ),
            dtype="bfloat16",
        ),
        checkpoint=CheckpointConfig(every=1000, keep=2),
        log=LogConfig(every=50, images_every=2500),
        sampling=SamplingConfig(chunk=64, grid_steps=30, grid_guidance_scale=3.0),
    )
