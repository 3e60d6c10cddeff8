"""The second stage: a UNet that denoises latents."""

from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Real

from ldm_jax.models.attention import SelfAttention
from ldm_jax.models.conditioning import ClassEmbedding, Condition
from ldm_jax.models.layers import (
    SYMMETRIC_PADDING,
    Downsample,
    GroupNorm,
    Upsample,
    area_downsample,
    conv,
    timestep_embedding,
)
from ldm_jax.models.transformer import SpatialTransformer
from ldm_jax.types import Dtype

Resample = Literal["none", "up", "down"]


class UNet(nn.Module):
    """UNet that predicts noise, or another target, of a noisy latent.

    Fields:
      out_channels: Channels of the prediction and of the latent.
      channels: Width of the first level.
      channel_multipliers: Width of each level, in units of `channels`; every level
        but the last halves the resolution.
      num_res_blocks: ResBlocks a level on the way down; one more on the way up.
      attention_downsampling: Levels with attention, by their down-sampling factor
        (1, 2, 4 ...), not by their resolution in pixels.
      num_heads: Attention heads, if `head_channels` is 0.
      head_channels: Channels of a head, or 0.
      transformer_depth: Blocks of each spatial transformer; 0: plain self-attention.
      num_classes: Classes whose embedding is added to the time embedding, without the
        null class, which has this index. 0: no class embedding.
      pooled_context: Whether to add the mean of the context's tokens to the time
        embedding.
      coordinates: Whether the input has the x and y of every pixel, from -1 to 1;
        without them, only zero padding tells positions.
      scale_shift_norm: See `TimeResBlock`.
      resblock_updown: Resample inside ResBlocks instead of by convolutions.
      num_groups: Groups of every norm.
      epsilon: Epsilon of the norms outside spatial transformers.
      remat: Recompute the activations of every level block in the backward pass.
      dtype: Compute dtype; parameters stay float32, and so does the prediction.

    Source:
      Rombach et al., arXiv:2112.10752, sec. 3.2 and 3.3; Dhariwal & Nichol,
      arXiv:2105.05233; latent-diffusion `UNetModel`. The pooled context: Nichol et
      al., GLIDE, arXiv:2112.10741, sec. 2.1, which uses the last token instead.
      Coordinates: Liu et al., arXiv:1807.03247, sec. 3.
    """

    out_channels: int
    channels: int
    channel_multipliers: tuple[int, ...]
    num_res_blocks: int
    attention_downsampling: tuple[int, ...]
    num_heads: int
    head_channels: int
    transformer_depth: int
    num_classes: int
    pooled_context: bool
    coordinates: bool
    scale_shift_norm: bool
    resblock_updown: bool
    num_groups: int
    epsilon: float
    remat: bool
    dtype: Dtype

    @nn.compact
    def __call__(
        self,
        x_t: Float[Array, "b h w c"],
        t: Real[Array, " b"],
        cond: Condition,
    ) -> Float[Array, "b h w e"]:
        """Return the prediction, in float32.

        Args:
          x_t: Noisy latents, in scaled-latent units.
          t: Timestep; an integer for discrete schedules, a float for continuous ones.
          cond: Conditions.
        """
        if cond.concat is not None:
            x_t = jnp.concatenate([x_t, cond.concat.astype(x_t.dtype)], axis=-1)
        if self.coordinates:
            x_t = jnp.concatenate([x_t, pixel_coordinates(x_t)], axis=-1)
        embedding = self._embed(t, cond)
        x = conv(self.channels, 3, self.dtype, "conv_in")(x_t.astype(self.dtype))
        skips = [x]
        levels = list(enumerate(self.channel_multipliers))
        last = len(levels) - 1
        for level, multiplier in levels:
            for i in range(self.num_res_blocks):
                block = self._block(level, multiplier, f"down_{level}_{i}")
                x = block(x, embedding, cond.context)
                skips.append(x)
            if level != last:
                x = self._resample("down", level, x, embedding)
                skips.append(x)

        x = self._block(last, levels[-1][1], "mid_0", attention=True)(
            x, embedding, cond.context
        )
        x = self._block(last, levels[-1][1], "mid_1", attention=False)(
            x, embedding, cond.context
        )

        for level, multiplier in reversed(levels):
            for i in range(self.num_res_blocks + 1):
                block = self._block(level, multiplier, f"up_{level}_{i}")
                joined = jnp.concatenate([x, skips.pop()], axis=-1)
                x = block(joined, embedding, cond.context)
            if level != 0:
                x = self._resample("up", level, x, embedding)

        x = GroupNorm(self.num_groups, self.epsilon, self.dtype, name="norm_out")(x)
        x = conv(self.out_channels, 3, self.dtype, "conv_out", zero_init=True)(
            nn.silu(x)
        )
        return x.astype(jnp.float32)

    def _block(
        self, level: int, multiplier: int, name: str, attention: bool | None = None
    ) -> "LevelBlock":
        if attention is None:
            attention = 2**level in self.attention_downsampling
        cls: Any = nn.remat(LevelBlock) if self.remat else LevelBlock
        channels = self.channels * multiplier
        return cls(
            res=self._res_settings(channels),
            attention=attention,
            num_heads=(
                channels // self.head_channels if self.head_channels else self.num_heads
            ),
            transformer_depth=self.transformer_depth,
            name=name,
        )

    def _res_settings(self, channels: int) -> dict[str, Any]:
        return {
            "channels": channels,
            "num_groups": self.num_groups,
            "epsilon": self.epsilon,
            "scale_shift_norm": self.scale_shift_norm,
            "dtype": self.dtype,
        }

    def _resample(
        self,
        direction: Literal["up", "down"],
        level: int,
        x: Float[Array, "b h w c"],
        embedding: Float[Array, "b d"],
    ) -> Float[Array, "b h2 w2 c"]:
        name = f"{direction}sample_{level}"
        if self.resblock_updown:
            settings = self._res_settings(x.shape[-1])
            return TimeResBlock(**settings, resample=direction, name=name)(x, embedding)
        if direction == "up":
            return Upsample(self.dtype, name=name)(x)
        return Downsample(SYMMETRIC_PADDING, self.dtype, name=name)(x)

    def _embed(self, t: Real[Array, " b"], cond: Condition) -> Float[Array, "b d"]:
        width = 4 * self.channels
        h = timestep_embedding(t, width=self.channels).astype(self.dtype)
        h = nn.Dense(width, dtype=self.dtype, name="time_0")(h)
        h = nn.Dense(width, dtype=self.dtype, name="time_1")(nn.silu(h))
        if self.num_classes:
            table = ClassEmbedding(
                self.num_classes, width, self.dtype, name="class_embedding"
            )
            h = h + table(jnp.asarray(cond.label))
        if self.pooled_context:
            pooled = jnp.asarray(cond.context).mean(axis=1).astype(self.dtype)
            h = h + nn.Dense(width, dtype=self.dtype, name="context_pooled")(pooled)
        return h


class LevelBlock(nn.Module):
    """A ResBlock, followed by attention if the level has it.

    Fields:
      res: Fields of the ResBlock.
      attention: Whether attention follows.
      num_heads: Heads of the attention.
      transformer_depth: Blocks of the spatial transformer; 0: plain self-attention.
    """

    res: Mapping[str, Any]
    attention: bool
    num_heads: int
    transformer_depth: int

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        embedding: Float[Array, "b d"],
        context: Float[Array, "b m f"] | None,
    ) -> Float[Array, "b h w e"]:
        """Apply the block to `x`."""
        x = TimeResBlock(**self.res, resample="none", name="res")(x, embedding)
        if not self.attention:
            return x
        num_groups, dtype = self.res["num_groups"], self.res["dtype"]
        if self.transformer_depth:
            transformer = SpatialTransformer(
                self.transformer_depth,
                self.num_heads,
                num_groups,
                dtype,
                name="transformer",
            )
            return transformer(x, context)
        attention = SelfAttention(
            self.num_heads,
            num_groups,
            self.res["epsilon"],
            zero_init=True,
            dtype=dtype,
            name="attention",
        )
        return attention(x)


class TimeResBlock(nn.Module):
    """The UNet's residual block: twice norm, SiLU, convolution, with a time embedding.

    Fields:
      channels: Channels out.
      num_groups: Groups of both norms.
      epsilon: Epsilon of both norms.
      scale_shift_norm: The embedding scales and shifts the second norm instead of
        being added before it.
      resample: Whether both branches first double the resolution by nearest neighbours
        or halve it by 2x2 means.
      dtype: Compute dtype; parameters stay float32.

    Source:
      Dhariwal & Nichol, arXiv:2105.05233, sec. 3 (adaptive group norm) and app. A;
      latent-diffusion `ResBlock` of the UNet.
    """

    channels: int
    num_groups: int
    epsilon: float
    scale_shift_norm: bool
    resample: Resample
    dtype: Dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], embedding: Float[Array, "b d"]
    ) -> Float[Array, "b h2 w2 e"]:
        """Apply the block to `x`."""
        h = GroupNorm(self.num_groups, self.epsilon, self.dtype, name="norm1")(x)
        h = resample(nn.silu(h), self.resample)
        x = resample(x, self.resample)
        h = conv(self.channels, 3, self.dtype, "conv1")(h)
        width = self.channels * (2 if self.scale_shift_norm else 1)
        project = nn.Dense(width, dtype=self.dtype, name="embedding")
        e = project(nn.silu(embedding))[:, None, None, :]
        norm2 = GroupNorm(self.num_groups, self.epsilon, self.dtype, name="norm2")
        if self.scale_shift_norm:
            scale, shift = jnp.split(e, 2, axis=-1)
            h = norm2(h) * (1.0 + scale) + shift
        else:
            h = norm2(h + e)
        h = conv(self.channels, 3, self.dtype, "conv2", zero_init=True)(nn.silu(h))
        if x.shape[-1] != self.channels:
            x = conv(self.channels, 1, self.dtype, "skip")(x)
        return x + h


def pixel_coordinates(x: Float[Array, "b h w c"]) -> Float[Array, "b h w 2"]:
    """Return the x and y of every pixel's centre; the map spans -1 to 1."""
    b, h, w, _ = x.shape
    right, down = (
        (2.0 * jnp.arange(n, dtype=jnp.float32) + 1.0) / n - 1.0 for n in (w, h)
    )
    plane = jnp.stack(jnp.meshgrid(right, down), axis=-1).astype(x.dtype)
    return jnp.broadcast_to(plane, (b, h, w, 2))


def resample(x: Float[Array, "b h w c"], how: Resample) -> Float[Array, "b h2 w2 c"]:
    """Double a map by nearest neighbours, halve it by 2x2 means, or return it."""
    if how == "up":
        return x.repeat(2, axis=1).repeat(2, axis=2)
    if how == "down":
        return area_downsample(x, factor=2)
    return x
