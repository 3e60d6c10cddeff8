"""How long our kernels take, of which a compiler tells no cycles. Imports no JAX.

Read off the compiler's own schedule instead: the bundles of one step of a kernel
(libtpu 0.0.52, `*-final_bundles.txt`), for 64 to 2048 times 1024 probabilities a step
and heads of 32 to 512 channels, listed in `tests/tools/test_plan.py`. What is fitted
here is at most 5 % below any, and above by at most 5 % for heads of up to 80 channels
and 512 tokens or more, elsewhere by a third. Waiting for memory is not in these
numbers; all keys of a head are on the chip.
"""

import re
from typing import NamedTuple

from ldm_jax.tools.plan.chips import Chip
from ldm_jax.tools.plan.hlo import Kernel

PROBABILITIES = 1024
_NAME = re.compile(r"attention_(forward|backward)_(\d+)x(\d+)")


class Line(NamedTuple):
    """Cycles of a step of a kernel, by its probabilities."""

    least: float
    """That the shortest step takes."""
    fixed: float
    """That every step takes."""
    slope: float
    """For 1024 probabilities more."""
    wider: float
    """What the slope grows by, as a share of it, for each width of the chip's matrix
    unit that a head is wider than one."""


class Pace(NamedTuple):
    """How a kind of chip goes through our kernels."""

    forward: Line
    """The forward pass."""
    backward: Line
    """The backward pass."""
    unit: int
    """Width of its matrix unit, in channels."""


OF_SMALL_UNITS = Pace(
    Line(800.0, 170.0, 4.27, 0.78), Line(1900.0, 500.0, 10.75, 0.86), 128
)
OF_LARGE_UNITS = Pace(
    Line(700.0, 300.0, 2.91, 0.78), Line(1400.0, 700.0, 5.21, 1.26), 256
)
PACES = {"v6e": OF_LARGE_UNITS, "tpu7x": OF_LARGE_UNITS}
"""By chip; others have matrix units of 128 x 128. That of a TPU7x was not measured."""
PRODUCTS = {"forward": 2, "backward": 5}


def kernel_cycles(chip: Chip, kernels: list[Kernel]) -> int:
    """Estimate the cycles of kernels.

    Args:
      chip: A TPU.
      kernels: Of a program; those that are not ours are left out.
    """
    pace = PACES.get(chip.name, OF_SMALL_UNITS)
    total = 0.0
    for kernel in kernels:
        named = _NAME.fullmatch(kernel.name)
        if named is None or not kernel.transcendentals:
            continue
        way, each = named[1], int(named[2]) * int(named[3])
        width = kernel.flops / (2 * PRODUCTS[way] * kernel.transcendentals)
        line = pace.forward if way == "forward" else pace.backward
        steps = kernel.times * kernel.transcendentals / each
        total += steps * step_cycles(line, each, width / pace.unit)
    return round(total)


def step_cycles(line: Line, probabilities: int, widths: float) -> float:
    """Estimate one step.

    Args:
      line: Of the chip and the pass.
      widths: Channels of a head, in units of the width of the chip's matrix unit.
    """
    slope = line.slope * (1.0 + line.wider * max(0.0, widths - 1.0))
    return max(line.least, line.fixed + slope * probabilities / PROBABILITIES)
