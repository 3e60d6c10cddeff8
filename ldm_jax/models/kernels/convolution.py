"""Convolutions in the order in which a chip, or its compiler, is good at them."""

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

FEW_IMAGES, WIDE = 8, 64
"""With fewer images than the first a TPU convolves maps as wide as the second in less
time row by row."""

Pairs = tuple[tuple[int, int], tuple[int, int]]
NUMBERS = ("NHWC", "HWIO", "NHWC")
NUMBERS_OF_ROWS = ("NWC", "WIO", "NWC")
_in_a_loop = contextvars.ContextVar("_in_a_loop", default=False)


@contextlib.contextmanager
def in_a_loop() -> Iterator[None]:
    """Trace what is differentiated within the body of a loop.

    A CPU's compiler puts the axes of a convolution into the order that its fast kernels
    take, but not within loops. Gradients come in another order: a training step in a
    loop took 7.8 times as long. Here they are written in that order. They then have no
    derivative in forward mode, which is why it is not done everywhere.
    """
    token = _in_a_loop.set(True)
    try:
        yield
    finally:
        _in_a_loop.reset(token)


def convolve(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "n m c e"],
    strides: tuple[int, int],
    padding: Any,
    **kwargs: Any,
) -> Float[Array, "b h2 w2 e"]:
    """Convolve as `jax.lax.conv_general_dilated` does, in another order if better.

    The eight images that a register holds side by side are more than there are in a
    small batch. The compiler then cuts maps into blocks and calls them images, with
    copies before and after that take most of the time. Rows are images enough. For a
    CPU see `in_a_loop`.

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
    ways: dict[str, Any] = {}
    if b < FEW_IMAGES and w >= WIDE and kernel.shape[:2] == (3, 3) and keeps_size:
        ways["tpu"] = by_rows
    if _in_a_loop.get():
        ways["cpu"] = functools.partial(
            in_one_order, strides=strides, padding=tuple(padding)
        )
    if not ways:
        return plainly(x, kernel)
    return jax.lax.platform_dependent(x, kernel, default=plainly, **ways)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def in_one_order(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "n m c e"],
    strides: tuple[int, int],
    padding: Pairs,
) -> Float[Array, "b h2 w2 e"]:
    """Convolve, with gradients whose axes are in the order of the convolution's own.

    Args:
      x: The map.
      kernel: The kernel.
      strides: Of the window.
      padding: Before and after, of height and width.

    Returns:
      The map convolved.
    """
    return jax.lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=NUMBERS
    )


def _in_one_order_forward(
    x: Array, kernel: Array, strides: tuple[int, int], padding: Pairs
) -> tuple[Array, tuple[Array, Array]]:
    return in_one_order(x, kernel, strides, padding), (x, kernel)


def _in_one_order_backward(
    strides: tuple[int, int], padding: Pairs, kept: tuple[Array, Array], slope: Array
) -> tuple[Array, Array]:
    x, kernel = kept
    around_slope, around_x = [], []
    for side, window, out, stride, (before, _) in zip(
        x.shape[1:3], kernel.shape[:2], slope.shape[1:3], strides, padding, strict=True
    ):
        wide = (out - 1) * stride + 1  # the slope, with zeros for what was skipped
        rest = side + before - wide
        around_slope.append((window - 1 - before, rest))
        around_x.append((before, window - 1 - rest))
    of_x = jax.lax.conv_general_dilated(
        slope,
        jnp.swapaxes(kernel[::-1, ::-1], 2, 3),
        (1, 1),
        around_slope,
        lhs_dilation=strides,
        dimension_numbers=NUMBERS,
    )
    # The channels are the images, and the images the channels.
    of_kernel = jax.lax.conv_general_dilated(
        jnp.transpose(x, (3, 1, 2, 0)),
        jnp.transpose(slope, (1, 2, 0, 3)),
        (1, 1),
        around_x,
        rhs_dilation=strides,
        dimension_numbers=NUMBERS,
    )
    return of_x, jnp.transpose(of_kernel, (1, 2, 0, 3))


in_one_order.defvjp(_in_one_order_forward, _in_one_order_backward)


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
        for i, rows in enumerate(shifted_rows(x))
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
        for rows in shifted_rows(x)
    ]
    return of_x, jnp.stack(of_kernel)


by_rows.defvjp(_by_rows_forward, _by_rows_backward)


def shifted_rows(x: Float[Array, "b h w c"]) -> list[Float[Array, "n w c"]]:
    """Return all rows, and those above and below them, as images of one row."""
    b, h, w, c = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0)))
    return [padded[:, i : i + h].reshape(b * h, w, c) for i in range(3)]


def _convolve_rows(
    rows: Float[Array, "n w c"], kernel: Float[Array, "3 c e"], **kwargs: Any
) -> Float[Array, "n w e"]:
    return jax.lax.conv_general_dilated(
        rows, kernel, (1,), ((1, 1),), dimension_numbers=NUMBERS_OF_ROWS, **kwargs
    )
