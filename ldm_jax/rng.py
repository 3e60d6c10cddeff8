"""Randomness: derived from (root key, purpose, step, example), never carried.

A draw that is a function of these four is the same on 1 or 8 devices, on 1 or 2 hosts,
before and after a restart. A key that is split and carried in a loop is not. The
numbers of `Stream` are part of every result: append, never renumber.
"""

import enum
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt32

from ldm_jax.types import InputError

MAX_SEED = 2**32 - 1


class Stream(enum.IntEnum):
    """Purpose of a draw; two purposes never share a key."""

    INIT_AUTOENCODER = 0
    INIT_UNET = 1
    AUTOENCODER_POSTERIOR = 2
    DIFFUSION_POSTERIOR = 3
    TIMESTEP = 4
    NOISE = 5
    CONDITION_DROPOUT = 6
    LATENT_SCALE = 7
    SAMPLE_START = 8
    SAMPLE_STEP = 9
    INIT_CONDITIONER = 10
    HOLE = 11
    INIT_CRITIC = 12
    OFFSET_NOISE = 13
    CROP = 14
    FLIP = 15


def root_key(seed: int) -> Key[Array, ""]:
    """Make the root key of a run, or the key of one image.

    Args:
      seed: In [0, 2**32).

    Returns:
      A typed threefry key.

    Raises:
      InputError: If `seed` is out of range.
    """
    check_seed(seed)
    return jax.random.key(seed, impl="threefry2x32")


def check_seed(seed: int) -> None:
    """Raise `InputError` if a seed is outside [0, 2**32)."""
    if not 0 <= seed <= MAX_SEED:
        raise InputError(f"seed: got {seed}, wanted 0 to {MAX_SEED}")


def image_keys(seeds: list[int]) -> Key[Array, " b"]:
    """Make one key per image; key i depends on seed i alone.

    Args:
      seeds: Each in [0, 2**32).

    Returns:
      The keys, in the order of the seeds.

    Raises:
      InputError: If a seed is out of range.
    """
    for seed in (min(seeds, default=0), max(seeds, default=0)):
        check_seed(seed)
    make = functools.partial(jax.random.key, impl="threefry2x32")
    return jax.vmap(make)(jnp.asarray(seeds, jnp.uint32))


def stream_key(
    root: Key[Array, ""], stream: Stream, step: Int[Array, ""] | int = 0
) -> Key[Array, ""]:
    """Derive the key of one purpose at one step."""
    return jax.random.fold_in(jax.random.fold_in(root, int(stream)), step)


def example_keys(
    root: Key[Array, ""],
    stream: Stream,
    step: Int[Array, ""] | int,
    index: UInt32[Array, " b"],
) -> Key[Array, " b"]:
    """Derive a key for each example of a batch.

    Args:
      root: The run's key.
      stream: Purpose of the draw.
      step: Training step, at least 0.
      index: Global example index of each example, from the batch.

    Returns:
      A key per example, the same on every device.
    """
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(
        stream_key(root, stream, step), index
    )


def image_step_keys(
    keys: Key[Array, " b"], stream: Stream, step: Int[Array, ""] | int = 0
) -> Key[Array, " b"]:
    """Derive, from one key per image, one key per image for a sampler's step."""
    return jax.vmap(stream_key, in_axes=(0, None, None))(keys, stream, step)


def normal(keys: Key[Array, " b"], shape: tuple[int, ...]) -> Float[Array, "b *shape"]:
    """Draw unit-variance noise of `shape` for each key, float32."""
    flat = jax.vmap(lambda key: jax.random.normal(key, (math.prod(shape),)))(keys)
    return flat.reshape(-1, *shape)


def uniform(keys: Key[Array, " b"]) -> Float[Array, " b"]:
    """Draw one number in [0, 1) for each key, float32."""
    return jax.vmap(jax.random.uniform)(keys)


def integers(keys: Key[Array, " b"], *, below: int) -> Int[Array, " b"]:
    """Draw one integer in [0, below) for each key, int32."""
    return jax.vmap(lambda key: jax.random.randint(key, (), 0, below))(keys)


def host_uniform(seed: int, stream: Stream, index: int) -> float:
    """Draw one number in [0, 1) on the host, where an example is read.

    Args:
      seed: Of the run, in [0, 2**32).
      stream: Purpose of the draw.
      index: Global example index, in [0, 2**32).

    Returns:
      The number: the same on any process, before and after a restart.

    Source:
      Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (Philox 4x64).
    """
    bits = np.random.Philox(key=[seed, int(stream)], counter=[0, index, 0, 0])
    return (int(bits.random_raw()) >> 11) * 2.0**-53
