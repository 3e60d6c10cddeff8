"""Cycles of our attention kernels, which a compiler does not estimate. Imports no JAX.

The formulas are fitted to the compiler's schedules: the bundles of one step of a kernel
(libtpu 0.0.52, `*-final_bundles.txt`), for 64 to 2048 times 1024 probabilities a step
and heads of 32 to 512 channels, listed in `tests/tools/test_plan.py`. They are at most
5 % below any of them, at most 5 % above for heads of up to 80 channels and 512 tokens
or more, and at most a third above elsewhere. Memory stalls are not included; all keys
of a head are in the chip's fast memory.
"""

import re
from typing import NamedTuple

from ldm_jax.tools.plan.chips import Chip
from ldm_jax.tools.plan.hlo import Kernel

PROBABILITIES = 1024
_NAME = re.compile(r"attention_(forward|backward)_(\d+)x(\d+)")


class StepCycles(NamedTuple):
    """Cycles of a step of a kernel, linear in its attention probabilities."""

    least: float
    """Minimum of a step."""
    fixed: float
    """Cycles of every step."""
    slope: float
    """Cycles for 1024 probabilities."""
    wider: float
    """Relative increase of the slope for each matrix unit's width that a head exceeds
    the first."""


class KernelCycles(NamedTuple):
    """Cycles of our kernels on a kind of chip."""

    forward: StepCycles
    """Cycles of the forward pass."""
    backward: StepCycles
    """Cycles of the backward pass."""
    unit: int
    """Width of the chip's matrix unit, in channels."""


OF_SMALL_UNITS = KernelCycles(
    StepCycles(800.0, 170.0, 4.27, 0.78), StepCycles(1900.0, 500.0, 10.75, 0.86), 128
)
OF_LARGE_UNITS = KernelCycles(
    StepCycles(700.0, 300.0, 2.91, 0.78), StepCycles(1400.0, 700.0, 5.21, 1.26), 256
)
CYCLES_BY_CHIP = {"v6e": OF_LARGE_UNITS, "tpu7x": OF_LARGE_UNITS}
"""By chip; others have matrix units of 128 x 128. TPU7x was not measured."""
PRODUCTS = {"forward": 2, "backward": 5}


def kernel_cycles(chip: Chip, kernels: list[Kernel]) -> int:
    """Estimate the cycles of a program's attention kernels; others do not count."""
    known = CYCLES_BY_CHIP.get(chip.name, OF_SMALL_UNITS)
    total = 0.0
    for kernel in kernels:
        named = _NAME.fullmatch(kernel.name)
        if named is None or not kernel.transcendentals:
            continue
        way, each = named[1], int(named[2]) * int(named[3])
        width = kernel.flops / (2 * PRODUCTS[way] * kernel.transcendentals)
        cycles = known.forward if way == "forward" else known.backward
        steps = kernel.times * kernel.transcendentals / each
        total += steps * step_cycles(cycles, each, width / known.unit)
    return round(total)


def step_cycles(cycles: StepCycles, probabilities: int, widths: float) -> float:
    """Estimate the cycles of one step.

    Args:
      widths: Channels of a head, divided by the width of the matrix unit.
    """
    slope = cycles.slope * (1.0 + cycles.wider * max(0.0, widths - 1.0))
    return max(cycles.least, cycles.fixed + slope * probabilities / PROBABILITIES)
