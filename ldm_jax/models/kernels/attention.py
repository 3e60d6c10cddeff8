"""Attention kernel for TPUs that does not write its probabilities to memory.

A feature map has few tokens (mostly at most 64x64), so that all keys and values of a
head fit in fast memory beside a block of queries, and the softmax is the plain one over
whole rows. The backward pass recomputes the probabilities block by block, and computes
all three gradients from them.

Heads are packed side by side in lanes (`Packing`). If several share a group, the
queries and gradients of one are used with zeros in place of the others: a product over
all lanes of the group then equals that over its own lanes, at no cost in a matrix unit
that is at least 128 wide.
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

from ldm_jax.models.kernels.attention_blocks import (
    LANES,
    MEMORY,
    Packing,
    Shape,
    blocks_of,
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def fused_attention(
    q: Float[Array, "b n l"],
    k: Float[Array, "b m l"],
    v: Float[Array, "b m l"],
    packing: Packing,
    interpret: bool = False,
) -> Float[Array, "b n l"]:
    """Compute attention on a TPU, in float32 except for the operands of products.

    Args:
      q: Packed queries, of a shape that `blocks_of` accepts; unused lanes are zero in
        all three.
      k: Packed keys.
      v: Packed values.
      packing: Memory layout of the heads.
      interpret: Run as plain operations on any device.

    Returns:
      Packed weighted values.

    Source:
      Vaswani et al., arXiv:1706.03762, eq. 1; Dao et al., arXiv:2205.14135, app. B.2
      (saved for the backward pass: the log-sum-exp of each row, and the product of
      output and gradient).
    """
    return _run_forward(q, k, v, packing, interpret)[0]


def _run_forward(
    q: Array, k: Array, v: Array, packing: Packing, interpret: bool
) -> tuple[Array, ...]:
    cut = _Cut(q, k, packing)
    out = jax.ShapeDtypeStruct(q.shape, v.dtype)
    return cut.call(
        functools.partial(_forward, packing=packing),
        (q, k, v),
        name="attention_forward",
        in_specs=[cut.some, cut.whole, cut.whole],
        out_specs=[cut.some, cut.row],
        out_shape=[out, jax.ShapeDtypeStruct(cut.rows, jnp.float32)],
        products=2,
        interpret=interpret,
    )


def _fused_forward(
    q: Array, k: Array, v: Array, packing: Packing, interpret: bool
) -> tuple[Array, Any]:
    out, log_sum = _run_forward(q, k, v, packing, interpret)
    return out, (q, k, v, out, log_sum)


def _fused_backward(
    packing: Packing,
    interpret: bool,
    kept: tuple[Array, Array, Array, Array, Array],
    slope: Array,
) -> tuple[Array, ...]:
    q, k, v, out, log_sum = kept
    cut = _Cut(q, k, packing)
    sums = pltpu.VMEM((k.shape[1], packing.lanes), jnp.float32)
    return cut.call(
        functools.partial(_backward, packing=packing, size=cut.blocks.keys),
        (q, k, v, out, slope.astype(v.dtype), log_sum),
        name="attention_backward",
        in_specs=[cut.some, cut.whole, cut.whole, cut.some, cut.some, cut.row],
        out_specs=[cut.some, cut.whole, cut.whole],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)],
        scratch_shapes=[sums, sums],
        products=5,
        interpret=interpret,
    )


fused_attention.defvjp(_fused_forward, _fused_backward)


class _Cut:
    """Grid of the kernel: group of heads, block of queries, head of the group."""

    def __init__(self, q: Array, k: Array, packing: Packing) -> None:
        (batch, queries, _), keys = q.shape, k.shape[1]
        blocks = blocks_of(Shape(queries, keys, packing.width))
        if blocks is None:
            raise ValueError(
                f"attention: {queries} queries and {keys} keys of {packing.width} "
                "channels are not cut into blocks"
            )
        self.blocks = blocks
        together, lanes = packing.together, packing.lanes
        self.rows = (batch, packing.groups * together, 1, queries)
        size = blocks.queries
        self.some = pl.BlockSpec((1, size, lanes), lambda b, g, i, j: (b, i, g))
        self.row = pl.BlockSpec(
            (1, 1, 1, size), lambda b, g, i, j: (b, g * together + j, 0, i)
        )
        self.whole = pl.BlockSpec((1, keys, lanes), lambda b, g, i, j: (b, 0, g))
        self._grid = (batch, packing.groups, queries // size, together)
        self._step = f"{size}x{keys}"
        self._probabilities = batch * packing.heads * queries * keys
        self._width = packing.width

    def call(
        self,
        kernel: Any,
        arrays: Sequence[Array],
        *,
        name: str,
        out_shape: list[jax.ShapeDtypeStruct],
        products: int,
        **kwargs: Any,
    ) -> tuple[Array, ...]:
        """Run a kernel that has `products` matrix products of the probabilities' size.

        Its name states the size of a step, from which `tools.plan` estimates cycles.
        """
        moved = [*arrays, *out_shape]
        made = pl.pallas_call(
            kernel,
            name=f"{name}_{self._step}",
            grid=self._grid,
            out_shape=out_shape,
            # The compiler schedules surrounding work by this estimate.
            cost_estimate=pl.CostEstimate(
                flops=2 * products * self._probabilities * self._width,
                transcendentals=self._probabilities,
                bytes_accessed=sum(
                    math.prod(a.shape) * a.dtype.itemsize for a in moved
                ),
            ),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
                vmem_limit_bytes=MEMORY,
            ),
            **kwargs,
        )(*arrays)
        return tuple(made)


def _product(a: Array, b: Array, axis_of_a: int, axis_of_b: int) -> Array:
    contracted = (((axis_of_a,), (axis_of_b,)), ((), ()))
    # A product of 16 bits is exact; one of float32 has the precision of the model.
    precision = None if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(
        a, b, contracted, precision=precision, preferred_element_type=jnp.float32
    )


def _as_row(column: Array) -> Array:
    """Transpose a column to a row: a column would use 128 lanes in memory."""
    return jnp.broadcast_to(column, (len(column), LANES)).T[:1]


class _Head:
    """The head of a step of the grid."""

    def __init__(self, packing: Packing) -> None:
        self._packing = packing
        self._place = pl.program_id(3)
        self.is_first = self._place == 0
        index = pl.program_id(1) * packing.together + self._place
        self.is_one = index < packing.heads

    def alone(self, x: Array) -> Array:
        """Set the lanes of the other heads of the group to zero."""
        if self._packing.together == 1:
            return x
        lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
        start = self._place * self._packing.width
        is_own = (lane >= start) & (lane < start + self._packing.width)
        return jnp.where(is_own, x, jnp.zeros_like(x))

    def scaled(self, q: Array) -> Array:
        """Return the scaled queries of the head."""
        q32 = q.astype(jnp.float32) * self._packing.width**-0.5
        return self.alone(q32).astype(q.dtype)

    def put(self, x: Array, ref: Any) -> None:
        """Write the head's lanes of a block that the heads of a group fill in turn."""
        before = jnp.where(self.is_first, jnp.zeros_like(ref[0]), ref[0])
        ref[0] = before + self.alone(x).astype(ref.dtype)


def _forward(
    q_ref: Any, k_ref: Any, v_ref: Any, out_ref: Any, log_sum_ref: Any, *, packing: Any
) -> None:
    head = _Head(packing)

    @pl.when(head.is_one)
    def _() -> None:
        v = v_ref[0]
        logits = _product(head.scaled(q_ref[0]), k_ref[0], 1, 1)
        largest = logits.max(axis=-1, keepdims=True)
        exponentials = jnp.exp(logits - largest)
        total = exponentials.sum(axis=-1, keepdims=True)
        head.put(_product(exponentials.astype(v.dtype), v, 1, 0) / total, out_ref)
        log_sum_ref[0, 0] = _as_row(largest + jnp.log(total))


def _backward(*refs: Any, packing: Packing, size: int) -> None:
    """Compute the gradients of a block of queries, `size` keys at a time.

    Probabilities have keys as rows here: the saved values of the queries are then rows,
    and three of the five products need no transposition.
    """
    q_ref, k_ref, v_ref, out_ref, slope_ref, log_sum_ref, *outputs = refs
    dq_ref, dk_ref, dv_ref, dk_sum, dv_sum = outputs
    head = _Head(packing)
    block, last = pl.program_id(2), pl.num_programs(2) - 1

    @pl.when((block == 0) & head.is_first)
    def _() -> None:
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    @pl.when(head.is_one)
    def _() -> None:
        q, slope = head.scaled(q_ref[0]), head.alone(slope_ref[0])
        log_sum = log_sum_ref[0, 0]
        rows = out_ref[0].astype(jnp.float32) * slope.astype(jnp.float32)
        product = _as_row(rows.sum(axis=-1, keepdims=True))
        dq = jnp.zeros(q.shape[::-1], jnp.float32)
        for start in range(0, k_ref.shape[1], size):
            part = pl.ds(start, size)
            k, v = k_ref[0, part, :], v_ref[0, part, :]
            weights = jnp.exp(_product(k, q, 1, 1) - log_sum)
            dv_sum[part, :] += _product(weights.astype(v.dtype), slope, 1, 0)
            of_logits = weights * (_product(v, slope, 1, 1) - product)
            of_logits = of_logits.astype(q.dtype)
            dk_sum[part, :] += _product(of_logits, q, 1, 0)
            dq += _product(k, of_logits, 0, 0)
        head.put(dq.T * packing.width**-0.5, dq_ref)

    @pl.when((block == last) & (pl.program_id(3) == packing.together - 1))
    def _() -> None:
        dk_ref[0] = dk_sum[...].astype(dk_ref.dtype)
        dv_ref[0] = dv_sum[...].astype(dv_ref.dtype)
