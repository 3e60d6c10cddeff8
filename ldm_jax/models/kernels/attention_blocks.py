"""Sizes for which attention kernels are used, and their blocks on TPUs; without JAX."""

from typing import NamedTuple

LEAST_PROBABILITIES = 2**16
"""With fewer, writing the probabilities to memory is as fast."""
LEAST_KEYS = 256
"""With fewer, such as the 77 tokens of a text, plain operations are faster."""
MOST_KEYS, WIDEST = 4096, 512
"""Keys, and channels of a head, that fit in fast memory with a block of queries."""
LANES = 128
MEMORY = 64 * 2**20
"""Bytes of fast memory that the kernel may use."""
SMALL_MEMORY = 16 * 2**20
WITH_SMALL_MEMORY = ("TPU v2", "TPU v3", "TPU v4")
"""Kinds of devices with `SMALL_MEMORY`."""
SIZES = (512, 256, 128)
"""Tokens of a block; larger blocks overlap more work."""
MOST_UNCUT = 1024
"""Largest number of keys that may be one block if no block size divides it."""


class Shape(NamedTuple):
    """Sizes of one head's attention."""

    queries: int
    """Number of queries."""
    keys: int
    """Number of keys."""
    width: int
    """Channels of a head."""


class Packing(NamedTuple):
    """Memory layout of the channels of all heads in a TPU's lanes.

    A register has 128 lanes. Rows of the 32 or 40 channels of one head would leave most
    of them empty, and an axis of heads would be copied. So heads are side by side, as
    many as fit into whole registers.
    """

    heads: int
    """Number of heads."""
    width: int
    """Channels of a head."""
    together: int
    """Heads of a group of lanes."""
    lanes: int
    """Lanes of a group; a multiple of 128."""
    groups: int
    """Groups of all heads."""


class Blocks(NamedTuple):
    """Block sizes of the kernel."""

    queries: int
    """Queries of a step."""
    keys: int
    """Keys of a block within a step of the backward pass."""


def packing_of(heads: int, width: int) -> Packing:
    """Return the layout of `heads` heads of `width` channels."""
    together = min(max(1, LANES // width), heads)
    lanes = -(-width // LANES) * LANES
    return Packing(heads, width, together, lanes, -(-heads // together))


def is_worth_a_kernel(shape: Shape) -> bool:
    """Return whether plain attention would write much to memory and read it again.

    cuDNN has no kernel for the 77 tokens of a text either (seen on an H200).
    """
    is_large = shape.queries * shape.keys >= LEAST_PROBABILITIES
    return is_large and shape.keys >= LEAST_KEYS


def blocks_of(shape: Shape) -> Blocks | None:
    """Return the block sizes of the kernel; None if it is not used or does not fit."""
    if not is_worth_a_kernel(shape):
        return None
    if shape.keys > MOST_KEYS or shape.width > WIDEST:
        return None
    queries = _largest(shape.queries)
    keys = _largest(shape.keys)
    if not keys and shape.keys <= MOST_UNCUT:
        keys = shape.keys
    return Blocks(queries, keys) if queries and keys else None


def bytes_of(shape: Shape, blocks: Blocks, itemsize: int) -> int:
    """Estimate the fast memory of the forward or backward pass, the larger one.

    Blocks are double-buffered. The spilled registers are those of the compiler (libtpu
    0.0.52): all logits of a block in the forward pass, little in the backward pass,
    more with wide heads.

    Args:
      itemsize: Bytes of a number.
    """
    lanes = packing_of(1, shape.width).lanes
    keys, queries = shape.keys * lanes, blocks.queries * lanes
    forward = 4 * (keys + queries) * itemsize + 4 * blocks.queries * shape.keys
    sums, rest = 8 * keys, max(2 * 2**20, 2**13 * lanes)
    backward = 8 * (keys + queries) * itemsize + sums + rest
    return max(forward, backward)


def _largest(tokens: int) -> int:
    return next((size for size in SIZES if tokens % size == 0), 0)
