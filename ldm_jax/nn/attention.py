"""Attention over the pixels of a feature map."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ldm_jax.nn.layers import GroupNorm
from ldm_jax.types import Dtype


def attend(
    q: Float[Array, "b n k d"],
    k: Float[Array, "b m k d"],
    v: Float[Array, "b m k d"],
    *,
    mask: Bool[Array, "n m"] | None = None,
) -> Float[Array, "b n k d"]:
    """Softmax attention of `k` heads, the softmax in float32.

    Args:
      q: Queries, n tokens.
      k: Keys, m tokens.
      v: Values, m tokens.
      mask: Whether a query may read a key; each must be allowed one at least. None:
        every query reads every key.

    Returns:
      The mixed values, in the dtype of `v`.

    Source:
      Vaswani et al., arXiv:1706.03762, eq. 1.
    """
    scale = q.shape[-1] ** -0.5
    logits = jnp.einsum("bnkd,bmkd->bknm", q * scale, k)
    logits = logits.astype(jnp.float32)
    if mask is not None:
        logits = jnp.where(mask[None, None], logits, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1)
    return jnp.einsum("bknm,bmkd->bnkd", weights.astype(v.dtype), v)


class SelfAttention(nn.Module):
    """Let every pixel read every other, around a skip.

    Fields:
      num_heads: Heads; must divide the channels. The autoencoder has one.
      num_groups: Groups of the norm.
      epsilon: Of the norm.
      zero_init: Start as the identity (UNet) or not (autoencoder).
      dtype: Compute dtype; parameters and softmax stay float32.

    Source:
      latent-diffusion `AttentionBlock` (UNet) and `AttnBlock` (autoencoder).
    """

    num_heads: int
    num_groups: int
    epsilon: float
    zero_init: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Add what the pixels read of each other."""
        b, h, w, c = x.shape
        if c % self.num_heads:
            raise ValueError(
                f"attention: {c} channels do not divide into {self.num_heads} heads"
            )
        y = GroupNorm(self.num_groups, self.epsilon, self.dtype, name="norm")(x)
        qkv = nn.Dense(3 * c, dtype=self.dtype, name="qkv")(y.reshape(b, h * w, c))
        q, k, v = jnp.moveaxis(
            qkv.reshape(b, h * w, 3, self.num_heads, c // self.num_heads), 2, 0
        )
        y = attend(q, k, v).reshape(b, h * w, c)
        kernel_init = (
            nn.initializers.zeros if self.zero_init else nn.initializers.lecun_normal()
        )
        y = nn.Dense(c, kernel_init=kernel_init, dtype=self.dtype, name="out")(y)
        return x + y.reshape(b, h, w, c)
