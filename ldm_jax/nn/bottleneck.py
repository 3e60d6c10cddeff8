"""What stands between encoder and decoder: a Gaussian over the latent."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

MIN_LOG_VARIANCE = -30.0
MAX_LOG_VARIANCE = 20.0


class DiagonalGaussian(NamedTuple):
    """A Gaussian with a diagonal covariance over each latent.

    Attributes:
      mean: Mean, in unscaled-latent units.
      log_variance: Logarithm of the variance, clamped to [-30, 20].

    Source:
      Kingma & Welling, arXiv:1312.6114; the clamp is latent-diffusion's.
    """

    mean: Float[Array, "b h w c"]
    log_variance: Float[Array, "b h w c"]

    def sample(self, noise: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Return `mean + std * noise`, with unit-variance noise."""
        return self.mean + jnp.exp(0.5 * self.log_variance) * noise

    def kl(self) -> Float[Array, " b"]:
        """Return the KL divergence to N(0, I) in nats, summed over each latent.

        Source:
          Kingma & Welling, arXiv:1312.6114, app. B.
        """
        terms = (
            jnp.square(self.mean) + jnp.exp(self.log_variance) - 1.0 - self.log_variance
        )
        return 0.5 * terms.sum(axis=(1, 2, 3))


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
