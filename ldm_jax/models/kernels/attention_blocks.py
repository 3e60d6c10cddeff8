"""Which attention is worth a kernel, and how the one for TPUs cuts it; without JAX."""

from typing import NamedTuple

LEAST_PROBABILITIES = 2**16
"""Fewer are as quickly written to memory and read again."""
LEAST_KEYS = 256
"""Fewer, as the 77 tokens of a text, take less time plainly."""
MOST_KEYS, WIDEST = 4096, 512
"""Keys, and channels of a head, that fit on the chip beside a block of queries."""
LANES = 128
MEMORY = 64 * 2**20
"""Bytes on a chip that the kernel may take."""
SMALL_MEMORY = 16 * 2**20
WITH_SMALL_MEMORY = ("TPU v2", "TPU v3", "TPU v4")
"""Kinds of devices that have no more."""
SIZES = (512, 256, 128)
"""Tokens of a block; the larger, the more of its work overlaps."""
MOST_UNCUT = 1024
"""Keys whose number no block divides are worked on at once, if they are no more."""


class Shape(NamedTuple):
    """Sizes of one head's attention."""

    queries: int
    """Tokens that read."""
    keys: int
    """Tokens that are read."""
    width: int
    """Channels of a head."""


class Packing(NamedTuple):
    """How the channels of all heads lie in a row of a chip's lanes.

    A register has 128 lanes. An array whose rows are the 32 or 40 channels of a head
    leaves most of them empty, in memory too, and an array with an axis of heads is
    copied to get there. So heads lie side by side, as many as fit into whole registers.
    """

    heads: int
    """Heads."""
    width: int
    """Channels of a head."""
    together: int
    """Heads that share a group of lanes."""
    lanes: int
    """Of a group; a multiple of 128."""
    groups: int
    """Of lanes, over all heads."""


class Blocks(NamedTuple):
    """How many tokens are worked on at once."""

    queries: int
    """In each step of the kernel."""
    keys: int
    """Within a step of the backward pass, one block after the other."""


def packing_of(heads: int, width: int) -> Packing:
    """Lay out heads in lanes.

    Args:
      heads: Heads.
      width: Channels of a head.
    """
    together = min(max(1, LANES // width), heads)
    lanes = -(-width // LANES) * LANES
    return Packing(heads, width, together, lanes, -(-heads // together))


def is_worth_a_kernel(shape: Shape) -> bool:
    """Say whether plain attention would write much to memory and read it again.

    cuDNN has none for the 77 tokens of a text either (seen on an H200).

    Args:
      shape: Of the attention.
    """
    is_large = shape.queries * shape.keys >= LEAST_PROBABILITIES
    return is_large and shape.keys >= LEAST_KEYS


def blocks_of(shape: Shape) -> Blocks | None:
    """Cut attention into blocks; None where the kernel does not fit.

    Args:
      shape: Of the attention.
    """
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
    """Estimate what the kernel takes on the chip; of its two ways the one with more.

    Windows lie there twice, so that one is filled while the other is worked on. What
    registers do not hold was read off the compiler's own account (libtpu 0.0.52): all
    logits of a block forward, and backward little, more with wide heads.

    Args:
      shape: Of the attention.
      blocks: How it is cut.
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
