"""Which attention the kernel for TPUs can do, and how it is cut. Imports no JAX."""

from typing import NamedTuple

LANES = 128
LEAST_PROBABILITIES = 2**16
"""Fewer are as quickly written to memory and read again."""
LONGEST, WIDEST = 4096, 512
"""Keys, and channels of a head, that fit beside a block of queries."""
BLOCKS = (512, 256, 128)
LARGEST_BLOCK = 2**20
"""Probabilities of a block, 4 bytes each; the backward pass has four such arrays."""


class Shape(NamedTuple):
    """Sizes of one head's attention.

    Attributes:
      queries: Tokens that read.
      keys: Tokens that are read.
      width: Channels of a head.
    """

    queries: int
    keys: int
    width: int


def block_of(shape: Shape) -> int:
    """Return how many queries are worked on at once; 0 where the kernel does not fit.

    Args:
      shape: Of the attention.
    """
    if shape.queries * shape.keys < LEAST_PROBABILITIES:
        return 0
    if shape.keys > LONGEST or shape.width > WIDEST:
        return 0
    keys = -(-shape.keys // LANES) * LANES
    for block in BLOCKS:
        if shape.queries % block == 0 and block * keys <= LARGEST_BLOCK:
            return block
    return 0
