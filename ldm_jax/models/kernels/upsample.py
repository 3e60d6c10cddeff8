"""Nearest-neighbour up-sampling followed by a 3x3 convolution, with fewer products."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ldm_jax.models.kernels.convolution import (
    FEW_IMAGES,
    NUMBERS,
    convolve,
)

MANY_PIXELS = 64
"""With fewer pixels in a batch, four convolutions on a CPU are slower than one."""


def convolve_upsampled(
    x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c e"]
) -> Float[Array, "b h2 w2 e"]:
    """Double both sides of a map by nearest neighbours, and convolve it.

    A 3x3 window covers four different pixels of the map, so that sums of the kernel's
    weights reduce nine products to four; used on CPUs and TPUs.

    Args:
      x: The map; its edges are padded with zeros after up-sampling.
      kernel: Float32 kernel; cast to the map's dtype after the sums.
    """
    b, h, w, _ = x.shape
    ways: dict[str, Any] = {}
    if b >= FEW_IMAGES:
        ways["tpu"] = with_gaps
    if b * h * w >= MANY_PIXELS:
        ways["cpu"] = in_four_phases
    if not ways:
        return _upsampled_plainly(x, kernel)
    return jax.lax.platform_dependent(x, kernel, default=_upsampled_plainly, **ways)


def _upsampled_plainly(x: Array, kernel: Array) -> Array:
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
    """Compute even and odd rows and columns of the result by four 2x2 convolutions.

    The window of an even row covers the row above once and its own twice; that of an
    odd row covers its own twice and the row below once.
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
    """Convolve the map, dilated by zeros, with a 4x4 kernel.

    At every place, four of the sixteen weights meet a pixel that is not a zero.
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
