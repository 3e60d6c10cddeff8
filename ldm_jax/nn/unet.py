"""The second stage: a UNet that predicts what was added to a latent."""

from typing import TypedDict

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ldm_jax.nn.attention import SelfAttention
from ldm_jax.nn.conditioning import ClassEmbedding
from ldm_jax.nn.layers import (
    SYMMETRIC_PADDING,
    UNET_EPSILON,
    Downsample,
    GroupNorm,
    ResBlock,
    Upsample,
    conv,
    timestep_embedding,
)
from ldm_jax.types import Dtype


class UNet(nn.Module):
    """Predict from a noisy latent, its time and its class.

    Fields:
      out_channels: Channels of the prediction, as many as the latent has.
      channels: Width of the first level.
      channel_multipliers: Width of each level, in units of `channels`; every level
        but the last halves the resolution.
      num_res_blocks: ResBlocks a level on the way down; one more on the way up.
      attention_downsampling: Levels with self-attention, by their down-sampling
        factor (1, 2, 4 ...), not by their resolution in pixels.
      num_heads: Heads of every attention.
      num_classes: Real classes; the null class has this index. 0: unconditional.
      num_groups: Groups of every norm.
      dtype: Compute dtype; parameters stay float32, and so does the prediction.

    Source:
      Rombach et al., arXiv:2112.10752, sec. 3.2; Dhariwal & Nichol, arXiv:2105.05233;
      latent-diffusion `UNetModel` with class embedding.
    """

    out_channels: int
    channels: int
    channel_multipliers: tuple[int, ...]
    num_res_blocks: int
    attention_downsampling: tuple[int, ...]
    num_heads: int
    num_classes: int
    num_groups: int
    dtype: Dtype

    @nn.compact
    def __call__(
        self,
        x_t: Float[Array, "b h w c"],
        t: Int[Array, " b"],
        labels: Int[Array, " b"],
    ) -> Float[Array, "b h w e"]:
        """Predict, in float32.

        Args:
          x_t: Noisy latents, in scaled-latent units.
          t: Discrete timestep, in [0, T).
          labels: Class, in [0, num_classes]; ignored when `num_classes` is 0.
        """
        blocks = self._block_settings()
        embedding = self._embed(t, labels)
        x = conv(self.channels, 3, self.dtype, "conv_in")(x_t.astype(self.dtype))
        skips = [x]
        last = len(self.channel_multipliers) - 1
        for level, multiplier in enumerate(self.channel_multipliers):
            for i in range(self.num_res_blocks):
                x = LevelBlock(
                    self.channels * multiplier,
                    2**level in self.attention_downsampling,
                    **blocks,
                    name=f"down_{level}_{i}",
                )(x, embedding)
                skips.append(x)
            if level != last:
                x = Downsample(
                    SYMMETRIC_PADDING, self.dtype, name=f"downsample_{level}"
                )(x)
                skips.append(x)

        width = self.channels * self.channel_multipliers[-1]
        x = LevelBlock(width, True, **blocks, name="mid_0")(x, embedding)
        x = LevelBlock(width, False, **blocks, name="mid_1")(x, embedding)

        for level, multiplier in reversed(list(enumerate(self.channel_multipliers))):
            for i in range(self.num_res_blocks + 1):
                x = LevelBlock(
                    self.channels * multiplier,
                    2**level in self.attention_downsampling,
                    **blocks,
                    name=f"up_{level}_{i}",
                )(
                    jnp.concatenate([x, skips.pop()], axis=-1),
                    embedding,
                )
            if level != 0:
                x = Upsample(self.dtype, name=f"upsample_{level}")(x)

        x = GroupNorm(self.num_groups, UNET_EPSILON, self.dtype, name="norm_out")(x)
        x = conv(self.out_channels, 3, self.dtype, "conv_out", zero_init=True)(
            nn.silu(x)
        )
        return x.astype(jnp.float32)

    def _block_settings(self) -> "BlockSettings":
        return {
            "num_heads": self.num_heads,
            "num_groups": self.num_groups,
            "dtype": self.dtype,
        }

    def _embed(
        self, t: Int[Array, " b"], labels: Int[Array, " b"]
    ) -> Float[Array, "b d"]:
        width = 4 * self.channels
        h = timestep_embedding(t, width=self.channels).astype(self.dtype)
        h = nn.Dense(width, dtype=self.dtype, name="time_0")(h)
        h = nn.Dense(width, dtype=self.dtype, name="time_1")(nn.silu(h))
        if self.num_classes:
            h = h + ClassEmbedding(
                self.num_classes, width, self.dtype, name="class_embedding"
            )(labels)
        return h


class BlockSettings(TypedDict):
    """What every `LevelBlock` of one UNet has in common."""

    num_heads: int
    num_groups: int
    dtype: Dtype


class LevelBlock(nn.Module):
    """A ResBlock, and self-attention after it where the level has any.

    Fields:
      channels: Channels out.
      attention: Whether self-attention follows.
      num_heads: Heads of the attention.
      num_groups: Groups of every norm.
      dtype: Compute dtype.
    """

    channels: int
    attention: bool
    num_heads: int
    num_groups: int
    dtype: Dtype

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        embedding: Float[Array, "b d"],
    ) -> Float[Array, "b h w e"]:
        """Transform `x` under the time and class embedding."""
        x = ResBlock(
            self.channels,
            self.num_groups,
            UNET_EPSILON,
            zero_init=True,
            dtype=self.dtype,
            name="res",
        )(x, embedding)
        if self.attention:
            x = SelfAttention(
                self.num_heads,
                self.num_groups,
                UNET_EPSILON,
                zero_init=True,
                dtype=self.dtype,
                name="attention",
            )(x)
        return x
