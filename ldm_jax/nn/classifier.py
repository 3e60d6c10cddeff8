"""A small network that tells classes of images apart, and what it sees on the way."""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from ldm_jax.nn.layers import GroupNorm, conv

SMALLEST_MAP = 4
"""Side of the map that is averaged; larger ones are halved."""
NORM_EPSILON = 1e-5


class Seen(NamedTuple):
    """What the classifier says of images.

    Attributes:
      pooled: Features.
      logits: Of the classes.
    """

    pooled: Float[Array, "b d"]
    logits: Float[Array, "b k"]


class Classifier(nn.Module):
    """Convolutions with strides down to a map of 4x4, a mean, a linear layer.

    Fields:
      num_classes: Classes there are.
      channels: Of the first convolution; each later one has twice as many, up to
        `width`.
      width: Of a feature.
      num_groups: Groups of every norm.
    """

    num_classes: int
    channels: int
    width: int
    num_groups: int

    @nn.compact
    def __call__(self, images: Float[Array, "b h w c"]) -> Seen:
        """Look at images in [-1, 1] of any size."""
        x, channels, i = images.astype(jnp.float32), self.channels, 0
        while True:
            x = conv(channels, 3, jnp.dtype("float32"), f"conv_{i}")(x)
            x = self._norm(x, f"norm_{i}")
            if min(x.shape[1:3]) < 2 * SMALLEST_MAP:
                break
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
            channels, i = min(2 * channels, self.width), i + 1
        x = conv(self.width, 3, jnp.dtype("float32"), "conv_out")(x)
        pooled = self._norm(x, "norm_out").mean(axis=(1, 2))
        return Seen(pooled, nn.Dense(self.num_classes, name="head")(pooled))

    def _norm(self, x: Float[Array, "b h w c"], name: str) -> Float[Array, "b h w c"]:
        norm = GroupNorm(self.num_groups, NORM_EPSILON, jnp.dtype("float32"), name=name)
        return nn.silu(norm(x))
