"""Chips: what one device holds, computes and moves. Imports no JAX.

Sources: Google's pages "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e" and "TPU7x (Ironwood)"
under https://docs.cloud.google.com/tpu/docs, and NVIDIA's data sheets of A100, H100,
H200 and B200 (dense bfloat16). The links of v4, links and bandwidth of TPU7x, and the
GPUs were not read again from there: check them before you rely on them. Two columns
are not on those pages:

* `usable` is what the compiler of libtpu 0.0.52 says it may fill (it names the number
  in the error of a program that is too large); None leaves the data sheet's.
* `clock` follows from the peak: the products of a cycle are known (131,072 FLOPs for
  the four 128x128 units of a v5e, four times as many in v6e and half a TPU7x), and the
  compiler's own count of cycles for large matrix products agrees with it.
"""

from typing import NamedTuple

GIB = 2**30


class Chip(NamedTuple):
    """One device, as JAX counts them."""

    name: str
    """As it stands in a topology, or short for what JAX calls it."""
    kind: str
    """What `device_kind` of JAX begins with or contains."""
    peak: float
    """FLOP/s in bfloat16, dense."""
    memory: float
    """Bytes of its memory."""
    usable: float
    """Bytes that the compiler may fill."""
    bandwidth: float
    """Bytes/s of its memory."""
    ports: int
    """Links to other chips."""
    link: float
    """Bytes/s that one link sends, one way."""
    clock: float
    """Cycles/s; 0 where the compiler tells no cycles."""
    pod: int
    """Chips that the links connect; beyond it is the data centre's network."""
    network: float
    """Bytes/s of that network for each chip, one way; 0 if not published."""


CHIPS = (
    Chip(
        "v4", "TPU v4", 275e12, 32 * GIB, 30.75 * GIB, 1200e9, 6, 50e9, 1.05e9, 4096, 0
    ),
    Chip(
        "v5e",
        "TPU v5 lite",
        197e12,
        16 * GIB,
        15.75 * GIB,
        819e9,
        4,
        50e9,
        1.5e9,
        256,
        6.4e12 / 8 / 256,
    ),
    Chip(
        "v5p",
        "TPU v5",
        459e12,
        95 * GIB,
        95.73 * GIB,
        2765e9,
        6,
        100e9,
        1.75e9,
        8960,
        50e9 / 8,
    ),
    Chip(
        "v6e",
        "TPU v6 lite",
        918e12,
        32 * GIB,
        31.24 * GIB,
        1638e9,
        4,
        100e9,
        1.75e9,
        256,
        0,
    ),
    # Two devices a chip: half of everything, links too.
    Chip(
        "tpu7x",
        "TPU7x",
        2307e12 / 2,
        96 * GIB,
        94.74 * GIB,
        7380e9 / 2,
        6,
        50e9,
        2.2e9,
        2 * 9216,
        0,
    ),
    Chip("A100", "A100", 312e12, 80e9, 80e9, 2039e9, 12, 25e9, 0, 8, 0),
    Chip("H200", "H200", 989e12, 141e9, 141e9, 4800e9, 18, 25e9, 0, 8, 0),
    Chip("H100", "H100", 989e12, 80e9, 80e9, 3350e9, 18, 25e9, 0, 8, 0),
    Chip("B200", "B200", 2250e12, 180e9, 180e9, 7700e9, 18, 50e9, 0, 8, 0),
)
TPU_NAMES = tuple(chip.name for chip in CHIPS if chip.clock)


def chip_named(name: str) -> Chip:
    """Return the chip of a topology.

    Raises:
      KeyError: If there is none of this name.
    """
    return {chip.name: chip for chip in CHIPS}[name]


def chip_of_kind(device_kind: str) -> Chip | None:
    """Return the chip that JAX calls `device_kind`; None for one not in the table."""
    fits = [chip for chip in CHIPS if chip.kind in device_kind]
    return max(fits, key=lambda chip: len(chip.kind), default=None)


def send_rate(chip: Chip, shape: tuple[int, ...], group: int) -> float:
    """Return the bytes/s that a chip can send within a collective.

    Every axis of the torus gives two links, or one where it has two chips only. A
    collective of all chips uses those of all axes, another those of one.

    Args:
      chip: Which.
      shape: Chips along each axis of the slice; () where links reach every chip.
      group: Chips that take part.
    """
    if not shape:
        return chip.ports * chip.link
    size = 1
    links = []
    for length in shape:
        size *= length
        links.append(0 if length == 1 else 1 if length == 2 else 2)
    used = sum(links) if group >= size else max(links)
    return max(used, 1) * chip.link
