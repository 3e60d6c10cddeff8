"""Networks of the reconstruction losses: patch discriminator and LPIPS."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ldm_jax.models.kernels.convolution import convolve
from ldm_jax.types import Dtype

BATCH_NORM_EPSILON = 1e-5
NEGATIVE_SLOPE = 0.2
MAX_WIDENING = 8
"""Largest factor between the widths of the discriminator's layers."""

VGG_BLOCKS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
"""Channels and convolutions of each block of VGG16."""
VGG_MIN_SIDE = 16
"""Smallest side of an image for its four poolings, in pixels."""
LPIPS_SHIFT = (-0.030, -0.088, -0.188)
LPIPS_SCALE = (0.458, 0.448, 0.450)
LPIPS_EPSILON = 1e-10


class PatchDiscriminator(nn.Module):
    """Classify overlapping patches of an image: real above 0, reconstructed below.

    Fields:
      channels: Channels of the first layer; later ones have up to eight times as many.
      num_layers: Strided layers; more give larger patches.
      dtype: Compute dtype; parameters, statistics and logits are float32.

    Source:
      Isola et al., arXiv:1611.07004, app. 6.1.2; the depth and the initialisation are
      those of taming-transformers' `NLayerDiscriminator`.
    """

    channels: int
    num_layers: int
    dtype: Dtype

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "b h w c"],
        *,
        axis_name: str | tuple[str, ...] | None,
    ) -> Float[Array, "b h2 w2"]:
        """Return a logit for each patch.

        Args:
          images: Images in [-1, 1], all real or all reconstructed: they share batch
            statistics.
          axis_name: Device axis of the batch statistics; None for these images alone.

        Raises:
          ValueError: If the images are smaller than a patch.
        """
        x = images.astype(self.dtype)
        x = _leaky(self._conv(self.channels, 2, True, "conv_0")(x))
        for i in range(1, self.num_layers + 1):
            strides = 2 if i < self.num_layers else 1
            width = self.channels * min(2**i, MAX_WIDENING)
            x = self._conv(width, strides, False, f"conv_{i}")(x)
            x = _leaky(BatchNorm(self.dtype, name=f"norm_{i}")(x, axis_name))
        logits = self._conv(1, 1, True, "conv_out")(x)
        if 0 in logits.shape:
            raise ValueError(
                f"patch discriminator: {images.shape[1]}x{images.shape[2]} pixels are "
                f"too few for {self.num_layers} strided layers"
            )
        return logits[..., 0].astype(jnp.float32)

    def _conv(self, channels: int, strides: int, use_bias: bool, name: str) -> nn.Conv:
        return nn.Conv(
            channels,
            (4, 4),
            strides=strides,
            padding=1,
            use_bias=use_bias,
            kernel_init=nn.initializers.normal(0.02),
            dtype=self.dtype,
            conv_general_dilated=convolve,
            name=name,
        )


class BatchNorm(nn.Module):
    """Batch normalisation without running averages.

    A discriminator is only used in training, on whole batches, so that its only state
    is its parameters.

    Fields:
      dtype: Compute dtype; parameters and statistics are float32.

    Source:
      Ioffe & Szegedy, arXiv:1502.03167, algorithm 1 (biased variance).
    """

    dtype: Dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], axis_name: str | tuple[str, ...] | None
    ) -> Float[Array, "b h w c"]:
        """Normalise over batch and pixels, and over a device axis if one is named."""

        def mean(x: Float[Array, "b h w c"]) -> Float[Array, " c"]:
            local = x.mean(axis=(0, 1, 2))
            return local if axis_name is None else jax.lax.pmean(local, axis_name)

        channels = (x.shape[-1],)
        gamma = self.param("scale", _near_one, channels)
        beta = self.param("bias", nn.initializers.zeros, channels, jnp.float32)
        centred = x.astype(jnp.float32)
        centred = centred - mean(centred)
        variance = mean(jnp.square(centred))
        y = centred * (gamma * jax.lax.rsqrt(variance + BATCH_NORM_EPSILON)) + beta
        return y.astype(self.dtype)


class Lpips(nn.Module):
    """Perceptual distance of two images: weighted differences of VGG16 features.

    0 for equal images. Its parameters are read from files; there is no dropout. All
    float32.

    Source:
      Zhang et al., arXiv:1801.03924, eq. 1 (LPIPS, linear heads, version 0.1).
    """

    @nn.compact
    def __call__(
        self, images: Float[Array, "b h w c"], others: Float[Array, "b h w c"]
    ) -> Float[Array, " b"]:
        """Return the distance of each pair of images.

        Args:
          images: Images in [-1, 1], grey or RGB, sides at least 16 pixels.
          others: Images of the same shape.

        Raises:
          ValueError: If the images are too small.
        """
        if min(images.shape[1:3]) < VGG_MIN_SIDE:
            raise ValueError(
                f"LPIPS: got {images.shape[1]}x{images.shape[2]} pixels, wanted sides "
                f"of at least {VGG_MIN_SIDE}"
            )
        vgg = Vgg16(name="vgg")
        total = jnp.zeros(images.shape[0], jnp.float32)
        pairs = zip(vgg(_scaled(images)), vgg(_scaled(others)), strict=True)
        for i, (left, right) in enumerate(pairs):
            difference = jnp.square(_unit_length(left) - _unit_length(right))
            head = nn.Dense(1, use_bias=False, kernel_init=_weights, name=f"head_{i}")
            total = total + head(difference).mean(axis=(1, 2, 3))
        return total


class Vgg16(nn.Module):
    """The convolutions of VGG16, with the last map of each of its five blocks.

    Source:
      Simonyan & Zisserman, arXiv:1409.1556, table 1, column D.
    """

    @nn.compact
    def __call__(
        self, images: Float[Array, "b h w 3"]
    ) -> tuple[Float[Array, "b _ _ _"], ...]:
        """Return the maps after conv1_2, conv2_2, conv3_3, conv4_3 and conv5_3."""
        x, maps = images, []
        for block, (channels, num_convs) in enumerate(VGG_BLOCKS, start=1):
            if block > 1:
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
            for i in range(1, num_convs + 1):
                name = f"conv{block}_{i}"
                x = nn.relu(nn.Conv(channels, (3, 3), padding=1, name=name)(x))
            maps.append(x)
        return tuple(maps)


def _leaky(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    return nn.leaky_relu(x, NEGATIVE_SLOPE)


def _near_one(key: Array, shape: tuple[int]) -> Float[Array, " c"]:
    return 1.0 + 0.02 * jax.random.normal(key, shape, jnp.float32)


def _weights(key: Array, shape: tuple[int, int], dtype: Dtype) -> Float[Array, "c 1"]:
    return jax.random.uniform(key, shape, dtype)


def _scaled(images: Float[Array, "b h w c"]) -> Float[Array, "b h w 3"]:
    """Normalise images as in the training of VGG16."""
    images = images.astype(jnp.float32)
    images = jnp.broadcast_to(images, (*images.shape[:3], 3))
    return (images - jnp.asarray(LPIPS_SHIFT)) / jnp.asarray(LPIPS_SCALE)


def _unit_length(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Scale the channels of each pixel to length 1; a pixel of zeros stays zero.

    The square root is not evaluated at 0, where its gradient would become NaN.
    """
    square = jnp.square(x).sum(axis=-1, keepdims=True)
    is_dark = square == 0.0
    length = jnp.where(is_dark, 0.0, jnp.sqrt(jnp.where(is_dark, 1.0, square)))
    return x / (length + LPIPS_EPSILON)
