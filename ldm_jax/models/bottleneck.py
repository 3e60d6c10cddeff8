"""Bottlenecks of the autoencoder: a Gaussian (KL) or a codebook (VQ)."""

from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

MIN_LOG_VARIANCE = -30.0
MAX_LOG_VARIANCE = 20.0


class DiagonalGaussian(NamedTuple):
    """A Gaussian with diagonal covariance: the posterior of each latent.

    Source:
      Kingma & Welling, arXiv:1312.6114; the clamp is latent-diffusion's.
    """

    mean: Float[Array, "b h w c"]
    """Mean, in unscaled-latent units."""
    log_variance: Float[Array, "b h w c"]
    """Logarithm of the variance, clamped to [-30, 20]."""

    def sample(self, noise: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Return `mean + std * noise`, with unit-variance noise."""
        return self.mean + jnp.exp(0.5 * self.log_variance) * noise

    def mode(self) -> Float[Array, "b h w c"]:
        """Return the most probable latent, the mean."""
        return self.mean

    def moments(self) -> Float[Array, "b h w c2"]:
        """Concatenate mean and log variance, as `read_moments` expects."""
        return jnp.concatenate([self.mean, self.log_variance], axis=-1)

    def kl(self) -> Float[Array, " b"]:
        """Return the KL divergence to N(0, I) in nats, summed over each latent.

        Source:
          Kingma & Welling, arXiv:1312.6114, app. B.
        """
        terms = (
            jnp.square(self.mean) + jnp.exp(self.log_variance) - 1.0 - self.log_variance
        )
        return 0.5 * terms.sum(axis=(1, 2, 3))


class Unquantized(NamedTuple):
    """Latents before quantisation, with the methods of `DiagonalGaussian`.

    Stage 2 models these, not the codes: the decoder quantises its input.

    Source:
      latent-diffusion `VQModelInterface`.
    """

    latents: Float[Array, "b h w c"]
    """The encoder's output, in unscaled-latent units."""

    def sample(self, noise: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Return the latents; `noise` is ignored."""
        del noise
        return self.latents

    def mode(self) -> Float[Array, "b h w c"]:
        """Return the latents."""
        return self.latents

    def moments(self) -> Float[Array, "b h w c"]:
        """Return the latents, as `read_moments` expects."""
        return self.latents


class Quantized(NamedTuple):
    """Latents and their nearest codes."""

    latents: Float[Array, "b h w c"]
    """Latents before quantisation, float32."""
    codes: Float[Array, "b h w c"]
    """Nearest vectors of the codebook, float32, differentiable in the codebook."""
    indices: Int[Array, "b h w"]
    """Indices of the codes, in [0, k)."""

    def straight_through(self) -> Float[Array, "b h w c"]:
        """Return the codes, with the gradient of the latents.

        Source:
          Van den Oord et al., arXiv:1711.00937, sec. 3.2.
        """
        codes = jax.lax.stop_gradient(self.codes)
        return codes + (self.latents - jax.lax.stop_gradient(self.latents))

    def loss(
        self, *, beta: float, commitment: Literal["corrected", "legacy"]
    ) -> Float[Array, ""]:
        """Return the codebook loss plus the commitment loss, averaged over all values.

        Args:
          beta: Weight of one of the two terms, at least 0.
          commitment: The term that `beta` weights: `corrected` the commitment loss, as
            in the paper; `legacy` the codebook loss, as in the released models.

        Returns:
          The sum of both parts.

        Source:
          Van den Oord et al., arXiv:1711.00937, eq. 3, second and third term; the
          released form is taming-transformers' `VectorQuantizer2`.
        """
        still_latents = jax.lax.stop_gradient(self.latents)
        still_codes = jax.lax.stop_gradient(self.codes)
        codebook = jnp.square(self.codes - still_latents).mean()
        encoder = jnp.square(self.latents - still_codes).mean()
        if commitment == "legacy":
            return encoder + beta * codebook
        return codebook + beta * encoder


class Codebook(nn.Module):
    """A codebook of vectors.

    Fields:
      size: Number of vectors.
      width: Channels of a vector and of the latent.

    Source:
      Van den Oord et al., arXiv:1711.00937, sec. 3.1; the initialisation is
      taming-transformers'.
    """

    size: int
    width: int

    @nn.compact
    def __call__(self, latents: Float[Array, "b h w d"]) -> Quantized:
        """Quantise latents to their nearest vectors; the first of equally near ones."""
        embedding = self.param("embedding", _init_codes, (self.size, self.width))
        latents = latents.astype(jnp.float32)
        indices = nearest(latents, embedding)
        return Quantized(latents, embedding[indices], indices)


def nearest(
    latents: Float[Array, "b h w d"], codes: Float[Array, "k d"]
) -> Int[Array, "b h w"]:
    """Return the index of the nearest code of each latent, the lowest of equal ones.

    `|latent|^2` is left out of the squared distance: it does not move the minimum and
    would cost precision while codes are small. The product has full float32 precision,
    which accelerators do not use by default: a wrong index is not a small error.

    Args:
      latents: Float32.
      codes: Float32.

    Returns:
      Indices in [0, k), int32.
    """
    products = jnp.einsum(
        "bhwd,kd->bhwk", latents, codes, precision=jax.lax.Precision.HIGHEST
    )
    distances = jnp.square(codes).sum(axis=-1) - 2.0 * products
    return jnp.argmin(distances, axis=-1).astype(jnp.int32)


def code_usage(indices: Int[Array, "b h w"], *, size: int) -> Float[Array, " k"]:
    """Return the relative frequency of each of `size` codes in `indices`."""
    counts = jnp.bincount(indices.ravel(), length=size)
    return counts.astype(jnp.float32) / indices.size


def perplexity(usage: Float[Array, " k"]) -> Float[Array, ""]:
    """Return the exponential of the entropy: the effective number of used codes."""
    return jnp.exp(-jax.scipy.special.xlogy(usage, usage).sum())


def gaussian_from_moments(moments: Float[Array, "b h w c2"]) -> DiagonalGaussian:
    """Convert an encoder's output to a Gaussian.

    Args:
      moments: Mean in the first half of the channels, log variance in the second.

    Returns:
      The Gaussian, in float32.
    """
    mean, log_variance = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    return DiagonalGaussian(
        mean, jnp.clip(log_variance, MIN_LOG_VARIANCE, MAX_LOG_VARIANCE)
    )


def read_moments(
    moments: Float[Array, "b h w e"], *, regularizer: Literal["kl", "vq"]
) -> DiagonalGaussian | Unquantized:
    """Convert an encoder's output or cached moments to a posterior of latents.

    Args:
      moments: Moments of any float dtype.
      regularizer: Kind of bottleneck.

    Returns:
      A Gaussian or the latents themselves, in float32; its `moments()` read again give
      it bit for bit.
    """
    if regularizer == "kl":
        return gaussian_from_moments(moments)
    return Unquantized(moments.astype(jnp.float32))


def _init_codes(key: Array, shape: tuple[int, int]) -> Float[Array, "k d"]:
    bound = 1.0 / shape[0]
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)
