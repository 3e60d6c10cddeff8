"""Values of published models that several configs share, each with its source."""

import dataclasses
from typing import Literal, NamedTuple

from ldm_jax.config.autoencoder import ADAM_GAN, AdversaryConfig, AutoencoderConfig
from ldm_jax.config.condition import ClipConfig
from ldm_jax.config.training import OptimConfig

FirstStageName = Literal[
    "kl_f4",
    "kl_f8",
    "kl_f16",
    "kl_f32",
    "vq_f4",
    "vq_f4_noattn",
    "vq_f8",
    "vq_f8_n256",
    "vq_f16",
]

SD_LATENT_SCALE = 0.18215
"""Latent scale of kl_f8 under the 1.45B text-to-image model and Stable Diffusion.

Source: `scale_factor` in CompVis/latent-diffusion, txt2img-1p4B-eval.yaml, and in
CompVis/stable-diffusion, v1-inference.yaml.
"""

SD_BETAS = (0.00085, 0.012)
"""First and last beta of the same models; source: `linear_start` and `linear_end`."""

RDM_LATENT_SCALE = 0.22765929
"""Latent scale of kl_f16 under the retrieval-augmented model.

Source: CompVis/latent-diffusion, retrieval-augmented-diffusion/768x768.yaml.
"""

OPENCLIP_H = ClipConfig(
    width=1024,
    depth=24,
    num_heads=16,
    mlp_width=4096,
    activation="gelu",
    output="penultimate",
    projection_width=1024,
)
"""Text encoder of Stable Diffusion 2.

Source: open_clip, model config ViT-H-14; `layer: penultimate` in
Stability-AI/stablediffusion, v2-inference.yaml.
"""

TRAINED_SIDE = 256
"""Height and width of the training images of every first stage, in pixels."""


class _Architecture(NamedTuple):
    """Architecture of a first stage."""

    levels: tuple[int, ...]
    """Channel multipliers of the levels."""
    latent: int
    """Channels of the latent."""
    codebook: int
    """Vectors of the codebook; 0: KL-regularized."""
    attention: tuple[int, ...]
    """Heights with self-attention, at images of `TRAINED_SIDE`."""
    mid: bool
    """Whether the lowest resolution has self-attention."""


class _Training(NamedTuple):
    """Training of a first stage."""

    gan_start: int
    """First step with the discriminator."""
    gan_weight: float
    """Weight of the generator loss."""
    gan_layers: int
    """Strided layers of the discriminator."""
    batch: int
    """Images of a step on one device."""
    lr: float
    """Learning rate: 4.5e-6 times `batch`."""
    steps: int
    """Training steps of the released weights."""


# Source: models/first_stage_models/*/config.yaml of CompVis/latent-diffusion; the steps
# are from the model zoo in its README.
# fmt: off
_ARCHITECTURES: dict[FirstStageName, _Architecture] = {
    #                              levels             latent codes attention  mid
    "kl_f4":        _Architecture((1, 2, 4),           3,      0, (),      True),
    "kl_f8":        _Architecture((1, 2, 4, 4),        4,      0, (),      True),
    "kl_f16":       _Architecture((1, 1, 2, 2, 4),    16,      0, (16,),   True),
    "kl_f32":       _Architecture((1, 1, 2, 2, 4, 4), 64,      0, (16, 8), True),
    "vq_f4":        _Architecture((1, 2, 4),           3,   8192, (),      True),
    "vq_f4_noattn": _Architecture((1, 2, 4),           3,   8192, (),      False),
    "vq_f8":        _Architecture((1, 2, 2, 4),        4,  16384, (32,),   True),
    "vq_f8_n256":   _Architecture((1, 2, 2, 4),        4,    256, (32,),   True),
    "vq_f16":       _Architecture((1, 1, 2, 2, 4),     8,  16384, (16,),   True),
}
_TRAININGS: dict[FirstStageName, _Training] = {
    #                          start  weight layers batch lr     steps
    "kl_f4":        _Training( 50_001, 0.5,  3, 10, 4.5e-5,   176_991),
    "kl_f8":        _Training( 50_001, 0.5,  3,  4, 1.8e-5,   246_803),
    "kl_f16":       _Training( 50_001, 0.5,  3,  6, 2.7e-5,   442_998),
    "kl_f32":       _Training( 50_001, 0.5,  3,  6, 2.7e-5,   406_763),
    "vq_f4":        _Training(      0, 0.75, 3,  8, 3.6e-5,   533_066),
    "vq_f4_noattn": _Training(     11, 0.75, 3,  8, 3.6e-5,   658_131),
    "vq_f8":        _Training(      1, 0.6,  2, 10, 4.5e-5,   971_043),
    "vq_f8_n256":   _Training(250_001, 0.75, 3, 10, 4.5e-5, 1_608_649),
    "vq_f16":       _Training(250_001, 0.75, 2, 14, 6.3e-5, 1_101_166),
}
# fmt: on


def first_stage(
    name: FirstStageName, *, image_size: int = TRAINED_SIDE
) -> AutoencoderConfig:
    """Return the config of a released first stage: network, losses and training.

    The latent scale of a KL model is measured after training; that of a VQ model is 1.

    Args:
      image_size: Height and width of the images, in pixels; the levels with
        self-attention are the same at any size.

    Source:
      Rombach et al., arXiv:2112.10752, app. G and tab. 8; the released configs.
    """
    shape, training = _ARCHITECTURES[name], _TRAININGS[name]
    uses_codebook = shape.codebook > 0
    optim = dataclasses.replace(ADAM_GAN, lr=training.lr)
    return AutoencoderConfig(
        regularizer="vq" if uses_codebook else "kl",
        channels=128,
        channel_multipliers=shape.levels,
        num_res_blocks=2,
        attention_resolutions=tuple(
            height * image_size // TRAINED_SIDE for height in shape.attention
        ),
        mid_attention=shape.mid,
        latent_channels=shape.latent,
        reconstruction_loss="l1",
        reduction="mean" if uses_codebook else "sum",
        kl_weight=1e-6,
        codebook_size=shape.codebook or AutoencoderConfig().codebook_size,
        codebook_weight=1.0,
        perceptual_weight=1.0,
        adversary=AdversaryConfig(
            enabled=True,
            start_step=training.gan_start,
            weight=training.gan_weight,
            num_layers=training.gan_layers,
            optim=optim,
        ),
        latent_scale=1.0 if uses_codebook else None,
        batch_size=training.batch,
        steps=training.steps,
        optim=optim,
    )


def adamw(lr: float, *, warmup_steps: int = 0) -> OptimConfig:
    """Return the optimizer of every released diffusion model: AdamW without clipping.

    Args:
      lr: Learning rate after warm-up, above 0.
      warmup_steps: First steps, over which it rises linearly from 0.

    Source:
      CompVis/latent-diffusion, `LatentDiffusion.configure_optimizers`: torch's
      defaults (betas 0.9 and 0.999, weight decay 0.01); EMA decay 0.9999.
    """
    return OptimConfig(
        lr=lr,
        warmup_steps=warmup_steps,
        weight_decay=0.01,
        clip_norm=0.0,
        ema_decay=0.9999,
    )
