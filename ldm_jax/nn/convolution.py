"""3x3 convolutions in the order in which a chip is good at them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

FEW_IMAGES, WIDE = 8, 64
"""With fewer images than the first, and maps as wide as the second, a TPU convolves
row by row in less time."""


def convolve(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "n m c e"],
    strides: tuple[int, ...],
    padding: Any,
    **kwargs: Any,
) -> Float[Array, "b h2 w2 e"]:
    """Convolve as `jax.lax.conv_general_dilated` does; on a TPU, row by row if better.

    The eight images that a register holds side by side are more than there are in a
    small batch. The compiler then cuts maps into blocks and calls them images, with
    copies before and after that take most of the time. Rows are images enough.

    Args:
      x: The map.
      kernel: The kernel.
      strides: Of the window.
      padding: Of height and width.
      kwargs: As of `jax.lax.conv_general_dilated`.

    Returns:
      The map convolved.
    """
    plainly = functools.partial(
        jax.lax.conv_general_dilated, window_strides=strides, padding=padding, **kwargs
    )
    b, _, w, _ = x.shape
    keeps_size = tuple(strides) == (1, 1) and tuple(padding) == ((1, 1), (1, 1))
    if b >= FEW_IMAGES or w < WIDE or kernel.shape[:2] != (3, 3) or not keeps_size:
        return plainly(x, kernel)
    return jax.lax.platform_dependent(x, kernel, tpu=by_rows, default=plainly)


@jax.custom_vjp
def by_rows(
    x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c e"]
) -> Float[Array, "b h w e"]:
    """Sum three convolutions of rows, which are the images of a large batch.

    Args:
      x: The map; its edges are padded with zeros.
      kernel: The kernel.

    Returns:
      The map convolved; summed in float32.
    """
    b, h, w, _ = x.shape
    total = sum(
        _convolve_rows(rows, kernel[i], preferred_element_type=jnp.float32)
        for i, rows in enumerate(_shifted_rows(x))
    )
    return jnp.reshape(total, (b, h, w, -1)).astype(x.dtype)


def _by_rows_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return by_rows(x, kernel), (x, kernel)


def _by_rows_backward(kept: tuple[Array, Array], slope: Array) -> tuple[Array, Array]:
    x, kernel = kept
    of_x = by_rows(slope, jnp.swapaxes(kernel[::-1, ::-1], 2, 3))
    flat = slope.reshape(-1, *slope.shape[2:])
    of_kernel = [
        jax.linear_transpose(functools.partial(_convolve_rows, rows), kernel[0])(flat)[
            0
        ]
        for rows in _shifted_rows(x)
    ]
    return of_x, jnp.stack(of_kernel)


by_rows.defvjp(_by_rows_forward, _by_rows_backward)


def _shifted_rows(x: Float[Array, "b h w c"]) -> list[Float[Array, "n w c"]]:
    """Return all rows, and those above and below them, as images of one row."""
    b, h, w, c = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0)))
    return [padded[:, i : i + h].reshape(b * h, w, c) for i in range(3)]


def _convolve_rows(
    rows: Float[Array, "n w c"], kernel: Float[Array, "3 c e"], **kwargs: Any
) -> Float[Array, "n w e"]:
    numbers = ("NWC", "WIO", "NWC")
    return jax.lax.conv_general_dilated(
        rows, kernel, (1,), ((1, 1),), dimension_numbers=numbers, **kwargs
    )
