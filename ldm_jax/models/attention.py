"""Attention over the pixels of a feature map."""

import contextlib
import contextvars
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ldm_jax.models.kernels.attention_blocks import (
    MEMORY,
    SMALL_MEMORY,
    WITH_SMALL_MEMORY,
    Shape,
    blocks_of,
    bytes_of,
    is_worth_a_kernel,
)
from ldm_jax.models.kernels.packed_heads import attend_in_lanes
from ldm_jax.models.layers import Affine, GroupNorm, Weights, dense, split_affine
from ldm_jax.types import Dtype

_kind: contextvars.ContextVar[str | None] = contextvars.ContextVar(
    "_kind", default=None
)


def attend(
    q: Float[Array, "b n k d"],
    k: Float[Array, "b m k d"],
    v: Float[Array, "b m k d"],
    *,
    mask: Bool[Array, "n m"] | None = None,
) -> Float[Array, "b n k d"]:
    """Softmax attention of `k` heads, the softmax in float32.

    On a GPU in 16 bits, attention that is large enough is cuDNN's kernel, which never
    writes its probabilities to memory. Everywhere else it is `attend_plainly`. On a TPU
    a whole layer is done in another way: see `for_platform`.

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
    plainly = functools.partial(attend_plainly, mask=mask)
    shape = Shape(queries=q.shape[1], keys=k.shape[1], width=q.shape[3])
    if mask is not None or not is_worth_a_kernel(shape):
        return plainly(q, k, v)
    if q.dtype != jnp.bfloat16 or not cudnn_attends(shape):
        return plainly(q, k, v)
    return jax.lax.platform_dependent(q, k, v, default=plainly, cuda=_on_gpu)


def attend_plainly(
    q: Float[Array, "b n k d"],
    k: Float[Array, "b m k d"],
    v: Float[Array, "b m k d"],
    *,
    mask: Bool[Array, "n m"] | None = None,
) -> Float[Array, "b n k d"]:
    """Do the same by plain operations: the one that the kernels are checked against."""
    scale = q.shape[-1] ** -0.5
    logits = jnp.einsum("bnkd,bmkd->bknm", q * scale, k)
    logits = logits.astype(jnp.float32)
    if mask is not None:
        logits = jnp.where(mask[None, None], logits, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1)
    return jnp.einsum("bknm,bmkd->bnkd", weights.astype(v.dtype), v)


@contextlib.contextmanager
def for_chip(kind: str) -> Iterator[None]:
    """Trace for a kind of device that need not be here, as `TPU v4`."""
    token = _kind.set(kind)
    try:
        yield
    finally:
        _kind.reset(token)


def kernel_fits(shape: Shape, dtype: Dtype) -> bool:
    """Say whether a TPU, the one that is here or is traced for, has room for a kernel.

    Args:
      shape: Of the attention.
      dtype: Compute dtype.
    """
    blocks = blocks_of(shape)
    if blocks is None:
        return False
    kind = _kind.get()
    if kind is None and jax.default_backend() == "tpu":
        kind = jax.local_devices()[0].device_kind
    room = SMALL_MEMORY if kind in WITH_SMALL_MEMORY else MEMORY
    return bytes_of(shape, blocks, jnp.dtype(dtype).itemsize) < room


def for_platform(
    shape: Shape,
    dtype: Dtype,
    plainly: Callable[..., Array],
    in_lanes: Callable[..., Array],
) -> Callable[..., Array]:
    """Choose how a layer of attention is done: by the platform it is compiled for.

    On a TPU attention that is large enough is one kernel that never writes its
    probabilities to memory, and the projections around it write and read what lies as
    it wants it.

    Args:
      shape: Of the attention.
      dtype: Compute dtype.
      plainly: Does the layer by `attend`.
      in_lanes: Does it by `attend_in_lanes`.

    Returns:
      What takes the arguments of both.
    """
    if not kernel_fits(shape, dtype):
        return plainly
    chosen: Any = functools.partial(
        jax.lax.platform_dependent, default=plainly, tpu=in_lanes
    )
    return chosen


def _on_gpu(q: Array, k: Array, v: Array) -> Array:
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


@functools.cache
def cudnn_attends(shape: Shape) -> bool:
    """Say whether cuDNN has attention of this shape on the GPU that is here.

    It is tried, on one example and with gradients, since what it has depends on its
    version and on the GPU; where it fails, so is said once.

    Args:
      shape: Of the attention.
    """
    if jax.default_backend() != "gpu":
        return False

    def total(q: Array, k: Array, v: Array) -> Array:
        return _on_gpu(q, k, v).astype(jnp.float32).sum()

    try:
        with jax.ensure_compile_time_eval():
            q = jnp.ones((1, shape.queries, 1, shape.width), jnp.bfloat16)
            k = jnp.ones((1, shape.keys, 1, shape.width), jnp.bfloat16)
            jax.block_until_ready(jax.grad(total, argnums=(0, 1, 2))(q, k, k))
    except Exception as error:  # whatever it raises, there is another way
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        warnings.warn(
            f"cuDNN does not attend from {shape.queries} to {shape.keys} tokens of "
            f"{shape.width} channels ({reason}); plain operations do",
            stacklevel=2,
        )
        return False
    return True


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
        joined = Weights(3 * c, use_bias=True, zero_init=False, name="qkv")(c)
        out = Weights(c, use_bias=True, zero_init=self.zero_init, name="out")(c)

        def plainly(
            y: Float[Array, "b n c"], joined: Affine, out: Affine
        ) -> Float[Array, "b n c"]:
            qkv = dense(y, joined, self.dtype)
            q, k, v = jnp.moveaxis(
                qkv.reshape(b, h * w, 3, self.num_heads, c // self.num_heads), 2, 0
            )
            return dense(attend(q, k, v).reshape(b, h * w, c), out, self.dtype)

        def in_lanes(
            y: Float[Array, "b n c"], joined: Affine, out: Affine
        ) -> Float[Array, "b n c"]:
            q, k, v = split_affine(joined, 3)
            return attend_in_lanes(y, y, (q, k, v, out), self.num_heads, self.dtype)

        shape = Shape(queries=h * w, keys=h * w, width=c // self.num_heads)
        layer = for_platform(shape, self.dtype, plainly, in_lanes)
        return x + layer(y.reshape(b, h * w, c), joined, out).reshape(b, h, w, c)
