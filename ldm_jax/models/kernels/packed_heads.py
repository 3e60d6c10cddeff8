"""Attention layer for TPUs: projections and attention with heads packed in lanes.

The projections write and read the memory layout of the attention kernel: the columns of
their weights are permuted, and no activation is moved.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ldm_jax.models.kernels.attention_blocks import Packing, packing_of
from ldm_jax.models.layers import Affine, dense_of_many
from ldm_jax.types import Dtype


@functools.partial(jax.jit, static_argnames=("num_heads", "dtype", "interpret"))
def attend_in_lanes(  # compiled, so that layers of one shape trace their kernels once
    x: Float[Array, "b n c"],
    read: Float[Array, "b m e"],
    projections: tuple[Affine, Affine, Affine, Affine],
    num_heads: int,
    dtype: Dtype,
    *,
    interpret: bool = False,
) -> Float[Array, "b n f"]:
    """Project, attend and project, on a TPU.

    Args:
      x: Tokens that read.
      read: Tokens that are read.
      projections: To queries, keys and values, and from the mixed values.
      num_heads: Heads.
      dtype: Compute dtype.
      interpret: Run the kernel as plain operations, on any device.
    """
    # Here, since kernels take a tenth of a second to import and few programs need them.
    from ldm_jax.models.kernels.attention import fused_attention

    *ways_in, out = projections
    packing = packing_of(num_heads, out.kernel.shape[0] // num_heads)
    packed = [
        Affine(
            pack(kernel, packing, axis=1),
            None if bias is None else pack(bias, packing, axis=0),
        )
        for kernel, bias in ways_in
    ]
    q, k, v = (
        dense_of_many(tokens, weights, dtype)
        for tokens, weights in zip((x, read, read), packed, strict=True)
    )
    mixed: Any = fused_attention(q, k, v, packing, interpret)
    kernel = pack(out.kernel, packing, axis=0)
    return dense_of_many(mixed, Affine(kernel, out.bias), dtype)


def pack(x: Array, packing: Packing, *, axis: int) -> Array:
    """Put the channels of heads where their lanes are, with zeros in the others.

    Args:
      x: Any array with an axis of `heads * width`.
      packing: How.
      axis: That axis; it becomes `groups * lanes` long.
    """
    _, width, together, lanes, groups = packing
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    missing = groups * together * width - x.shape[axis]
    x = _extend(x, axis, missing)
    x = x.reshape(*before, groups, together * width, *after)
    x = _extend(x, axis + 1, lanes - together * width)
    return x.reshape(*before, groups * lanes, *after)


def _extend(x: Array, axis: int, by: int) -> Array:
    if not by:
        return x
    return jnp.pad(x, [(0, by if i == axis else 0) for i in range(x.ndim)])
