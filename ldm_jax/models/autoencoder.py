"""The first stage: an autoencoder from images to latents and back."""

import functools
from typing import Literal, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from ldm_jax.models.attention import SelfAttention
from ldm_jax.models.bottleneck import (
    Codebook,
    DiagonalGaussian,
    Quantized,
    Unquantized,
    read_moments,
)
from ldm_jax.models.kernels.convolution import convolve
from ldm_jax.models.layers import (
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
    """A sequence of blocks at one resolution, in encoder and decoder.

    Fields:
      channels: Channels out of every block.
      num_blocks: ResBlocks of the sequence.
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
        """Apply the blocks."""
        for i in range(self.num_blocks):
            x = ResBlock(
                self.channels,
                self.num_groups,
                AUTOENCODER_EPSILON,
                dtype=self.dtype,
                name=f"block_{i}",
            )(x)
            if self.attention:
                x = _attention(self.num_groups, self.dtype, f"attention_{i}")(x)
        return x


class Encoder(nn.Module):
    """Encoder from images to the input of the bottleneck.

    Fields:
      channels: Width of the first level.
      channel_multipliers: Width of each level, in units of `channels`; every level
        but the last halves the resolution.
      num_res_blocks: ResBlocks a level.
      attention_levels: Levels with self-attention, 0 at full resolution; places and
        not heights, so that an image of another size meets the same parameters.
      mid_attention: Whether the middle has self-attention.
      out_channels: Channels out.
      num_groups: Groups of every norm.
      dtype: Compute dtype.

    Source:
      Rombach et al., arXiv:2112.10752, app. G; latent-diffusion `Encoder`.
    """

    channels: int
    channel_multipliers: tuple[int, ...]
    num_res_blocks: int
    attention_levels: tuple[int, ...]
    mid_attention: bool
    out_channels: int
    num_groups: int
    dtype: Dtype

    @nn.compact
    def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 e"]:
        """Return a map `2 ** (levels - 1)` times smaller than the images."""
        x = conv(self.channels, 3, self.dtype, "conv_in")(images.astype(self.dtype))
        last = len(self.channel_multipliers) - 1
        for level, multiplier in enumerate(self.channel_multipliers):
            x = Stage(
                self.channels * multiplier,
                self.num_res_blocks,
                level in self.attention_levels,
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
        return conv(self.out_channels, 3, self.dtype, "conv_out")(nn.silu(x))


class Decoded(NamedTuple):
    """Output of a decoder."""

    images: Float[Array, "b h w c"]
    """Images, float32, unclipped."""
    features: Float[Array, "b h w d"]
    """Input of the last convolution."""


class Decoder(nn.Module):
    """Decoder from latents to images: `Encoder` mirrored, one more ResBlock a level.

    Fields: as `Encoder`, with `image_channels` for the channels of the images.

    Source:
      Rombach et al., arXiv:2112.10752, app. G; latent-diffusion `Decoder`.
    """

    channels: int
    channel_multipliers: tuple[int, ...]
    num_res_blocks: int
    attention_levels: tuple[int, ...]
    mid_attention: bool
    image_channels: int
    num_groups: int
    dtype: Dtype

    @nn.compact
    def __call__(self, latents: Float[Array, "b h w c"]) -> Decoded:
        """Return images, `2 ** (levels - 1)` times larger than the latents."""
        width = self.channels * self.channel_multipliers[-1]
        x = conv(width, 3, self.dtype, "conv_in")(latents.astype(self.dtype))
        x = Middle(self.mid_attention, self.num_groups, self.dtype, name="mid")(x)
        for level, multiplier in reversed(list(enumerate(self.channel_multipliers))):
            x = Stage(
                self.channels * multiplier,
                self.num_res_blocks + 1,
                level in self.attention_levels,
                self.num_groups,
                self.dtype,
                name=f"up_{level}",
            )(x)
            if level != 0:
                x = Upsample(self.dtype, name=f"upsample_{level}")(x)
        x = GroupNorm(
            self.num_groups, AUTOENCODER_EPSILON, self.dtype, name="norm_out"
        )(x)
        features = nn.silu(x)
        images = image_layer(self.image_channels, self.dtype)(features)
        return Decoded(images.astype(jnp.float32), features)


def image_layer(image_channels: int, dtype: Dtype) -> nn.Conv:
    """Return the decoder's last convolution, unbound: features to images.

    The adaptive weight of the generator loss needs gradients of this layer alone.
    """
    return conv(image_channels, 3, dtype, "conv_out")


class Middle(nn.Module):
    """Blocks at the lowest resolution: block, attention, block.

    Fields: as `Stage`; `attention` switches the attention between the two blocks.
    """

    attention: bool
    num_groups: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Apply the blocks."""

        def block(name: str) -> ResBlock:
            return ResBlock(
                x.shape[-1],
                self.num_groups,
                AUTOENCODER_EPSILON,
                dtype=self.dtype,
                name=name,
            )

        x = block("block_0")(x)
        if self.attention:
            x = _attention(self.num_groups, self.dtype, "attention_0")(x)
        return block("block_1")(x)


class Reconstruction(NamedTuple):
    """Reconstructions, and the values that the losses read."""

    images: Float[Array, "b h w c"]
    """Reconstructions, unclipped."""
    features: Float[Array, "b h w d"]
    """Input of the decoder's last convolution."""
    latents: Float[Array, "b h2 w2 e"]
    """Latents of stage 2: sampled, or before quantisation."""
    bottleneck: DiagonalGaussian | Quantized
    """Posterior of the latents, or their quantisation."""


class Autoencoder(nn.Module):
    """A regularised autoencoder: `encode` to latents, `decode` to images.

    Not a generative VAE: the weight of its KL term is so small that samples of N(0, I)
    decode to no image; the diffusion model learns the distribution of the latents.

    Fields: as `Encoder`, and
      regularizer: `kl`, a Gaussian, or `vq`, a codebook.
      z_channels: Channels between latent and networks, for one of the moments.
      latent_channels: Channels of the latent.
      codebook_size: Vectors of the codebook; `kl` has none.
      image_channels: Channels of the images.

    Source:
      Rombach et al., arXiv:2112.10752, sec. 3.1; latent-diffusion `AutoencoderKL` and
      `VQModelInterface`.
    """

    regularizer: Literal["kl", "vq"]
    channels: int
    channel_multipliers: tuple[int, ...]
    num_res_blocks: int
    attention_levels: tuple[int, ...]
    mid_attention: bool
    z_channels: int
    latent_channels: int
    codebook_size: int
    image_channels: int
    num_groups: int
    dtype: Dtype

    def setup(self) -> None:
        """Create the submodules; their names are the checkpoint format."""
        num_moments = 2 if self.regularizer == "kl" else 1
        self.encoder = Encoder(
            self.channels,
            self.channel_multipliers,
            self.num_res_blocks,
            self.attention_levels,
            self.mid_attention,
            num_moments * self.z_channels,
            self.num_groups,
            self.dtype,
        )
        self.decoder = Decoder(
            self.channels,
            self.channel_multipliers,
            self.num_res_blocks,
            self.attention_levels,
            self.mid_attention,
            self.image_channels,
            self.num_groups,
            self.dtype,
        )
        latent_channels = num_moments * self.latent_channels
        mix = functools.partial(
            nn.Conv,
            kernel_size=(1, 1),
            padding=0,
            dtype=self.dtype,
            conv_general_dilated=convolve,
        )
        self.quant_conv = mix(latent_channels)
        self.post_quant_conv = mix(self.z_channels)
        if self.regularizer == "vq":
            self.codebook = Codebook(self.codebook_size, self.latent_channels)

    def encode(self, images: Float[Array, "b h w c"]) -> DiagonalGaussian | Unquantized:
        """Encode images in [-1, 1] to the posterior of unscaled latents."""
        encoded = self.quant_conv(self.encoder(images))
        return read_moments(encoded, regularizer=self.regularizer)

    def decode(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 e"]:
        """Decode unscaled latents to images, unclipped; `vq` quantises them first."""
        if self.regularizer == "vq":
            latents = self.codebook(latents).straight_through()
        return self._to_images(latents).images

    def __call__(
        self,
        images: Float[Array, "b h w c"],
        noise: Float[Array, "b h2 w2 d"],
    ) -> Reconstruction:
        """Encode images, sample or quantise their latents, and decode them.

        Args:
          images: In [-1, 1].
          noise: Unit-variance noise of the latents' shape; ignored by `vq`.

        Returns:
          The reconstructions, and what they came from.
        """
        encoded = self.encode(images)
        latents = given = encoded.sample(noise)
        if isinstance(encoded, DiagonalGaussian):
            bottleneck = encoded
        else:
            bottleneck = self.codebook(latents)
            given = bottleneck.straight_through()
        decoded = self._to_images(given)
        return Reconstruction(decoded.images, decoded.features, latents, bottleneck)

    def _to_images(self, latents: Float[Array, "b h w c"]) -> Decoded:
        return self.decoder(self.post_quant_conv(latents.astype(self.dtype)))


def _attention(num_groups: int, dtype: Dtype, name: str) -> SelfAttention:
    return SelfAttention(
        1, num_groups, AUTOENCODER_EPSILON, zero_init=False, dtype=dtype, name=name
    )
