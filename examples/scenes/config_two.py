"""Text to image: one or two coloured shapes and how they stand, on two CPU cores.

    ldm train --config examples/scenes/config_two.py --workdir runs/scenes_two
    ldm sample --workdir runs/scenes_two --seeds 0-7 --eta 1 \
        --guidance-scale 2.5 --guidance-interval 0.3 inf \
        --prompt "a red circle to the left of a large blue square"

As `config.py`, on the builder's config `two`: a third of its pictures show one shape,
and most captions of two say how they stand. Which colour goes with which shape must be
read from the order of the words. docs/reference/benchmarks.md has the figures.
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
    TextConfig,
)


def get_config() -> Config:
    """Return the config."""
    return Config(
        seed=0,
        data=DataConfig(
            source="builder:examples/scenes/scenes_dataset_builder.py/two",
            image_size=32,
            image_channels=3,
            num_classes=64,
            num_train_examples=40_000,
            latents="own",  # encoding every image again takes a ninth of a step
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
            steps=4000,
            scale_batches=40,
            optim=OptimConfig(
                lr=2e-3, warmup_steps=20, decay_steps=2500, b2=0.99, ema_decay=0.99
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
            # there is hardly any signal: both count, and the latter are met often, or
            # how things stand is read late.
            loss_weight="debiased",
            loss_weight_gamma=0.6,
            timestep_shift=3.0,
            condition=ConditionConfig(
                context="text",
                pooled=True,
                text=TextConfig(
                    vocab_size=512,
                    length=24,
                    width=128,
                    depth=2,
                    num_heads=4,
                    head_width=32,
                    # Started from noise, words do not find their neighbours in this
                    # time: colours go to either shape.
                    positions="sinusoids",
                    embedding_std=0.5,
                ),
                tokenizer="captions",
            ),
            batch_size=32,
            steps=12_600,
            optim=OptimConfig(
                # With AdamW shapes are only beginning to be learned in this time.
                algorithm="muon",
                muon_embeddings=False,
                lr=3e-3,
                warmup_steps=100,
                decay_steps=4000,
                ema_decay=0.998,
            ),
        ),
        checkpoint=CheckpointConfig(every=1000, keep=2),
        log=LogConfig(every=20, images_every=6000),
        # One by one, the host is busy for up to a tenth of a step.
        parallel=ParallelConfig(steps_per_dispatch=20),
        sampling=PreviewConfig(chunk=16, grid_steps=20, grid_guidance_scale=2.0),
    )
