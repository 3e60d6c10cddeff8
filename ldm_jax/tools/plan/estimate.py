"""From what a compiler counted to seconds, on one chip and on many. Imports no JAX."""

import math
from typing import NamedTuple

from ldm_jax.tools.plan.chips import Chip, send_rate
from ldm_jax.tools.plan.hlo import Collective


class Estimate(NamedTuple):
    """How long a program would take, by the compiler's estimate."""

    compute_seconds: float
    """Its cycles over the clock."""
    waiting_seconds: float
    """Collectives during which nothing else goes on."""
    hidden_seconds: float
    """Collectives beside which other work goes on."""
    seconds: float
    """Computing and waiting, and what of the hidden ones computing is too short to
    hide."""
    mfu: float
    """FLOPs of the mathematics over what the chip could do in that time."""


class ScaleRow(NamedTuple):
    """A step on a number of chips, each with the same share of the batch."""

    chips: int
    """How many."""
    images: int
    """Of all of them in a step."""
    compute_seconds: float
    """Of a chip."""
    link_seconds: float
    """Gradients, or parameters and gradients, over the links of a pod."""
    network_seconds: float | None
    """The same between pods, over the data centre's network; None where more than one
    pod is needed and its network is not known."""
    seconds: float | None
    """All of it, one after the other."""
    efficiency: float | None
    """Computing's share of that."""


def estimate(
    chip: Chip,
    shape: tuple[int, ...],
    *,
    cycles: int,
    collectives: list[Collective],
    flops: int,
) -> Estimate:
    """Estimate the time of a program on a chip of a slice.

    Args:
      chip: With a clock.
      shape: Chips along each axis of the slice.
      cycles: The compiler's, of all that computes.
      collectives: Of the program.
      flops: Of the mathematics, for one chip.

    Returns:
      The estimate. Latency is left out, and so is the host.
    """
    compute = cycles / chip.clock
    waiting, hidden = 0.0, 0.0
    for row in collectives:
        rate = send_rate(chip, shape, row.group)
        seconds = row.times * row.sent_bytes / rate
        if row.asynchronous:
            hidden += seconds
        else:
            waiting += seconds
    seconds = max(compute, hidden) + waiting
    mfu = flops / (seconds * chip.peak) if seconds else 0.0
    return Estimate(compute, waiting, hidden, seconds, mfu)


def scale_row(
    chip: Chip,
    *,
    chips: int,
    images: int,
    compute_seconds: float,
    ring_bytes: float,
) -> ScaleRow:
    """Work out a step on `chips` chips by formula, nothing overlapped.

    With R bytes that go round a ring of all chips, n chips in pods of c, and B bytes/s
    that a chip sends over all its links:
    T(n) = T_compute + R (m - 1) / (m B) + (R / m) (k - 1) / (k D), where m = min(n, c),
    k = n / m pods, and D bytes/s a chip over the network between pods. An all-reduce of
    G bytes is R = 2 G; what a program sends on n chips is R (n - 1) / n of each.

    Args:
      chip: Which.
      chips: n.
      images: Of each chip in a step.
      compute_seconds: Of a chip.
      ring_bytes: R.

    Source:
      Patarasuk & Yuan, "Bandwidth optimal all-reduce algorithms for clusters of
      workstations", 2009 (the ring).
    """
    inside = min(chips, chip.pod)
    pods = -(-chips // inside)
    rate = send_rate(chip, _torus(chip, inside), inside)
    link = ring_bytes * (inside - 1) / inside / rate
    network: float | None = 0.0
    if pods > 1:
        share = ring_bytes / inside * (pods - 1) / pods
        network = share / chip.network if chip.network else None
    if network is None:
        return ScaleRow(chips, chips * images, compute_seconds, link, None, None, None)
    seconds = compute_seconds + link + network
    return ScaleRow(
        chips,
        chips * images,
        compute_seconds,
        link,
        network,
        seconds,
        compute_seconds / seconds,
    )


def _torus(chip: Chip, chips: int) -> tuple[int, ...]:
    """Return the squarest slice of at least as many chips; () where all are linked."""
    if not chip.clock:
        return ()
    shape = [1] * (chip.ports // 2)
    while math.prod(shape) < chips:
        shape[shape.index(min(shape))] *= 2
    return tuple(shape)
