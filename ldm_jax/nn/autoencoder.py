"""The first stage: images to latents and back."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from ldm_jax.nn.attention import SelfAttention
from ldm_jax.nn.bottleneck import DiagonalGaussian, gaussian_from_moments
from ldm_jax.nn.layers import (
    AUTOENCODER_EPSILON,
    TRAILING_PADDING,
    Downsample,
    GroupNorm,
    ResBlock,
    Upsample,
    conv,
)
from ldm_jax.types import Dtype


class Stage(nn.Module):
    """A row of blocks at one resolution, as encoder and decoder share it.

    Fields:
      channels: Channels out of every block.
      num_blocks: ResBlocks in the row.
      attention: Whether self-attention follows each ResBlock.
      num_groups: Groups of every norm.
      dtype: Compute dtype.
    """

    channels: int
    num_blocks: int
    attention: bool
    num_groups: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w e"]:
        """Run the row."""
        for i in range(self.num_blocks):
            x = ResBlock(
                self.channels,
                self.num_groups,
                AUTOENCODER_EPSILON,
                zero_init=False,
                dtype=self.dtype,
                name=f"block_{i}",
            )(x)
            if self.attention:
                x = _attention(self.num_groups, self.dtype, f"attention_{i}")(x)
        return x


class Encoder(nn.Module):
    """Images to the moments of a latent Gaussian.

    Fields:
      channels: Width of the first level.
      channel_multipliers: Width of each level, in units of `channels`; every level
        but the last halves the resolution.
      num_res_blocks: ResBlocks a level.
      attention_resolutions: Heights, in pixels, that get self-attention.
      mid_attention: Whether the middle has self-attention.
      latent_channels: Channels of the latent.
      num_groups: Groups of every norm.
      dtype: Compute dtype.

    Source:
      Rombach et al., arXiv:2112.10752, app. G; latent-diffusion `Encoder`.
    """

    channels: int
    channel_multipliers: tuple[int, ...]
    num_res_blocks: int
    attention_resolutions: tuple[int, ...]
    mid_attention: bool
    latent_channels: int
    num_groups: int
    dtype: Dtype

    @nn.compact
    def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 e"]:
        """Return mean and log variance, stacked along the channels."""
        x = conv(self.channels, 3, self.dtype, "conv_in")(images.astype(self.dtype))
        last = len(self.channel_multipliers) - 1
        for level, multiplier in enumerate(self.channel_multipliers):
            x = Stage(
                self.channels * multiplier,
                self.num_res_blocks,
                x.shape[1] in self.attention_resolutions,
                self.num_groups,
                self.dtype,
                name=f"down_{level}",
            )(x)
            if level != last:
                x = Downsample(
                    TRAILING_PADDING, self.dtype, name=f"downsample_{level}"
                )(x)
        x = Middle(self.mid_attention, self.num_groups, self.dtype, name="mid")(x)
        x = GroupNorm(
            self.num_groups, AUTOENCODER_EPSILON, self.dtype, name="norm_out"
        )(x)
        return conv(2 * self.latent_channels, 3, self.dtype, "conv_out")(nn.silu(x))


class Decoder(nn.Module):
    """Latents to images; the mirror of `Encoder`, with one ResBlock more a level.

    Fields: as `Encoder`, with `image_channels` for the channels of the images.

    Source:
      Rombach et al., arXiv:2112.10752, app. G; latent-diffusion `Decoder`.
    """

    channels: int
    channel_multipliers: tuple[int, ...]
    num_res_blocks: int
    attention_resolutions: tuple[int, ...]
    mid_attention: bool
    image_channels: int
    num_groups: int
    dtype: Dtype

    @nn.compact
    def __call__(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 e"]:
        """Return images, unclipped."""
        width = self.channels * self.channel_multipliers[-1]
        x = conv(width, 3, self.dtype, "conv_in")(latents.astype(self.dtype))
        x = Middle(self.mid_attention, self.num_groups, self.dtype, name="mid")(x)
        for level, multiplier in reversed(list(enumerate(self.channel_multipliers))):
            x = Stage(
                self.channels * multiplier,
                self.num_res_blocks + 1,
                x.shape[1] in self.attention_resolutions,
                self.num_groups,
                self.dtype,
                name=f"up_{level}",
            )(x)
            if level != 0:
                x = Upsample(self.dtype, name=f"upsample_{level}")(x)
        x = GroupNorm(
            self.num_groups, AUTOENCODER_EPSILON, self.dtype, name="norm_out"
        )(x)
        x = conv(self.image_channels, 3, self.dtype, "conv_out")(nn.silu(x))
        return x.astype(jnp.float32)


class Middle(nn.Module):
    """The lowest resolution: block, attention, block.

    Fields: as `Stage`; `attention` switches the attention between the two blocks.
    """

    attention: bool
    num_groups: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Run the middle."""

        def block(name: str) -> ResBlock:
            return ResBlock(
                x.shape[-1],
                self.num_groups,
                AUTOENCODER_EPSILON,
                zero_init=False,
                dtype=self.dtype,
                name=name,
            )

        x = block("block_0")(x)
        if self.attention:
            x = _attention(self.num_groups, self.dtype, "attention_0")(x)
        return block("block_1")(x)


class Autoencoder(nn.Module):
    """A KL-regularised autoencoder: `encode` to a Gaussian, `decode` a latent.

    Not a VAE in the generative sense: the weight of its KL term is so small that
    N(0, I) decodes to nothing; the diffusion model learns the latents' distribution.

    Fields: as `Encoder`, with `image_channels` for the channels of the images.

    Source:
      Rombach et al., arXiv:2112.10752, sec. 3.1; latent-diffusion `AutoencoderKL`.
    """

    channels: int
    channel_multipliers: tuple[int, ...]
    num_res_blocks: int
    attention_resolutions: tuple[int, ...]
    mid_attention: bool
    latent_channels: int
    image_channels: int
    num_groups: int
    dtype: Dtype

    def setup(self) -> None:
        """Name the four parts; the names are the checkpoint format."""
        self.encoder = Encoder(
            self.channels,
            self.channel_multipliers,
            self.num_res_blocks,
            self.attention_resolutions,
            self.mid_attention,
            self.latent_channels,
            self.num_groups,
            self.dtype,
        )
        self.decoder = Decoder(
            self.channels,
            self.channel_multipliers,
            self.num_res_blocks,
            self.attention_resolutions,
            self.mid_attention,
            self.image_channels,
            self.num_groups,
            self.dtype,
        )
        self.quant_conv = nn.Conv(2 * self.latent_channels, (1, 1), dtype=self.dtype)
        self.post_quant_conv = nn.Conv(self.latent_channels, (1, 1), dtype=self.dtype)

    def encode(self, images: Float[Array, "b h w c"]) -> DiagonalGaussian:
        """Encode images in [-1, 1] to a Gaussian over unscaled latents."""
        return gaussian_from_moments(self.quant_conv(self.encoder(images)))

    def decode(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 e"]:
        """Decode unscaled latents to images, near [-1, 1] but not clipped to it."""
        latents = self.post_quant_conv(latents.astype(self.dtype))
        return self.decoder(latents)

    def __call__(
        self,
        images: Float[Array, "b h w c"],
        noise: Float[Array, "b h2 w2 d"],
    ) -> tuple[Float[Array, "b h w c"], DiagonalGaussian]:
        """Encode, sample the posterior with `noise`, decode.

        Args:
          images: In [-1, 1].
          noise: Unit-variance, of the latent's shape.

        Returns:
          The reconstructions and the posterior they came from.
        """
        posterior = self.encode(images)
        return self.decode(posterior.sample(noise)), posterior


def _attention(num_groups: int, dtype: Dtype, name: str) -> SelfAttention:
    return SelfAttention(
        1, num_groups, AUTOENCODER_EPSILON, zero_init=False, dtype=dtype, name=name
    )
