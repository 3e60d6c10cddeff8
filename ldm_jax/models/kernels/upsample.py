"""Convolutions of maps whose pixels are first repeated twice in both directions."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ldm_jax.models.kernels.convolution import (
    FEW_IMAGES,
    NUMBERS,
    NUMBERS_OF_ROWS,
    WIDE,
    convolve,
    shifted_rows,
)

MANY_PIXELS = 64
"""With fewer in a batch, four convolutions on a CPU take longer than a larger one."""


def convolve_doubled(
    x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c e"]
) -> Float[Array, "b h2 w2 e"]:
    """Repeat every pixel of a map twice in both directions, and convolve.

    Of the nine pixels under the window four are different, so that nine products are
    four of sums of the kernel's weights: 4/9 of the arithmetic, on CPUs and TPUs.

    Args:
      x: The map.
      kernel: The kernel, float32; cast to the dtype of the map, after any sums.

    Returns:
      The map doubled and convolved, its edges padded with zeros.
    """
    b, h, w, _ = x.shape
    ways: dict[str, Any] = {}
    if b >= FEW_IMAGES:
        ways["tpu"] = with_gaps
    elif 2 * w >= WIDE:
        ways["tpu"] = by_rows_with_gaps
    if b * h * w >= MANY_PIXELS:
        ways["cpu"] = in_four_phases
    if not ways:
        return _doubled_plainly(x, kernel)
    return jax.lax.platform_dependent(x, kernel, default=_doubled_plainly, **ways)


def _doubled_plainly(x: Array, kernel: Array) -> Array:
    return convolve(
        x.repeat(2, axis=1).repeat(2, axis=2),
        kernel.astype(x.dtype),
        (1, 1),
        ((1, 1), (1, 1)),
        dimension_numbers=NUMBERS,
    )


def in_four_phases(
    x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c e"]
) -> Float[Array, "b h2 w2 e"]:
    """Make pixels of even and odd rows and columns one after the other.

    A window over an even row sees the row before once and its own twice; over an odd
    row its own twice and the one after once.

    Args:
      x: The map.
      kernel: The kernel, float32.
    """
    b, h, w, _ = x.shape
    rows = [
        jnp.stack(
            [
                convolve(
                    x,
                    both.astype(x.dtype),
                    (1, 1),
                    ((1 - odd_row, odd_row), (1 - odd_column, odd_column)),
                    dimension_numbers=NUMBERS,
                )
                for odd_column, both in enumerate(_even_and_odd(of_rows, axis=1))
            ],
            axis=3,
        )
        for odd_row, of_rows in enumerate(_even_and_odd(kernel, axis=0))
    ]
    return jnp.stack(rows, axis=2).reshape(b, 2 * h, 2 * w, -1)


def _even_and_odd(kernel: Array, *, axis: int) -> tuple[Array, Array]:
    first, middle, last = jnp.split(kernel, 3, axis)
    return (
        jnp.concatenate([first, middle + last], axis),
        jnp.concatenate([first + middle, last], axis),
    )


def with_gaps(
    x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c e"]
) -> Float[Array, "b h2 w2 e"]:
    """Put zeros between the pixels and convolve with a window of 4 x 4.

    Wherever it stands, four of its sixteen weights meet a pixel: those of the phase.

    Args:
      x: The map.
      kernel: The kernel, float32.
    """
    return jax.lax.conv_general_dilated(
        x,
        _four_by_four(kernel).astype(x.dtype),
        (1, 1),
        ((2, 2), (2, 2)),
        lhs_dilation=(2, 2),
        dimension_numbers=NUMBERS,
    )


def _four_by_four(kernel: Float[Array, "3 3 c e"]) -> Float[Array, "4 4 c e"]:
    for axis in (0, 1):
        first, middle, last = jnp.split(kernel, 3, axis)
        weights = [first, first + middle, middle + last, last]
        kernel = jnp.concatenate(weights, axis)
    return kernel


EVEN_AND_ODD = (((0, 0), (1, 2)), ((1, 1), (2, 3)))
"""Which rows an even and an odd row of a doubled map see (the one above, itself, the
one below), each through which row of a 4x4 window."""


def by_rows_with_gaps(
    x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c e"]
) -> Float[Array, "b h2 w2 e"]:
    """Double rows one by one, as the images of a large batch, with gaps between pixels.

    Args:
      x: The map.
      kernel: The kernel, float32.

    Returns:
      The map doubled and convolved; summed in float32.
    """
    return _doubled_rows(x, _four_by_four(kernel).astype(x.dtype))


@jax.custom_vjp
def _doubled_rows(
    x: Float[Array, "b h w c"], kernel: Float[Array, "4 4 c e"]
) -> Float[Array, "b h2 w2 e"]:
    b, h, w, _ = x.shape
    rows = shifted_rows(x)
    phases = [
        sum(
            _double_rows(rows[i], kernel[j], preferred_element_type=jnp.float32)
            for i, j in seen
        )
        for seen in EVEN_AND_ODD
    ]
    apart = [jnp.reshape(one, (b, h, 2 * w, -1)).astype(x.dtype) for one in phases]
    return jnp.stack(apart, axis=2).reshape(b, 2 * h, 2 * w, -1)


def _doubled_rows_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _doubled_rows(x, kernel), (x, kernel)


def _doubled_rows_backward(
    kept: tuple[Array, Array], slope: Array
) -> tuple[Array, Array]:
    x, kernel = kept
    rows = shifted_rows(x)
    apart = slope.reshape(*x.shape[:2], 2, *slope.shape[2:])
    total: Any = 0.0
    of_kernel: dict[int, Array] = {}
    for phase, seen in enumerate(EVEN_AND_ODD):
        slopes = shifted_rows(apart[:, :, phase])
        for i, j in seen:
            # The row that sees the one above it is seen by that one as the one below.
            total += _halve_rows(slopes[2 - i], kernel[j])
            double = functools.partial(_double_rows, rows[i])
            (of_kernel[j],) = jax.linear_transpose(double, kernel[j])(slopes[1])
    of_x = jnp.reshape(total, x.shape).astype(x.dtype)
    return of_x, jnp.stack([of_kernel[j] for j in range(4)])


_doubled_rows.defvjp(_doubled_rows_forward, _doubled_rows_backward)


def _double_rows(
    rows: Float[Array, "n w c"], kernel: Float[Array, "4 c e"], **kwargs: Any
) -> Float[Array, "n w2 e"]:
    return jax.lax.conv_general_dilated(
        rows,
        kernel,
        (1,),
        ((2, 2),),
        lhs_dilation=(2,),
        dimension_numbers=NUMBERS_OF_ROWS,
        **kwargs,
    )


def _halve_rows(
    rows: Float[Array, "n w2 e"], kernel: Float[Array, "4 c e"]
) -> Float[Array, "n w c"]:
    """Transpose `_double_rows` with respect to its rows; in float32."""
    return jax.lax.conv_general_dilated(
        rows,
        jnp.swapaxes(kernel[::-1], 1, 2),
        (2,),
        ((1, 1),),
        dimension_numbers=NUMBERS_OF_ROWS,
        preferred_element_type=jnp.float32,
    )
