"""FLOPs of the mathematics of a function, independent of compiler and device.

They are counted on the traced function: matrix products and convolutions count 2 FLOPs
for each multiply-add, a scan its body times its length; everything else is left out.
With `jax.checkpoint`, recomputed products would count twice: trace without it, so that
a utilisation does not rise with recomputation.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core


def count_flops(fn: Callable[..., Any], *args: Any) -> int:
    """Count the FLOPs of the products in a function.

    Of branches, the most expensive counts, or the one for any platform; of a loop of
    unknown length, one round.

    Args:
      fn: Any function that JAX can trace.
      args: Arrays or their shapes.
    """
    return _count(jax.make_jaxpr(fn)(*args).jaxpr)


def _count(jaxpr: core.Jaxpr) -> int:
    return sum(_count_equation(equation) for equation in jaxpr.eqns)


def _count_equation(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return _dot_flops(equation)
    if name == "conv_general_dilated":
        return _convolution_flops(equation)
    inner = [_count(jaxpr) for jaxpr in _inner(params)]
    if name == "cond":
        # The branch for any platform: those of one platform may pad.
        platforms = params.get("branches_platforms") or ()
        if None in platforms:
            return inner[platforms.index(None)]
        return max(inner, default=0)
    return sum(inner) * (params["length"] if name == "scan" else 1)


def _dot_flops(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    summed = math.prod(left[axis] for axis in contracted)
    return 2 * math.prod(equation.outvars[0].aval.shape) * summed


def _convolution_flops(equation: Any) -> int:
    """Count products with padding, but not with the zeros of a dilated input."""
    numbers, params = equation.params["dimension_numbers"], equation.params
    kernel = equation.invars[1].aval.shape
    image = equation.invars[0].aval.shape
    out = equation.outvars[0].aval.shape
    batch, _, *spatial = (out[axis] for axis in numbers.out_spec)
    out_channels, in_channels, *window = (kernel[axis] for axis in numbers.rhs_spec)
    taps = math.prod(window)
    pixels = math.prod(spatial)
    strided_input = math.prod(params["lhs_dilation"])
    if strided_input > 1:
        # Gradient of a strided convolution: every tap with every pixel of the input.
        pixels = math.prod(image[axis] for axis in numbers.lhs_spec[2:])
    return 2 * batch * pixels * taps * in_channels * out_channels


def _inner(params: dict[str, Any]) -> Iterator[core.Jaxpr]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item
