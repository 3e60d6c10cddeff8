"""Conditions of training examples, and those that are computed from images."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from ldm_jax.models.conditioning import ConditionInputs
from ldm_jax.models.layers import area_downsample

MIN_HOLE, MAX_HOLE = 0.25, 0.75
HOLE_VALUE = -1.0


def drop_conditions(
    inputs: ConditionInputs,
    null: ConditionInputs,
    dropped: Bool[Array, " b"],
) -> ConditionInputs:
    """Replace the inputs of some examples by null inputs.

    Args:
      null: Null inputs of the same shapes.
      dropped: Which examples lose their condition.

    Source:
      Ho & Salimans, arXiv:2207.12598, algorithm 1.
    """

    def choose(none: Array, given: Array) -> Array:
        mask = dropped.reshape(-1, *[1] * (given.ndim - 1))
        return jnp.where(mask, none, given)

    return jax.tree.map(choose, null, inputs)


def low_resolution(
    images: Float[Array, "b h w c"], *, factor: int
) -> Float[Array, "b h2 w2 c"]:
    """Downsample images by averages of blocks: the condition of super-resolution."""
    return area_downsample(images, factor=factor)


def random_holes(
    keys: Key[Array, " b"], *, height: int, width: int
) -> Float[Array, "b h w 1"]:
    """Draw a rectangular hole for each image: the mask of inpainting.

    Args:
      keys: One for each image.
      height: Of the image, in pixels.
      width: Of the image, in pixels.

    Returns:
      1 in the hole and 0 outside. Each side of a hole is between a quarter and three
      quarters of the image's.
    """

    def interval(key: Key[Array, ""], size: int) -> Bool[Array, " n"]:
        length, place = jax.random.uniform(key, (2,))
        length = MIN_HOLE + (MAX_HOLE - MIN_HOLE) * length
        middle = (jnp.arange(size, dtype=jnp.float32) + 0.5) / size
        start = place * (1.0 - length)
        return (middle >= start) & (middle < start + length)

    def hole(key: Key[Array, ""]) -> Float[Array, "h w 1"]:
        rows = interval(jax.random.fold_in(key, 0), height)
        columns = interval(jax.random.fold_in(key, 1), width)
        return (rows[:, None] & columns[None, :])[..., None].astype(jnp.float32)

    return jax.vmap(hole)(keys)


def cut_holes(
    images: Float[Array, "b h w c"], holes: Float[Array, "b h w 1"]
) -> Float[Array, "b h w c"]:
    """Blacken the holes of images in [-1, 1], as latent-diffusion's `inpaint.py`."""
    return jnp.where(holes > 0.5, HOLE_VALUE, images)


def join_masked(
    latents: Float[Array, "b h w c"], holes: Float[Array, "b h2 w2 1"]
) -> Float[Array, "b h w d"]:
    """Join the latents of images with holes and the mask: the condition of inpainting.

    Args:
      latents: Of the images with holes, in scaled-latent units.
      holes: 1 in the hole, at the images' resolution.

    Returns:
      The latents and, as the last channel, the mask in {-1, 1}, resized by taking the
      top left pixel of each block, as nearest-neighbour resizing does.
    """
    factor = holes.shape[1] // latents.shape[1]
    small = holes[:, ::factor, ::factor]
    return jnp.concatenate([latents, 2.0 * small - 1.0], axis=-1)
