"""The memory of a device, and the refusal of what cannot fit it."""

import os
from pathlib import Path
from typing import Any

from ldm_jax.types import InputError

CGROUP_LIMITS = (
    "/sys/fs/cgroup/memory.max",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)
"""Files with the limit of a container: beyond it, the kernel ends the process."""


def memory_of(device: Any) -> int | None:
    """Return the bytes of memory of a device, of a CPU those of the machine.

    Returns:
      None if they are not known.
    """
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    texts = [Path(path).read_text().strip() for path in CGROUP_LIMITS if _is_file(path)]
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([machine, *(int(text) for text in texts if text.isdecimal())])


def check_fits(num_bytes: int, device: Any, *, what: str, remedy: str) -> None:
    """Raise `InputError` if the memory of a device is too small for what it must hold.

    A process that takes more than the machine has is killed without a word.

    Args:
      num_bytes: Bytes that are certainly needed at once; the true need is larger.
      what: The flag and its value, up to what is of that many bytes.
      remedy: What to try.
    """
    most = memory_of(device)
    if most is not None and num_bytes > most:
        raise InputError(
            f"{what} {num_bytes / 1e9:,.1f} GB at least, wanted at most the "
            f"{most / 1e9:,.1f} GB of memory of this {device.device_kind}; try {remedy}"
        )


def _is_file(path: str) -> bool:
    return os.path.isfile(path) and os.access(path, os.R_OK)
