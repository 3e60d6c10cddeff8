"""Config of stage 1: the autoencoder, its losses and its discriminator."""

import dataclasses
from typing import Literal

from ldm_jax.config.training import OptimConfig
from ldm_jax.config.validation import (
    DtypeName,
    checked_dataclass,
    require,
    require_at_least,
    require_widths,
)

ADAM_GAN = OptimConfig(lr=4.5e-6, b1=0.5, b2=0.9, clip_norm=0.0)
"""latent-diffusion's optimizer of autoencoder and discriminator, for one image a
step."""


@checked_dataclass
class AdversaryConfig:
    """The patch discriminator of the adversarial loss."""

    enabled: bool = False
    """Whether to train with a discriminator."""
    start_step: int = 50_001
    """First step with the discriminator and the generator loss."""
    ramp_steps: int = 0
    """Steps over which the weight of the generator loss rises from 0; 0: at once."""
    weight: float = 0.5
    """Weight of the generator loss, at least 0, times the adaptive weight."""
    loss: Literal["hinge", "vanilla"] = "hinge"
    """Loss of the discriminator; `vanilla` is the logistic loss."""
    channels: int = 64
    """Channels of the first layer."""
    num_layers: int = 3
    """Strided layers after the first; more give larger patches."""
    sync_batch_norm: bool = True
    """Batch statistics over all devices, so that results do not depend on their
    number."""
    optim: OptimConfig = dataclasses.field(default_factory=lambda: ADAM_GAN)
    """Optimizer of the discriminator."""

    def _check(self) -> None:
        require_at_least(self, 0, "start_step", "ramp_steps", "weight")
        require_at_least(self, 1, "channels", "num_layers")


@checked_dataclass
class AutoencoderConfig:
    """Stage 1: the autoencoder and its training."""

    regularizer: Literal["kl", "vq"] = "kl"
    """Latents: `kl`: a Gaussian, pulled to N(0, I); `vq`: vectors of a codebook."""
    channels: int = 128
    """Channels at full resolution."""
    channel_multipliers: tuple[int, ...] = (1, 2, 4)
    """Width of each level, times `channels`; all but the last halve the resolution."""
    num_res_blocks: int = 2
    """Residual blocks of each level (one more in the decoder)."""
    attention_resolutions: tuple[int, ...] = ()
    """Heights of the feature maps with self-attention, in pixels."""
    mid_attention: bool = True
    """Self-attention at the lowest resolution."""
    latent_channels: int = 3
    """Channels of the latent."""
    z_channels: int | None = None
    """Channels between encoder and latent; unset: `latent_channels`."""
    num_groups: int = 32
    """Groups of every group norm; must divide every width."""
    dtype: DtypeName = "float32"
    """Compute dtype; parameters, statistics and losses stay float32."""
    reconstruction_loss: Literal["l1", "l2"] = "l1"
    """Reconstruction loss: absolute or squared error."""
    reduction: Literal["mean", "sum"] = "mean"
    """Reduction of the reconstruction loss over an image; the paper's KL models sum."""
    kl_weight: float = 1e-6
    """Weight of the KL divergence, in nats a latent (`kl`)."""
    codebook_size: int = 8192
    """Vectors of the codebook (`vq`)."""
    codebook_weight: float = 1.0
    """Weight of the codebook loss (`vq`)."""
    commitment: Literal["corrected", "legacy"] = "corrected"
    """Term that `commitment_beta` weights (`vq`): the encoder's, as in the VQ-VAE
    paper, or the codebook's (`legacy`), as in the released models."""
    commitment_beta: float = 0.25
    """Beta of the codebook loss (`vq`)."""
    perceptual_weight: float = 0.0
    """Weight of LPIPS; 0: none. Above 0 it needs `perceptual_files`."""
    perceptual_files: tuple[str, ...] = ()
    """Files with the weights of VGG16 and of LPIPS' linear heads, one or more."""
    adversary: AdversaryConfig = dataclasses.field(default_factory=AdversaryConfig)
    """The discriminator."""
    latent_scale: float | None = None
    """Factor of the latents; unset: measured for a standard deviation of 1."""
    batch_size: int = 64
    """Images of a step on all devices."""
    steps: int = 100_000
    """Training steps."""
    scale_batches: int = 100
    """Batches from which the latent scale is measured after training."""
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    """Optimizer."""

    @property
    def downsampling(self) -> int:
        """Ratio of the sides of an image and its latent."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def encoder_channels(self) -> int:
        """Channels between encoder and latent, of one moment of the Gaussian."""
        return self.latent_channels if self.z_channels is None else self.z_channels

    def attention_levels(self, image_size: int) -> tuple[int, ...]:
        """Return the levels with self-attention; level 0 is the full resolution."""
        levels = range(len(self.channel_multipliers))
        return tuple(
            level
            for level in levels
            if image_size // 2**level in self.attention_resolutions
        )

    def _check(self) -> None:
        require_widths(self)
        require_at_least(self, 1, "latent_channels", "codebook_size", "scale_batches")
        require(self, "z_channels", self.encoder_channels >= 1, "at least 1")
        require_at_least(self, 0, "kl_weight", "codebook_weight", "commitment_beta")
        require_at_least(self, 0, "perceptual_weight")
        positive = self.latent_scale is None or self.latent_scale > 0.0
        require(self, "latent_scale", positive, "above 0, or unset")
