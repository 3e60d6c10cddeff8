"""What stands between encoder and decoder: a Gaussian, or a codebook."""

from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

MIN_LOG_VARIANCE = -30.0
MAX_LOG_VARIANCE = 20.0


class DiagonalGaussian(NamedTuple):
    """A Gaussian with a diagonal covariance over each latent.

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
        """Return mean and log variance side by side, as `read_moments` takes them."""
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
    """Latents on their way to a codebook, with the methods of a Gaussian.

    Stage 2 learns these, not the codes: the decoder quantises what it is given.

    Source:
      latent-diffusion `VQModelInterface`.
    """

    latents: Float[Array, "b h w c"]
    """The encoder's output, in unscaled-latent units."""

    def sample(self, noise: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Return the latents; nothing is drawn, `noise` is ignored."""
        del noise
        return self.latents

    def mode(self) -> Float[Array, "b h w c"]:
        """Return the latents."""
        return self.latents

    def moments(self) -> Float[Array, "b h w c"]:
        """Return the latents, as `read_moments` takes them."""
        return self.latents


class Quantized(NamedTuple):
    """Latents and the codes they fell on."""

    latents: Float[Array, "b h w c"]
    """Before, float32."""
    codes: Float[Array, "b h w c"]
    """The nearest vectors of the codebook, float32; a gradient reaches the codebook
    through them."""
    indices: Int[Array, "b h w"]
    """Their places in the codebook, in [0, k)."""

    def straight_through(self) -> Float[Array, "b h w c"]:
        """Return the codes, bit for bit, with the gradient of the latents.

        Source:
          Van den Oord et al., arXiv:1711.00937, sec. 3.2.
        """
        codes = jax.lax.stop_gradient(self.codes)
        return codes + (self.latents - jax.lax.stop_gradient(self.latents))

    def loss(
        self, *, beta: float, commitment: Literal["corrected", "legacy"]
    ) -> Float[Array, ""]:
        """Draw codes to latents and latents to codes, a mean over all values.

        Args:
          beta: Weight of one of the two parts, at least 0.
          commitment: Which one: `corrected` weights the part that moves the latents,
            as the paper does; `legacy` the part that moves the codebook, as the
            released models were trained.

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
    """The vectors that latents are rounded to.

    Fields:
      size: How many.
      width: Channels of each, those of the latent.

    Source:
      Van den Oord et al., arXiv:1711.00937, sec. 3.1; the initialisation is
      taming-transformers'.
    """

    size: int
    width: int

    @nn.compact
    def __call__(self, latents: Float[Array, "b h w d"]) -> Quantized:
        """Find the vector nearest to each latent; of equals, the first."""
        embedding = self.param("embedding", _init_codes, (self.size, self.width))
        latents = latents.astype(jnp.float32)
        indices = nearest(latents, embedding)
        return Quantized(latents, embedding[indices], indices)


def nearest(
    latents: Float[Array, "b h w d"], codes: Float[Array, "k d"]
) -> Int[Array, "b h w"]:
    """Return the index of the code nearest to each latent, the lowest of equals.

    The squared distance without its `|latent|^2`, which moves no minimum and would
    cost digits while the codes are still small. Full float32: accelerators multiply
    matrices in bfloat16 unless asked not to, and a wrong index is not a small error.

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
    """Return the share of each code among `indices`, out of `size` codes."""
    counts = jnp.bincount(indices.ravel(), length=size)
    return counts.astype(jnp.float32) / indices.size


def perplexity(usage: Float[Array, " k"]) -> Float[Array, ""]:
    """Return the exponential of the entropy of shares: the codes used, effectively."""
    return jnp.exp(-jax.scipy.special.xlogy(usage, usage).sum())


def gaussian_from_moments(moments: Float[Array, "b h w c2"]) -> DiagonalGaussian:
    """Split an encoder's output into a Gaussian.

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
    """Turn an encoder's output, or what was kept of it, into something to draw from.

    Args:
      moments: Of either precision.
      regularizer: What stands between encoder and decoder.

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
