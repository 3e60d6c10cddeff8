"""Attention, and self-attention over the pixels of a feature map."""

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
    """Compute softmax attention of `k` heads, with the softmax in float32.

    Large bfloat16 attention on a GPU uses cuDNN's kernel, which does not write the
    probabilities to memory; other attention uses `attend_plainly`. TPUs replace whole
    layers: see `for_platform`.

    Args:
      q: Queries of n tokens.
      k: Keys of m tokens.
      v: Values of m tokens.
      mask: True where a query attends to a key, at least one of each query; None for
        all.

    Returns:
      Weighted values, in the dtype of `v`.

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
    """Compute `attend` by plain operations, the reference of the kernels."""
    scale = q.shape[-1] ** -0.5
    logits = jnp.einsum("bnkd,bmkd->bknm", q * scale, k)
    logits = logits.astype(jnp.float32)
    if mask is not None:
        logits = jnp.where(mask[None, None], logits, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1)
    return jnp.einsum("bknm,bmkd->bnkd", weights.astype(v.dtype), v)


@contextlib.contextmanager
def for_chip(kind: str) -> Iterator[None]:
    """Trace for a kind of device that is not present, such as `TPU v4`."""
    token = _kind.set(kind)
    try:
        yield
    finally:
        _kind.reset(token)


def kernel_fits(shape: Shape, dtype: Dtype) -> bool:
    """Return whether the kernel fits the fast memory of the TPU that is traced for."""
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
    """Choose the implementation of an attention layer by the platform compiled for.

    Large attention on a TPU is one kernel that does not write the probabilities to
    memory; its projections write and read the memory layout of the kernel.

    Args:
      shape: Sizes of the attention.
      dtype: Compute dtype.
      plainly: The layer by `attend`.
      in_lanes: The layer by `attend_in_lanes`, with the same arguments.
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
    """Return whether cuDNN computes attention of this shape on this machine's GPU.

    It is tried once on one example, with gradients, because it depends on the versions
    of cuDNN and the GPU; a failure is a warning.
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
    except Exception as error:  # any failure selects plain operations
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        warnings.warn(
            f"cuDNN does not attend from {shape.queries} to {shape.keys} tokens of "
            f"{shape.width} channels ({reason}); plain operations do",
            stacklevel=2,
        )
        return False
    return True


class SelfAttention(nn.Module):
    """Self-attention over all pixels, with a residual connection.

    Fields:
      num_heads: Heads; must divide the channels. The autoencoder has one.
      num_groups: Groups of the norm.
      epsilon: Epsilon of the norm.
      zero_init: Whether it starts as the identity: in the UNet, not in the autoencoder.
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
        """Add the attention of the pixels to each other."""
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
