"""Attention that never writes its probabilities to memory: a kernel for TPUs.

The tokens of a feature map are few enough (64x64 of them at most, mostly) that all keys
and values of a head fit on the chip beside a block of queries. So the softmax is the
plain one, over whole rows, and the backward pass keeps nothing but the queries, keys
and values: it makes the probabilities of a block again, once, and takes all three
gradients from them.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from ldm_jax.nn.attention_blocks import Shape, block_of

VMEM_BYTES = 64 * 2**20


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def fused_attention(
    q: Float[Array, "b k n d"],
    k: Float[Array, "b k m d"],
    v: Float[Array, "b k m d"],
    interpret: bool = False,
) -> Float[Array, "b k n d"]:
    """Attend with `k` heads on a TPU, in float32 but for what is multiplied.

    Args:
      q: Queries, of a shape that `block_of` has a block for.
      k: Keys.
      v: Values.
      interpret: Run as plain operations, on any device.

    Returns:
      The mixed values.

    Source:
      Vaswani et al., arXiv:1706.03762, eq. 1; Dao et al., arXiv:2205.14135, sec. 3.1
      (probabilities made again in the backward pass).
    """
    heads = _Heads(q, k)
    return pl.pallas_call(
        _forward,
        grid=heads.grid,
        in_specs=[heads.block, heads.whole, heads.whole],
        out_specs=heads.block,
        out_shape=jax.ShapeDtypeStruct(q.shape, v.dtype),
        cost_estimate=heads.cost(products=2, arrays=(q, k, v, q)),
        compiler_params=heads.params,
        interpret=interpret,
        name="attention_forward",
    )(q, k, v)


def _fused_forward(q: Array, k: Array, v: Array, interpret: bool) -> tuple[Array, Any]:
    return fused_attention(q, k, v, interpret), (q, k, v)


def _fused_backward(
    interpret: bool, kept: tuple[Array, Array, Array], slope: Array
) -> tuple[Array, Array, Array]:
    q, k, v = kept
    heads = _Heads(q, k)
    like = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in kept]
    sums = pltpu.VMEM(k.shape[2:], jnp.float32)
    slopes = pl.pallas_call(
        _backward,
        grid=heads.grid,
        in_specs=[heads.block, heads.whole, heads.whole, heads.block],
        out_specs=[heads.block, heads.whole, heads.whole],
        out_shape=like,
        scratch_shapes=[sums, sums],
        cost_estimate=heads.cost(products=5, arrays=(q, k, v, q, q, k, v)),
        compiler_params=heads.params,
        interpret=interpret,
        name="attention_backward",
    )(q, k, v, slope.astype(v.dtype))
    return tuple(slopes)


fused_attention.defvjp(_fused_forward, _fused_backward)


class _Heads:
    """How the work on one head is cut: all keys, a block of queries after the other."""

    def __init__(self, q: Array, k: Array) -> None:
        batch, heads, queries, width = q.shape
        keys = k.shape[2]
        size = block_of(Shape(queries, keys, width))
        self.grid = (batch, heads, queries // size)
        self.block = pl.BlockSpec((1, 1, size, width), lambda b, h, i: (b, h, i, 0))
        self.whole = pl.BlockSpec((1, 1, keys, width), lambda b, h, i: (b, h, 0, 0))
        self.params = pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_BYTES,
        )
        self._probabilities = batch * heads * queries * keys
        self._width = width

    def cost(self, *, products: int, arrays: tuple[Array, ...]) -> pl.CostEstimate:
        """Say what the kernel does, so that what is around it is scheduled well."""
        return pl.CostEstimate(
            flops=2 * products * self._probabilities * self._width,
            transcendentals=self._probabilities,
            bytes_accessed=sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays),
        )


def _product(a: Array, b: Array, axis_of_a: int, axis_of_b: int) -> Array:
    contracted = (((axis_of_a,), (axis_of_b,)), ((), ()))
    return jax.lax.dot_general(a, b, contracted, preferred_element_type=jnp.float32)


def _exponentials(q: Array, k: Array) -> tuple[Array, Array]:
    """Return the numerators of the probabilities, and what each row sums to."""
    logits = _product(q, k, 1, 1) * q.shape[-1] ** -0.5
    top = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
    return top, top.sum(axis=-1, keepdims=True)


def _forward(q_ref: Any, k_ref: Any, v_ref: Any, out_ref: Any) -> None:
    top, total = _exponentials(q_ref[0, 0], k_ref[0, 0])
    v = v_ref[0, 0]
    out = _product(top.astype(v.dtype), v, 1, 0) / total
    out_ref[0, 0] = out.astype(out_ref.dtype)


def _backward(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    slope_ref: Any,
    dq_ref: Any,
    dk_ref: Any,
    dv_ref: Any,
    dk_sum: Any,
    dv_sum: Any,
) -> None:
    block, last = pl.program_id(2), pl.num_programs(2) - 1

    @pl.when(block == 0)
    def _() -> None:
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    q, k, v, slope = q_ref[0, 0], k_ref[0, 0], v_ref[0, 0], slope_ref[0, 0]
    top, total = _exponentials(q, k)
    weights = top / total
    dv_sum[...] += _product(weights.astype(v.dtype), slope, 0, 0)
    of_weights = _product(slope, v, 1, 1)
    mean = (weights * of_weights).sum(axis=-1, keepdims=True)
    of_logits = weights * (of_weights - mean) * q.shape[-1] ** -0.5
    of_logits = of_logits.astype(q.dtype)
    dq_ref[0, 0] = _product(of_logits, k, 1, 0).astype(dq_ref.dtype)
    dk_sum[...] += _product(of_logits, q, 0, 0)

    @pl.when(block == last)
    def _() -> None:
        dk_ref[0, 0] = dk_sum[...].astype(dk_ref.dtype)
        dv_ref[0, 0] = dv_sum[...].astype(dv_ref.dtype)
