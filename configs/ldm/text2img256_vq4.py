r"""Conceptual Captions at 256x256 by text: LDM-4 on vq_f4.

    ldm train --config ldm/text2img256_vq4 \
        --workdir runs/text2img256_vq4 \
        --first-stage runs/vq_f4 \
        --diffusion.condition.tokenizer bert_base_uncased

From the released config: global batch 28, learning rate 5.6e-5 (2e-6 for each image);
the text transformer is trained along. The steps are not published (the released weights
were fine-tuned from a model of LAION); the 500,000 here are a guess.

Published (model zoo): FID 16.79, IS 13.89 with 100 DDIM steps, eta 0.
Ours: a tenth of the examples is trained without its caption, for guidance.
Data: not in TFDS; make `conceptual_captions` with a TFDS builder of your own: images,
and the 77 token ids of their captions as `tokens`.

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
            source="tfds:conceptual_captions",
            test_split="validation",
            image_size=256,
            image_channels=3,
            num_classes=0,
            num_train_examples=0,
        ),
        autoencoder=first_stage("vq_f4"),
        diffusion=DiffusionConfig(
            channels=192,
            channel_multipliers=(1, 2, 3, 5),
            num_res_blocks=2,
            attention_downsampling=(2, 4, 8),
            head_channels=32,
            transformer_depth=1,
            condition=ConditionConfig(
                context="text", text=TextConfig(width=640, depth=32)
            ),
            condition_dropout=0.1,
            batch_size=28,
            steps=500_000,
            optim=adamw(5.6e-5),
        ),
        checkpoint=CheckpointConfig(every=5000, keep=2),
        log=LogConfig(every=100, images_every=5000),
        sampling=PreviewConfig(chunk=8, grid_steps=50, grid_guidance_scale=5.0),
    )
