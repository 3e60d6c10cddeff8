"""Attention that never writes its probabilities to memory: a kernel for TPUs.

The tokens of a feature map are few enough (64x64 of them at most, mostly) that all keys
and values of a head fit on the chip beside a block of queries. So the softmax is the
plain one, over whole rows. The backward pass makes the probabilities again, a block of
queries and of keys after the other, and takes all three gradients from them in one go.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from ldm_jax.nn.attention_blocks import Shape, blocks_of

VMEM_BYTES = 64 * 2**20
LANES = 128


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def fused_attention(
    q: Float[Array, "b k n d"],
    k: Float[Array, "b k m d"],
    v: Float[Array, "b k m d"],
    interpret: bool = False,
) -> Float[Array, "b k n d"]:
    """Attend with `k` heads on a TPU, in float32 but for what is multiplied.

    Args:
      q: Queries, of a shape that `blocks_of` has blocks for.
      k: Keys.
      v: Values.
      interpret: Run as plain operations, on any device.

    Returns:
      The mixed values.

    Source:
      Vaswani et al., arXiv:1706.03762, eq. 1; Dao et al., arXiv:2205.14135, app. B.2
      (what is kept of a row for the backward pass: its logarithm of the sum of
      exponentials, and its product with the gradient).
    """
    return _run_forward(q, k, v, interpret)[0]


def _run_forward(q: Array, k: Array, v: Array, interpret: bool) -> tuple[Array, ...]:
    cut = _Cut(q, k)
    out = jax.ShapeDtypeStruct(q.shape, v.dtype)
    return cut.call(
        _forward,
        (q, k, v),
        in_specs=[cut.some, cut.whole, cut.whole],
        out_specs=[cut.some, cut.row],
        out_shape=[out, jax.ShapeDtypeStruct(cut.rows, jnp.float32)],
        products=2,
        interpret=interpret,
    )


def _fused_forward(q: Array, k: Array, v: Array, interpret: bool) -> tuple[Array, Any]:
    out, log_sum = _run_forward(q, k, v, interpret)
    return out, (q, k, v, out, log_sum)


def _fused_backward(
    interpret: bool, kept: tuple[Array, Array, Array, Array, Array], slope: Array
) -> tuple[Array, ...]:
    q, k, v, out, log_sum = kept
    product = (out.astype(jnp.float32) * slope.astype(jnp.float32)).sum(axis=-1)
    cut = _Cut(q, k)
    sums = pltpu.VMEM(k.shape[2:], jnp.float32)
    return cut.call(
        functools.partial(_backward, size=cut.blocks.keys),
        (q, k, v, slope.astype(v.dtype), log_sum, product.reshape(cut.rows)),
        in_specs=[cut.some, cut.whole, cut.whole, cut.some, cut.row, cut.row],
        out_specs=[cut.some, cut.whole, cut.whole],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)],
        scratch_shapes=[sums, sums],
        products=5,
        interpret=interpret,
    )


fused_attention.defvjp(_fused_forward, _fused_backward)


class _Cut:
    """How the work is cut: head by head, a block of queries after the other."""

    def __init__(self, q: Array, k: Array) -> None:
        batch, heads, queries, width = q.shape
        keys = k.shape[2]
        blocks = blocks_of(Shape(queries, keys, width))
        if blocks is None:
            raise ValueError(
                f"attention: {queries} queries and {keys} keys of {width} channels "
                "are not cut into blocks"
            )
        self.blocks = blocks
        self.rows = (batch, heads, 1, queries)
        size = blocks.queries
        self.some = pl.BlockSpec((1, 1, size, width), lambda b, h, i: (b, h, i, 0))
        self.row = pl.BlockSpec((1, 1, 1, size), lambda b, h, i: (b, h, 0, i))
        self.whole = pl.BlockSpec((1, 1, keys, width), lambda b, h, i: (b, h, 0, 0))
        self._grid = (batch, heads, queries // size)
        self._probabilities = batch * heads * queries * keys
        self._width = width

    def call(
        self,
        kernel: Any,
        arrays: Sequence[Array],
        *,
        out_shape: list[jax.ShapeDtypeStruct],
        products: int,
        **kwargs: Any,
    ) -> tuple[Array, ...]:
        """Run a kernel that makes so many products of probabilities' size."""
        moved = [*arrays, *out_shape]
        name = getattr(kernel, "func", kernel).__name__.strip("_")
        made = pl.pallas_call(
            kernel,
            grid=self._grid,
            out_shape=out_shape,
            # The compiler cannot look inside; with this it schedules what is around.
            cost_estimate=pl.CostEstimate(
                flops=2 * products * self._probabilities * self._width,
                transcendentals=self._probabilities,
                bytes_accessed=sum(
                    math.prod(a.shape) * a.dtype.itemsize for a in moved
                ),
            ),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"),
                vmem_limit_bytes=VMEM_BYTES,
            ),
            name=f"attention_{name}",
            **kwargs,
        )(*arrays)
        return tuple(made)


def _product(a: Array, b: Array, axis_of_a: int, axis_of_b: int) -> Array:
    contracted = (((axis_of_a,), (axis_of_b,)), ((), ()))
    return jax.lax.dot_general(a, b, contracted, preferred_element_type=jnp.float32)


def _scaled(q: Array) -> Array:
    return (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)


def _forward(
    q_ref: Any, k_ref: Any, v_ref: Any, out_ref: Any, log_sum_ref: Any
) -> None:
    v = v_ref[0, 0]
    logits = _product(_scaled(q_ref[0, 0]), k_ref[0, 0], 1, 1)
    largest = logits.max(axis=-1, keepdims=True)
    exponentials = jnp.exp(logits - largest)
    total = exponentials.sum(axis=-1, keepdims=True)
    out = _product(exponentials.astype(v.dtype), v, 1, 0) / total
    out_ref[0, 0] = out.astype(out_ref.dtype)
    # A column becomes a row: as a column it would fill 128 lanes in memory.
    column = largest + jnp.log(total)
    log_sum_ref[0, 0] = jnp.broadcast_to(column, (len(column), LANES)).T[:1]


def _backward(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    slope_ref: Any,
    log_sum_ref: Any,
    product_ref: Any,
    dq_ref: Any,
    dk_ref: Any,
    dv_ref: Any,
    dk_sum: Any,
    dv_sum: Any,
    *,
    size: int,
) -> None:
    """Take the gradients of a block of queries, `size` keys after the other.

    Probabilities have keys as rows here, so that what was kept of each query is a row
    and three of the five products need no transposition.
    """
    block, last = pl.program_id(2), pl.num_programs(2) - 1

    @pl.when(block == 0)
    def _() -> None:
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    q, slope = _scaled(q_ref[0, 0]), slope_ref[0, 0]
    log_sum, product = log_sum_ref[0, 0], product_ref[0, 0]
    dq = jnp.zeros(q.shape[::-1], jnp.float32)
    for start in range(0, k_ref.shape[2], size):
        part = pl.ds(start, size)
        k, v = k_ref[0, 0, part, :], v_ref[0, 0, part, :]
        weights = jnp.exp(_product(k, q, 1, 1) - log_sum)
        dv_sum[part, :] += _product(weights.astype(v.dtype), slope, 1, 0)
        of_logits = weights * (_product(v, slope, 1, 1) - product)
        of_logits = of_logits.astype(q.dtype)
        dk_sum[part, :] += _product(of_logits, q, 1, 0)
        dq += _product(k, of_logits, 0, 0)
    dq_ref[0, 0] = (dq.T * q.shape[-1] ** -0.5).astype(dq_ref.dtype)

    @pl.when(block == last)
    def _() -> None:
        dk_ref[0, 0] = dk_sum[...].astype(dk_ref.dtype)
        dv_ref[0, 0] = dv_sum[...].astype(dv_ref.dtype)
