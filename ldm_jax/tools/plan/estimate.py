"""Time estimates from a compiler's counts, on one chip and on many. Imports no JAX."""

import math
from typing import NamedTuple

from ldm_jax.tools.plan.chips import Chip, send_rate
from ldm_jax.tools.plan.hlo import Collective


class Estimate(NamedTuple):
    """Estimated time of a program."""

    compute_seconds: float
    """Cycles divided by the clock."""
    waiting_seconds: float
    """Time of synchronous collectives."""
    hidden_seconds: float
    """Time of asynchronous collectives, which overlap with computing."""
    seconds: float
    """The longer of computing and asynchronous collectives, and the synchronous
    ones."""
    mfu: float
    """Model FLOPs utilisation: FLOPs of the mathematics over the peak in that time."""


class ScaleRow(NamedTuple):
    """A step on a number of chips, each with the same number of images."""

    chips: int
    """Number of chips."""
    images: int
    """Images of a step on all chips."""
    compute_seconds: float
    """Computing time of a chip."""
    link_seconds: float
    """Time of the collectives over the links of a pod."""
    network_seconds: float | None
    """Time of the collectives between pods; None if several pods are needed and the
    bandwidth of their network is unknown."""
    seconds: float | None
    """Sum of the three."""
    efficiency: float | None
    """Computing time divided by `seconds`."""


def estimate(
    chip: Chip,
    shape: tuple[int, ...],
    *,
    cycles: int,
    collectives: list[Collective],
    flops: int,
) -> Estimate:
    """Estimate the time of a program on a slice, without latency and the host.

    Args:
      chip: A chip with a clock.
      shape: Chips along each axis of the slice.
      cycles: Cycles of a chip, without collectives.
      collectives: Collectives of the program.
      flops: FLOPs of the mathematics of one chip.
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
    """Estimate a step on `chips` chips by formula, without overlap.

    With n chips in pods of c, R bytes that a ring of all chips circulates, and B
    bytes/s of all links of a chip:
    T(n) = T_compute + R (m - 1) / (m B) + (R / m) (k - 1) / (k D), where m = min(n, c),
    k = n / m pods, and D bytes/s of a chip over the network between pods. An all-reduce
    of G bytes has R = 2 G; a chip sends R (n - 1) / n.

    Args:
      chips: n.
      images: Images of a chip.
      compute_seconds: T_compute.
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
    """Return the squarest slice of at least `chips` chips; () if all are linked."""
    if not chip.clock:
        return ()
    shape = [1] * (chip.ports // 2)
    while math.prod(shape) < chips:
        shape[shape.index(min(shape))] *= 2
    return tuple(shape)
