"""Chips: memory, arithmetic and links of one device. Imports no JAX.

Sources: Google's pages "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e" and "TPU7x (Ironwood)"
under https://docs.cloud.google.com/tpu/docs, and NVIDIA's data sheets of A100, H100,
H200 and B200 (dense bfloat16). Not verified a second time: the links of v4, links and
bandwidth of TPU7x, and the GPUs. Two columns are not on those pages:

* `usable` is the memory that the compiler of libtpu 0.0.52 may fill, from its error for
  a program that is too large.
* `clock` follows from the peak and the FLOPs of a cycle (131,072 for the four 128x128
  units of a v5e, four times as many in v6e and half a TPU7x); the compiler's cycles for
  large matrix products agree with it.
"""

from typing import NamedTuple

GIB = 2**30


class Chip(NamedTuple):
    """One JAX device."""

    name: str
    """Name in a topology, or a short name."""
    kind: str
    """Part of JAX's `device_kind`."""
    peak: float
    """FLOP/s in bfloat16, dense."""
    memory: float
    """Bytes of memory."""
    usable: float
    """Bytes of memory that a program may use."""
    bandwidth: float
    """Bytes/s of the memory."""
    ports: int
    """Links to other chips."""
    link: float
    """Bytes/s of one link, one way."""
    clock: float
    """Cycles/s; 0 if the compiler estimates no cycles."""
    pod: int
    """Chips that links connect; the data centre's network connects pods."""
    network: float
    """Bytes/s of that network for each chip, one way; 0 if not published."""


# fmt: off
CHIPS = (
    # Fields in the order of `Chip`.
    Chip("v4",    "TPU v4",       275e12,     32 * GIB,   30.75 * GIB, 1200e9,     6, 50e9,  1.05e9, 4096, 0),  # noqa: E501
    Chip("v5e",   "TPU v5 lite",  197e12,     16 * GIB,   15.75 * GIB, 819e9,      4, 50e9,  1.5e9,   256, 6.4e12 / 8 / 256),  # noqa: E501
    Chip("v5p",   "TPU v5",       459e12,     95 * GIB,   95.73 * GIB, 2765e9,     6, 100e9, 1.75e9, 8960, 50e9 / 8),  # noqa: E501
    Chip("v6e",   "TPU v6 lite",  918e12,     32 * GIB,   31.24 * GIB, 1638e9,     4, 100e9, 1.75e9,  256, 0),  # noqa: E501
    # JAX sees two devices in a chip: half of everything, links too.
    Chip("tpu7x", "TPU7x",        2307e12 / 2, 96 * GIB,  94.74 * GIB, 7380e9 / 2, 6, 50e9,  2.2e9, 2 * 9216, 0),  # noqa: E501
    Chip("A100",  "A100",         312e12,     80e9,       80e9,        2039e9,    12, 25e9,  0,         8, 0),  # noqa: E501
    Chip("H200",  "H200",         989e12,     141e9,      141e9,       4800e9,    18, 25e9,  0,         8, 0),  # noqa: E501
    Chip("H100",  "H100",         989e12,     80e9,       80e9,        3350e9,    18, 25e9,  0,         8, 0),  # noqa: E501
    Chip("B200",  "B200",         2250e12,    180e9,      180e9,       7700e9,    18, 50e9,  0,         8, 0),  # noqa: E501
)
# fmt: on
TPU_NAMES = tuple(chip.name for chip in CHIPS if chip.clock)


def chip_named(name: str) -> Chip:
    """Return the chip of a topology.

    Raises:
      KeyError: If there is none of this name.
    """
    return {chip.name: chip for chip in CHIPS}[name]


def chip_of_kind(device_kind: str) -> Chip | None:
    """Return the chip of a JAX device; None for one that is not in the table."""
    fits = [chip for chip in CHIPS if chip.kind in device_kind]
    return max(fits, key=lambda chip: len(chip.kind), default=None)


def send_rate(chip: Chip, shape: tuple[int, ...], group: int) -> float:
    """Return the bytes/s that a chip can send within a collective.

    An axis of the torus has two links a chip, or one if it has two chips only. A
    collective of all chips uses the links of all axes, another those of one.

    Args:
      shape: Chips along each axis of the slice; () if every pair of chips is linked.
      group: Chips of the collective.
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
