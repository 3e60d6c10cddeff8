"""How long our kernels take, of which a compiler tells no cycles. Imports no JAX.

Read off the compiler's own schedule instead (libtpu 0.0.52: the bundles of one step of
the kernel, `*-final_bundles.txt`, times its steps): with heads of 32 to 80 channels a
v6e needs 3.1 to 3.5 bundles forward and 5.5 to 6.8 backward for each 1024
probabilities, a v5e 4.3 to 4.5, and 11.0 to 11.7. Wider heads take more once they are
wider than the chip's matrix unit: with 512 channels a v6e needs 5.3 and 12.0, a v5e
14.2 and 38.3.
Waiting for memory is not in these numbers; all keys of a head are on the chip.
"""

from typing import NamedTuple

from ldm_jax.planning.chips import Chip
from ldm_jax.planning.hlo import Kernel

PROBABILITIES = 1024


class Rate(NamedTuple):
    """Cycles for 1024 probabilities.

    Attributes:
      forward: Of the forward pass.
      backward: Of the backward pass.
      width: Channels of a head up to which this is so.
    """

    forward: float
    backward: float
    width: int


OF_SMALL_UNITS = Rate(4.5, 11.7, 128)
RATES = {"v6e": Rate(3.5, 6.8, 256), "tpu7x": Rate(3.5, 6.8, 256)}
"""By chip; others have matrix units of 128 x 128. That of a TPU7x was not measured."""
PRODUCTS = {"attention_forward": 2, "attention_backward": 5}


def kernel_cycles(chip: Chip, kernels: list[Kernel]) -> int:
    """Estimate the cycles of kernels.

    Args:
      chip: A TPU.
      kernels: Of a program; those that are not ours are left out.
    """
    rate = RATES.get(chip.name, OF_SMALL_UNITS)
    total = 0.0
    for kernel in kernels:
        products = PRODUCTS.get(kernel.name)
        if products is None or not kernel.transcendentals:
            continue
        cycles = rate.forward if products == 2 else rate.backward
        width = kernel.flops / (2 * products * kernel.transcendentals)
        blocks = kernel.times * kernel.transcendentals / PROBABILITIES
        total += blocks * cycles * max(1.0, width / rate.width)
    return round(total)
