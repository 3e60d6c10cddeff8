"""Layers of the autoencoder and the UNet.

Two values differ between the two networks and are fields here: the epsilon of the group
norm (1e-6 in the autoencoder, 1e-5 in the UNet) and the padding of the stride-2
convolution.
"""

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Real

from ldm_jax.models.kernels.convolution import convolve
from ldm_jax.models.kernels.upsample import convolve_upsampled
from ldm_jax.types import Dtype

AUTOENCODER_EPSILON = 1e-6
SYMMETRIC_PADDING = ((1, 1), (1, 1))
TRAILING_PADDING = ((0, 1), (0, 1))
ROWS_OF_ONES = 8


def timestep_embedding(
    t: Real[Array, " b"], *, width: int, max_period: float = 10_000.0
) -> Float[Array, "b d"]:
    """Embed a timestep as cosines and sines of falling frequency.

    Args:
      t: Timestep; need not be whole.
      width: Length of the embedding; even.
      max_period: Longest period, in timesteps.

    Returns:
      The cosines, then the sines, float32.

    Raises:
      ValueError: If `width` is odd.

    Source:
      Vaswani et al., arXiv:1706.03762, sec. 3.5, in the order and with the divisor
      (half the width) of latent-diffusion's `timestep_embedding`.
    """
    if width % 2:
        raise ValueError(f"timestep embedding: width must be even, got {width}")
    half = width // 2
    frequencies = jnp.exp(
        -math.log(max_period) * jnp.arange(half, dtype=jnp.float32) / half
    )
    angles = t.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class Affine(NamedTuple):
    """Parameters of a linear layer or a convolution, float32."""

    kernel: Float[Array, "*window c e"]
    """Kernel: window (of a convolution), channels in, channels out."""
    bias: Float[Array, " e"] | None
    """Bias of the channels out, or None."""


class Weights(nn.Module):
    """Parameters of an `nn.Dense` or `nn.Conv`, without the computation.

    Fields:
      features: Channels out.
      use_bias: Whether there is a bias.
      zero_init: Start with a zero kernel.
    """

    features: int
    use_bias: bool
    zero_init: bool

    @nn.compact
    def __call__(self, channels: int, window: tuple[int, ...] = ()) -> Affine:
        """Return the parameters for a number of channels in and a window."""
        init = (
            nn.initializers.zeros if self.zero_init else nn.initializers.lecun_normal()
        )
        shape = (*window, channels, self.features)
        kernel = self.param("kernel", init, shape, jnp.float32)
        if not self.use_bias:
            return Affine(kernel, None)
        zeros = nn.initializers.zeros
        return Affine(kernel, self.param("bias", zeros, shape[-1:], jnp.float32))


def split_affine(weights: Affine, parts: int) -> tuple[Affine, ...]:
    """Split a layer's channels out into equal parts."""
    kernels = jnp.split(weights.kernel, parts, axis=1)
    biases = [None] * parts
    if weights.bias is not None:
        biases = jnp.split(weights.bias, parts)
    return tuple(map(Affine, kernels, biases))


def dense(
    x: Float[Array, "b n c"], weights: Affine, dtype: Dtype
) -> Float[Array, "b n e"]:
    """Apply a linear layer, as `nn.Dense` does."""
    contracted = (((x.ndim - 1,), (0,)), ((), ()))
    y = jax.lax.dot_general(x.astype(dtype), weights.kernel.astype(dtype), contracted)
    if weights.bias is not None:
        y += weights.bias.astype(dtype).reshape(1, 1, -1)
    return y


def dense_of_many(
    x: Float[Array, "b n c"], weights: Affine, dtype: Dtype
) -> Float[Array, "b n e"]:
    """Apply a linear layer to many tokens; reverse-mode differentiation only.

    On a TPU the bias' gradient is a product with ones: as a sum over rows it would take
    as long as the layer.
    """
    y = dense(x, Affine(weights.kernel, None), dtype)
    return y if weights.bias is None else _add_bias(y, weights.bias.astype(dtype))


@jax.custom_vjp
def _add_bias(
    y: Float[Array, "b n e"], bias: Float[Array, " e"]
) -> Float[Array, "b n e"]:
    return y + bias.reshape(1, 1, -1)


def _add_bias_forward(y: Array, bias: Array) -> tuple[Array, None]:
    return _add_bias(y, bias), None


def _add_bias_backward(_: None, slope: Array) -> tuple[Array, Array]:
    def with_ones(slope: Array) -> Array:
        rows = slope.reshape(-1, slope.shape[-1])
        # With one row of ones the compiler would emit a sum.
        ones = jnp.ones((ROWS_OF_ONES, len(rows)), slope.dtype)
        total = jnp.matmul(ones, rows, preferred_element_type=jnp.float32)[0]
        return total.astype(slope.dtype)

    def plainly(slope: Array) -> Array:
        return slope.sum(axis=(0, 1))

    total = jax.lax.platform_dependent(slope, default=plainly, tpu=with_ones)
    return slope, total


_add_bias.defvjp(_add_bias_forward, _add_bias_backward)


class GroupNorm(nn.Module):
    """Group normalisation in float32: one pass for statistics, one for `x * a + d`.

    The map is not reshaped to groups: channel means are averaged to groups in a small
    array.

    Source:
      Wu & He, arXiv:1803.08494, eq. 1 and 6.
    """

    num_groups: int
    epsilon: float
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Normalise each example over the pixels and channels of each group."""
        channels = x.shape[-1]
        if channels % self.num_groups:
            raise ValueError(
                f"group norm: {channels} channels do not divide into "
                f"{self.num_groups} groups"
            )
        gamma = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
        beta = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
        x32 = x.astype(jnp.float32)

        def over_group(per_channel: Float[Array, "b c"]) -> Float[Array, "b c"]:
            groups = per_channel.reshape(x.shape[0], self.num_groups, -1)
            mean = groups.mean(axis=-1, keepdims=True)
            return jnp.broadcast_to(mean, groups.shape).reshape(per_channel.shape)

        mean = over_group(x32.mean(axis=(1, 2)))
        mean_square = over_group(jnp.square(x32).mean(axis=(1, 2)))
        variance = jnp.maximum(mean_square - jnp.square(mean), 0.0)
        a = gamma[None, :] * jax.lax.rsqrt(variance + self.epsilon)
        d = beta[None, :] - mean * a
        y = x32 * a[:, None, None, :] + d[:, None, None, :]
        return y.astype(self.dtype)


class ResBlock(nn.Module):
    """The autoencoder's residual block: twice norm, SiLU, convolution.

    The UNet's block, which reads the time, is `TimeResBlock`.

    Fields:
      channels: Channels out.
      num_groups: Groups of both norms.
      epsilon: Epsilon of both norms.
      dtype: Compute dtype; parameters stay float32.

    Source:
      latent-diffusion `ResnetBlock` of the autoencoder.
    """

    channels: int
    num_groups: int
    epsilon: float
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w e"]:
        """Transform `x`."""
        h = GroupNorm(self.num_groups, self.epsilon, self.dtype, name="norm1")(x)
        h = conv(self.channels, 3, self.dtype, "conv1")(nn.silu(h))
        h = GroupNorm(self.num_groups, self.epsilon, self.dtype, name="norm2")(h)
        h = conv(self.channels, 3, self.dtype, "conv2")(nn.silu(h))
        if x.shape[-1] != self.channels:
            x = conv(self.channels, 1, self.dtype, "skip")(x)
        return x + h


class Downsample(nn.Module):
    """Halve height and width by a strided 3x3 convolution.

    Fields:
      padding: `SYMMETRIC_PADDING` in the UNet, `TRAILING_PADDING` in the autoencoder;
        weights of one shift by half a pixel with the other.
      dtype: Compute dtype.
    """

    padding: tuple[tuple[int, int], tuple[int, int]]
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        """Return the map at half the resolution."""
        return nn.Conv(
            x.shape[-1],
            (3, 3),
            strides=2,
            padding=self.padding,
            dtype=self.dtype,
            conv_general_dilated=convolve,
            name="conv",
        )(x)


class Upsample(nn.Module):
    """Double height and width by nearest neighbours, then apply a 3x3 convolution."""

    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        """Return the map at twice the resolution."""
        channels = x.shape[-1]
        weights = Weights(channels, use_bias=True, zero_init=False, name="conv")
        kernel, bias = weights(channels, window=(3, 3))
        y = convolve_upsampled(x.astype(self.dtype), kernel)
        return y + jnp.asarray(bias).astype(self.dtype)[None, None, None, :]


def area_downsample(
    x: Float[Array, "b h w c"], *, factor: int
) -> Float[Array, "b h2 w2 c"]:
    """Average blocks of `factor` x `factor` pixels.

    Args:
      x: A map whose sides are multiples of `factor`.
      factor: At least 1.
    """
    b, h, w, c = x.shape
    blocks = x.reshape(b, h // factor, factor, w // factor, factor, c)
    return blocks.mean(axis=(2, 4))


def conv(
    channels: int, size: int, dtype: Dtype, name: str, *, zero_init: bool = False
) -> nn.Conv:
    """Return a stride-1 convolution that keeps height and width, unbound.

    Args:
      channels: Channels out.
      size: Side of the kernel; odd.
      dtype: Compute dtype.
      name: Name of the submodule, a part of the checkpoint format.
      zero_init: Start with a zero kernel.
    """
    kernel_init = nn.initializers.zeros if zero_init else nn.initializers.lecun_normal()
    return nn.Conv(
        channels,
        (size, size),
        padding=size // 2,
        kernel_init=kernel_init,
        dtype=dtype,
        conv_general_dilated=convolve,
        name=name,
    )
