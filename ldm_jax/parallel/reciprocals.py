"""Divisions that XLA compiles in one way only: as products with a reciprocal."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.extend.core import primitives

from ldm_jax.types import PyTree

T = TypeVar("T")
SPREAD = primitives.broadcast_in_dim_p
INLINED = "call_jaxpr"
"""Parameter with the program of a function that has a derivative of its own."""
HOLDERS = frozenset({"jit", "scan", "while", "cond", "remat2"})
"""Operations that hold programs; those of a kernel are not XLA's to rewrite."""
PROGRAMS = (core.ClosedJaxpr, core.Jaxpr)


def with_reciprocals(fn: Callable[[PyTree], T]) -> Callable[[PyTree], T]:
    """Make a function whose divisions by a spread array multiply by its reciprocal.

    XLA rewrites these divisions (the softmax of attention has one) in the program of
    one device, and not in that of two, which differ in the order of its passes.
    """

    def changed(part: PyTree) -> T:
        jaxpr, shapes = jax.make_jaxpr(fn, return_shape=True)(part)
        outputs = _evaluate(jaxpr, jax.tree.leaves(part))
        return jax.tree.unflatten(jax.tree.structure(shapes), outputs)

    return changed


def _evaluate(closed: core.ClosedJaxpr, args: Sequence[Any]) -> list[Any]:
    """Evaluate a program, and the programs in it, with reciprocals."""
    jaxpr = closed.jaxpr
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
        else:
            params = eqn.params
            if eqn.primitive.name in HOLDERS:
                params = {name: _rewritten(value) for name, value in params.items()}
            params = eqn.primitive.get_bind_params(params)
            outputs = eqn.primitive.bind(*inputs, **params)
            outputs = outputs if eqn.primitive.multiple_results else [outputs]
        values |= zip(eqn.outvars, outputs, strict=True)
    return [read(var) for var in jaxpr.outvars]


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
    """Return a parameter of an operation, the programs in it with reciprocals."""
    if isinstance(value, tuple) and any(isinstance(x, PROGRAMS) for x in value):
        return tuple(map(_rewritten, value))
    if isinstance(value, core.Jaxpr):  # of a recomputed function
        return _rewritten(core.ClosedJaxpr(value, ())).jaxpr
    if not isinstance(value, core.ClosedJaxpr):
        return value
    return jax.make_jaxpr(lambda *args: _evaluate(value, args))(*value.in_avals)
