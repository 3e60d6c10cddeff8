"""TPU slices by name, and the environment of their compiler. Imports no JAX."""

import importlib.util
import math
import os
import re
from typing import NamedTuple

from ldm_jax.tools.plan.chips import TPU_NAMES, Chip, chip_named
from ldm_jax.types import InputError

LOCAL = "local"
EXAMPLES = (
    "v4:2x2x1",
    "v4:4x4x4",
    "v5e:2x2",
    "v5e:4x4",
    "v5e:8x8",
    "v5e:16x16",
    "v5p:2x2x1",
    "v5p:4x4x4",
    "v5p:8x8x8",
    "v6e:2x2",
    "v6e:4x4",
    "v6e:16x16",
    "tpu7x:2x2x1",
    "tpu7x:4x4x4",
)
AXES_BY_CHIP = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2, "tpu7x": 3}
DEVICES_BY_CHIP = {"tpu7x": 2}
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
}
"""Environment in which libtpu compiles without a TPU, and without log lines.

JAX's compilation cache is off: programs for absent devices are written to it but cannot
be read back (0.10.2).
"""


class Topology(NamedTuple):
    """A slice of a TPU pod."""

    name: str
    """Name in libtpu's notation."""
    chip: Chip
    """Kind of its chips."""
    shape: tuple[int, ...]
    """Chips along each axis."""
    num_devices: int
    """JAX devices."""


def parse_topology(name: str) -> Topology | None:
    """Read the name of a topology; None for `local`, the devices of this machine.

    Raises:
      InputError: If there is no such topology.
    """
    if name == LOCAL:
        return None
    found = re.fullmatch(r"([a-z0-9]+):([0-9]{1,9}(?:x[0-9]{1,9})*)", name)
    chip, sizes = found.groups() if found else ("", "")
    shape = tuple(int(size) for size in sizes.split("x") if size)
    known = f"{LOCAL}, {', '.join(EXAMPLES)}, or another size of one of these chips"
    if chip not in TPU_NAMES or 0 in shape:
        raise InputError(f"--topology: got {name!r}, wanted one of {known}")
    if len(shape) != AXES_BY_CHIP[chip]:
        raise InputError(
            f"--topology: got {name!r}, wanted {AXES_BY_CHIP[chip]} axes for {chip}, "
            f"as in {next(e for e in EXAMPLES if e.startswith(chip))}"
        )
    num = math.prod(shape) * DEVICES_BY_CHIP.get(chip, 1)
    return Topology(name, chip_named(chip), shape, num)


def prepare_environment() -> None:
    """Set the environment of the TPU compiler; call it before JAX is imported.

    Raises:
      InputError: If libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            "--topology: the TPU's compiler, libtpu, is not installed; try "
            "pip install -e '.[plan]' where ldm_jax was cloned, or --topology local"
        )
    os.environ.update(ENVIRONMENT)
