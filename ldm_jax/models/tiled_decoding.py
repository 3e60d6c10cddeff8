"""Tiled decoding of large latents, with the memory of one tile."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ldm_jax.types import MIN_DECODER_TILE

OVERLAP_SHARE = 4


def decode_in_tiles(
    decode: Callable[[Float[Array, "b h w c"]], Float[Array, "b h2 w2 e"]],
    latents: Float[Array, "b h w c"],
    *,
    tile: int,
    factor: int,
) -> Float[Array, "b h2 w2 e"]:
    """Decode square tiles that overlap by a quarter, and blend them linearly.

    The memory does not depend on the size of the image. The result equals decoding at
    once if the decoder's receptive field is within the overlap. Its attention and norms
    exceed it, so tiles should not be much smaller than the latents of training.

    Args:
      decode: The decoder; its output is `factor` times as high and wide as its input.
      latents: Latents; decoded at once if no side is longer than a tile.
      tile: Side of a tile, in latent pixels, at least 4. Static.
      factor: Up-sampling factor of the decoder. Static.

    Raises:
      ValueError: If a tile is smaller than 4.
    """
    if tile < MIN_DECODER_TILE:
        wanted = f"at least {MIN_DECODER_TILE} latents"
        raise ValueError(f"tile: got {tile}, wanted {wanted}")
    batch, height, width, channels = latents.shape
    if max(height, width) <= tile:
        return decode(latents)
    sides = min(tile, height), min(tile, width)
    starts = [tile_starts(*pair) for pair in ((height, sides[0]), (width, sides[1]))]
    corners = np.asarray([(top, left) for top in starts[0] for left in starts[1]])
    window = np.outer(*(ramp(side, tile=tile, factor=factor) for side in sides))
    total = np.zeros((height * factor, width * factor))
    for top, left in corners * factor:
        total[top : top + window.shape[0], left : left + window.shape[1]] += window
    weight = jnp.asarray(window, jnp.float32)[..., None]
    shape = jax.eval_shape(decode, latents[:, : sides[0], : sides[1]]).shape
    canvas = jnp.zeros((batch, *total.shape, shape[-1]), jnp.float32)

    def paint(
        canvas: Float[Array, "b h w e"], corner: Array
    ) -> tuple[Float[Array, "b h w e"], None]:
        here = (0, corner[0], corner[1], 0)
        part = jax.lax.dynamic_slice(latents, here, (batch, *sides, channels))
        there = (0, corner[0] * factor, corner[1] * factor, 0)
        old = jax.lax.dynamic_slice(canvas, there, shape)
        new = old + decode(part) * weight
        return jax.lax.dynamic_update_slice(canvas, new, there), None

    canvas, _ = jax.lax.scan(paint, canvas, jnp.asarray(corners, jnp.int32))
    return canvas / jnp.asarray(total, jnp.float32)[..., None]


def tile_starts(size: int, tile: int) -> list[int]:
    """Return the starts of evenly placed tiles that overlap by at least a quarter."""
    stride = tile - tile // OVERLAP_SHARE
    gaps = -(-(size - tile) // stride)
    return [round(i * (size - tile) / max(gaps, 1)) for i in range(gaps + 1)]


def ramp(side: int, *, tile: int, factor: int) -> np.ndarray:
    """Return a tile's weights along a side, which fall linearly to both ends."""
    overlap = tile // OVERLAP_SHARE * factor
    place = np.arange(side * factor) + 0.5
    return np.minimum(np.minimum(place, place[::-1]) / overlap, 1.0)
