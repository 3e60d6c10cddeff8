"""What XLA rewrites in some programs and not in others, rewritten before it.

XLA's passes come in another order in the program of one device than in that of two. In
one of them only, a division by a spread array (the softmax of attention has one)
becomes a product with its reciprocal, and the sum of a transposed array (Muon's norm of
a tall matrix) becomes that of the array itself.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.extend.core import primitives
from jaxtyping import Array

from ldm_jax.types import PyTree

T = TypeVar("T")
SPREAD = primitives.broadcast_in_dim_p
INLINED = "call_jaxpr"
"""Parameter with the program of a function that has a derivative of its own."""
HOLDERS = frozenset({"jit", "scan", "while", "cond", "remat2"})
"""Operations that hold programs; those of a kernel are not XLA's to rewrite."""
ALONE = "compiled_alone"
"""Name of the functions that `compiled_alone` makes."""
PROGRAMS = (core.ClosedJaxpr, core.Jaxpr)


def with_rewrites(
    fn: Callable[[PyTree], T], *, turns: Array | int = 1
) -> Callable[[PyTree], T]:
    """Make a function that XLA compiles alike for one device and for several.

    It divides by spread arrays as products with a reciprocal, sums arrays where `fn`
    sums their transposes, and has loops of one turn for what is `compiled_alone`: equal
    to `fn` up to rounding.

    Args:
      turns: 1, which XLA must not know, or it unrolls them.
    """

    def changed(part: PyTree) -> T:
        jaxpr, shapes = jax.make_jaxpr(fn, return_shape=True)(part)
        outputs = _evaluate(jaxpr, jax.tree.leaves(part), turns=turns)
        return jax.tree.unflatten(jax.tree.structure(shapes), outputs)

    return changed


def compiled_alone(fn: Callable[..., T]) -> Callable[..., T]:
    """Mark a function that `with_rewrites` has compiled without what is around it.

    Where XLA fuses `a x + b y` with its surroundings, it picks the product that is
    rounded by them.
    """

    def marked(*args: Any) -> T:
        return fn(*args)

    marked.__name__ = ALONE
    return jax.jit(marked)


class Transposed(NamedTuple):
    """How an array was made of another one."""

    array: Any
    """The array that it is; held, since it is found by its `id`."""
    source: Any
    """The array before."""
    permutation: tuple[int, ...]


def _evaluate(
    closed: core.ClosedJaxpr,
    args: Sequence[Any],
    transposed: Mapping[int, Transposed] | None = None,
    *,
    turns: Array | int = 1,
) -> list[Any]:
    """Evaluate a program, and the programs in it, with what is rewritten.

    Args:
      transposed: Arguments that are transposed arrays, by `id`.
      turns: As in `with_rewrites`.
    """
    jaxpr = closed.jaxpr
    known = dict(transposed or {})
    values = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    values |= zip(jaxpr.invars, args, strict=True)
    made_by = {var: eqn for eqn in jaxpr.eqns for var in eqn.outvars}

    def read(var: Any) -> Any:
        return var.val if isinstance(var, core.Literal) else values[var]

    for eqn in jaxpr.eqns:
        inputs = [read(var) for var in eqn.invars]
        if eqn.primitive is primitives.div_p and _is_spread(eqn, made_by):
            below = made_by.get(eqn.invars[1])
            if below is not None and below.primitive is SPREAD:
                one = jnp.reciprocal(read(below.invars[0]))
                one = SPREAD.bind(one, **below.params)
            else:
                one = jnp.reciprocal(inputs[1])
            outputs = [jax.lax.mul(inputs[0], one)]
        elif INLINED in eqn.params:
            outputs = _evaluate(eqn.params[INLINED], inputs)
        elif eqn.params.get("name") == ALONE:
            outputs = _in_a_loop(eqn.params["jaxpr"], inputs, turns=turns)
        elif eqn.primitive.name == "jit" and any(id(x) in known for x in inputs):
            outputs = _evaluate(eqn.params["jaxpr"], inputs, known)
        elif eqn.primitive is primitives.reduce_sum_p and id(inputs[0]) in known:
            outputs = [_sum_of(known[id(inputs[0])], eqn)]
        else:
            params = eqn.params
            if eqn.primitive.name in HOLDERS:
                params = {name: _rewritten(value) for name, value in params.items()}
            params = eqn.primitive.get_bind_params(params)
            outputs = eqn.primitive.bind(*inputs, **params)
            outputs = outputs if eqn.primitive.multiple_results else [outputs]
        values |= zip(eqn.outvars, outputs, strict=True)
        known |= _transposed(eqn, inputs, outputs, known)
    return [read(var) for var in jaxpr.outvars]


def _in_a_loop(
    closed: core.ClosedJaxpr, inputs: list[Any], *, turns: Array | int
) -> list[Any]:
    """Evaluate a program in a loop of one turn."""

    def turn(_: Array, before: list[Any]) -> list[Any]:
        del before
        # Else XLA takes out of the loop what does not depend on its turn.
        return _evaluate(closed, jax.lax.optimization_barrier(inputs))

    empty = [jnp.zeros(aval.shape, aval.dtype) for aval in closed.out_avals]
    return jax.lax.fori_loop(0, turns, turn, empty)


def _transposed(
    eqn: core.JaxprEqn,
    inputs: list[Any],
    outputs: list[Any],
    known: Mapping[int, Transposed],
) -> dict[int, Transposed]:
    """Return what an operation made, if it is a transposed array."""
    if eqn.primitive is primitives.transpose_p:
        source, permutation = inputs[0], tuple(eqn.params["permutation"])
    elif eqn.primitive is primitives.mul_p and all(id(x) in known for x in inputs):
        first, second = (known[id(x)] for x in inputs)
        if first.permutation != second.permutation:
            return {}
        source, permutation = first.source * second.source, first.permutation
    else:
        return {}
    return {id(outputs[0]): Transposed(outputs[0], source, permutation)}


def _sum_of(array: Transposed, eqn: core.JaxprEqn) -> Any:
    """Sum a transposed array over some axes, in the order of its source."""
    axes = tuple(sorted(array.permutation[axis] for axis in eqn.params["axes"]))
    kept = [axis for axis in array.permutation if axis not in axes]
    total = eqn.primitive.bind(array.source, **{**eqn.params, "axes": axes})
    return total.transpose([sorted(kept).index(axis) for axis in kept])


def _is_spread(eqn: core.JaxprEqn, made_by: Mapping[Any, core.JaxprEqn]) -> bool:
    """Return whether a division of floats is one by a smaller array."""
    above, below = (cast(Any, var.aval) for var in eqn.invars)
    if isinstance(eqn.invars[1], core.Literal):
        return False
    maker = made_by.get(eqn.invars[1])
    is_spread = maker is not None and maker.primitive is SPREAD
    is_float = jnp.issubdtype(below.dtype, jnp.floating)
    return is_float and (is_spread or above.shape != below.shape)


def _rewritten(value: Any) -> Any:
    """Return a parameter of an operation, the programs in it rewritten."""
    if isinstance(value, tuple) and any(isinstance(x, PROGRAMS) for x in value):
        return tuple(map(_rewritten, value))
    if isinstance(value, core.Jaxpr):  # of a recomputed function
        return _rewritten(core.ClosedJaxpr(value, ())).jaxpr
    if not isinstance(value, core.ClosedJaxpr):
        return value
    return jax.make_jaxpr(lambda *args: _evaluate(value, args))(*value.in_avals)
