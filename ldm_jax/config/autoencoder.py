"""Stage 1: the autoencoder, its losses and its adversary."""

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
"""latent-diffusion's optimiser of both players; the rate is for one image a step."""


@checked_dataclass
class AdversaryConfig:
    """The patch discriminator that sharpens reconstructions."""

    enabled: bool = False
    """Whether there is one."""
    start_step: int = 50_001
    """Step at which it begins to learn and to be listened to."""
    ramp_steps: int = 0
    """Steps over which it is then listened to more and more; 0: at once."""
    weight: float = 0.5
    """Weight of its term, times the adaptive weight."""
    loss: Literal["hinge", "vanilla"] = "hinge"
    """Its loss; `vanilla` is the logistic one."""
    channels: int = 64
    """Channels of its first layer."""
    num_layers: int = 3
    """Strided layers after the first; more see larger patches."""
    sync_batch_norm: bool = True
    """Batch statistics over all devices, so that their number changes nothing."""
    optim: OptimConfig = dataclasses.field(default_factory=lambda: ADAM_GAN)
    """Its own optimiser."""

    def _check(self) -> None:
        require_at_least(self, 0, "start_step", "ramp_steps", "weight")
        require_at_least(self, 1, "channels", "num_layers")


@checked_dataclass
class AutoencoderConfig:
    """Stage 1: the autoencoder and its training."""

    regularizer: Literal["kl", "vq"] = "kl"
    """`kl`: a Gaussian drawn to N(0, I); `vq`: vectors of a codebook."""
    channels: int = 128
    """Channels at full resolution."""
    channel_multipliers: tuple[int, ...] = (1, 2, 4)
    """Width of each level; every level but the last halves the resolution."""
    num_res_blocks: int = 2
    """Residual blocks a level (the decoder has one more)."""
    attention_resolutions: tuple[int, ...] = ()
    """Heights of feature maps, in pixels at `data.image_size`, with self-attention."""
    mid_attention: bool = True
    """Self-attention at the lowest resolution."""
    latent_channels: int = 3
    """Channels of the latent."""
    z_channels: int | None = None
    """Channels between encoder and latent (`z_channels`); unset: as the latent."""
    num_groups: int = 32
    """Groups of every group norm; must divide every width."""
    dtype: DtypeName = "float32"
    """Compute dtype; parameters, statistics and losses stay float32."""
    reconstruction_loss: Literal["l1", "l2"] = "l1"
    """Absolute or squared error."""
    reduction: Literal["mean", "sum"] = "mean"
    """Reconstruction term over an image's values; the paper's KL models sum."""
    kl_weight: float = 1e-6
    """Weight of the KL divergence (nats a latent)."""
    codebook_size: int = 8192
    """Vectors of the codebook (`vq`)."""
    codebook_weight: float = 1.0
    """Weight of the codebook term (`vq`)."""
    commitment: Literal["corrected", "legacy"] = "corrected"
    """Which of its two parts `commitment_beta` weights: the encoder's, as in the VQ-VAE
    paper, or the codebook's, as the released models were trained."""
    commitment_beta: float = 0.25
    """Beta of the codebook term (`vq`)."""
    perceptual_weight: float = 0.0
    """Weight of LPIPS; 0 switches it off. Above 0 it needs `perceptual_files`."""
    perceptual_files: tuple[str, ...] = ()
    """Weights of VGG16 and of LPIPS' linear heads: one file, or several."""
    adversary: AdversaryConfig = dataclasses.field(default_factory=AdversaryConfig)
    """Discriminator."""
    latent_scale: float | None = None
    """What latents are multiplied by; unset: measured, to a standard deviation of 1."""
    batch_size: int = 64
    """Images a step, over all devices."""
    steps: int = 100_000
    """Training steps."""
    scale_batches: int = 100
    """Batches over which the latent scale is measured after training."""
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    """Optimiser."""

    @property
    def downsampling(self) -> int:
        """Pixels of an image per pixel of its latent, along one side."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def encoder_channels(self) -> int:
        """Channels between encoder and latent, for one of the Gaussian's moments."""
        return self.latent_channels if self.z_channels is None else self.z_channels

    def attention_levels(self, image_size: int) -> tuple[int, ...]:
        """Return the levels with self-attention, 0 at full resolution."""
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
