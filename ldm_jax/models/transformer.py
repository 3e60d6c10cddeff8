"""Spatial transformers: attention over pixels, and cross-attention to a context."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ldm_jax.models.attention import attend, for_platform
from ldm_jax.models.kernels.attention_blocks import Shape
from ldm_jax.models.kernels.packed_heads import attend_in_lanes
from ldm_jax.models.layers import (
    Affine,
    GroupNorm,
    Weights,
    dense,
    dense_of_many,
    split_affine,
)
from ldm_jax.types import Dtype

SPATIAL_TRANSFORMER_EPSILON = 1e-6
LAYER_NORM_EPSILON = 1e-5
MLP_EXPANSION = 4
MANY_TOKENS = 256


class Attention(nn.Module):
    """Attention to a context or to the tokens themselves; only the output has a bias.

    Fields:
      num_heads: Heads; must divide the width of the tokens.
      dtype: Compute dtype; parameters and softmax stay float32.

    Source:
      latent-diffusion `CrossAttention`.
    """

    num_heads: int
    dtype: Dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], context: Float[Array, "b m e"] | None
    ) -> Float[Array, "b n d"]:
        """Attend to `context`, or to `x` if it is None."""
        b, n, width = x.shape
        read = x if context is None else context.astype(self.dtype)
        m, channels = read.shape[1:]

        def weights(name: str, channels: int, *, use_bias: bool = False) -> Affine:
            return Weights(width, use_bias=use_bias, zero_init=False, name=name)(
                channels
            )

        projections = (
            weights("q", width),
            weights("k", channels),
            weights("v", channels),
            weights("out", width, use_bias=True),
        )

        def plainly(
            x: Float[Array, "b n d"],
            read: Float[Array, "b m e"],
            projections: tuple[Affine, Affine, Affine, Affine],
        ) -> Float[Array, "b n d"]:
            *ways_in, out = projections
            heads = (
                dense(tokens, way, self.dtype).reshape(b, -1, self.num_heads, size)
                for tokens, way in zip((x, read, read), ways_in, strict=True)
            )
            return dense(attend(*heads).reshape(b, n, width), out, self.dtype)

        in_lanes = functools.partial(
            attend_in_lanes, num_heads=self.num_heads, dtype=self.dtype
        )
        size = width // self.num_heads
        shape = Shape(queries=n, keys=m, width=size)
        layer = for_platform(shape, self.dtype, plainly, in_lanes)
        return layer(x, read, projections)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and a gated MLP, each with a residual connection.

    Fields: as `Attention`.

    Source:
      latent-diffusion `BasicTransformerBlock`; Shazeer, arXiv:2002.05202 (GEGLU, the
      value first, with the exact GELU).
    """

    num_heads: int
    dtype: Dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], context: Float[Array, "b m e"] | None
    ) -> Float[Array, "b n d"]:
        """Transform the tokens `x`."""

        def normed(name: str) -> Float[Array, "b n d"]:
            norm = nn.LayerNorm(LAYER_NORM_EPSILON, dtype=jnp.float32, name=name)
            return norm(x.astype(jnp.float32)).astype(self.dtype)

        x = x + Attention(self.num_heads, self.dtype, name="attn1")(
            normed("norm1"), None
        )
        x = x + Attention(self.num_heads, self.dtype, name="attn2")(
            normed("norm2"), context
        )
        n, width = x.shape[1:]
        inner = 2 * MLP_EXPANSION * width
        weights = Weights(inner, use_bias=True, zero_init=False, name="mlp_in")(width)
        h = normed("norm3")
        if n >= MANY_TOKENS:
            # As two layers, so that their large gradients are not concatenated.
            first, second = split_affine(weights, 2)
            value = dense_of_many(h, first, self.dtype)
            gate = dense_of_many(h, second, self.dtype)
        else:
            value, gate = jnp.split(dense(h, weights, self.dtype), 2, axis=-1)
        h = value * exact_gelu(gate)
        return x + nn.Dense(width, dtype=self.dtype, name="mlp_out")(h)


def exact_gelu(x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    """Return the exact GELU: `x` times the normal distribution function of `x`.

    In 16 bits by `erf`: its precision far below zero suffices, and `erfc`, which is
    more precise there, takes half as long again on a TPU.

    Source:
      Hendrycks & Gimpel, arXiv:1606.08415, sec. 2.
    """
    if x.dtype == jnp.float32:
        return nn.gelu(x, approximate=False)
    below = 0.5 * (1.0 + jax.lax.erf(x.astype(jnp.float32) * math.sqrt(0.5)))
    return (x.astype(jnp.float32) * below).astype(x.dtype)


class SpatialTransformer(nn.Module):
    """A transformer over the pixels of a feature map, around a skip.

    The projections around it are 1x1 convolutions in some weights' files and linear
    layers in others; on pixels as tokens they are the same function.

    Fields:
      depth: Blocks.
      num_heads: Heads of every attention.
      num_groups: Groups of the norm.
      dtype: Compute dtype.

    Source:
      Rombach et al., arXiv:2112.10752, app. E.2.1; latent-diffusion
      `SpatialTransformer`.
    """

    depth: int
    num_heads: int
    num_groups: int
    dtype: Dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], context: Float[Array, "b m e"] | None
    ) -> Float[Array, "b h w c"]:
        """Add what the pixels read of each other and of the context."""
        b, h, w, c = x.shape
        norm = GroupNorm(
            self.num_groups, SPATIAL_TRANSFORMER_EPSILON, self.dtype, name="norm"
        )
        y = norm(x).reshape(b, h * w, c)
        y = nn.Dense(c, dtype=self.dtype, name="proj_in")(y)
        for i in range(self.depth):
            y = TransformerBlock(self.num_heads, self.dtype, name=f"block_{i}")(
                y, context
            )
        out = nn.Dense(
            c, kernel_init=nn.initializers.zeros, dtype=self.dtype, name="proj_out"
        )
        return x + out(y).reshape(b, h, w, c)
