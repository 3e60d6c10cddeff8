"""How a program starts: its memory, its fellow processes, and the compiled programs.

Nothing here imports JAX before `start`: help and bad input answer at once.
"""

import contextlib
import os
import sys
from pathlib import Path

from ldm_jax.config.launch import Launch
from ldm_jax.types import InputError

CACHE_VARIABLE = "JAX_COMPILATION_CACHE_DIR"
MIN_COMPILE_SECONDS = 0.5
PEER_TIMEOUT = 100
"""Seconds without a sign of life after which a process counts as dead."""
JOIN_TIMEOUT = 300
"""Seconds to wait for the others when joining."""

TUNABLES = "GLIBC_TUNABLES"
HUGE_PAGES = "glibc.malloc.hugetlb"
"""Asks the system for huge pages where set to 1 (glibc 2.35 and later)."""
PAGES_FILE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
"""Says what Linux does: `always`, `madvise` (for who asks) or `never`, in brackets."""


def use_huge_pages() -> None:
    """Start this program again with its memory in huge pages, where Linux has them.

    On a CPU every training step takes fresh memory for its intermediate results. In
    pages of 4 KiB, asking for it was a fifth of the step of a small model
    (docs/benchmarks.md). The C library reads this setting once, when a process starts;
    the process stays the same one. To be called before anything is done. A setting that
    the user made is left as it is.
    """
    given = os.environ.get(TUNABLES, "")
    if HUGE_PAGES in given or not sys.executable or not _waits_to_be_asked():
        return
    os.environ[TUNABLES] = ":".join(filter(None, (given, f"{HUGE_PAGES}=1")))
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _waits_to_be_asked() -> bool:
    try:
        return "[madvise]" in PAGES_FILE.read_text()
    except OSError:  # another system, or one without them
        return False


def num_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_devices_are_given() -> bool:
    """Say whether the user said how many devices a CPU counts as."""
    flags = os.environ.get("XLA_FLAGS", "")
    return (
        "JAX_NUM_CPU_DEVICES" in os.environ
        or "xla_force_host_platform_device_count" in flags
    )


def start(launch: Launch, *, peer_timeout: int, cpu_devices: int = 1) -> None:
    """Start JAX: set the cache and what a CPU counts as, join the others.

    Args:
      launch: How.
      cpu_devices: Devices that a CPU counts as, if it has the cores and the user did
        not say otherwise.
      peer_timeout: Seconds without a sign of life after which a process counts as
        dead. Then the others end themselves too, and name it.

    Raises:
      InputError: If the cluster does not say how to join, or the others do not come.
    """
    import jax

    if launch.cache is not None and CACHE_VARIABLE not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(launch.cache))
        seconds = "jax_persistent_cache_min_compile_time_secs"
        jax.config.update(seconds, MIN_COMPILE_SECONDS)
    devices = min(cpu_devices, num_cores())
    if devices > 1 and not cpu_devices_are_given():
        with contextlib.suppress(RuntimeError):  # JAX runs already, with what it has
            jax.config.update("jax_num_cpu_devices", devices)
    if not launch.pod or jax.distributed.is_initialized():
        return
    try:
        jax.distributed.initialize(
            coordinator_address=launch.coordinator,
            num_processes=launch.num_processes,
            process_id=launch.process_id,
            initialization_timeout=JOIN_TIMEOUT,
            heartbeat_timeout_seconds=peer_timeout,
        )
    except (ValueError, RuntimeError) as error:
        where = launch.coordinator or "the place the cluster names"
        raise InputError(
            f"--pod: could not join the others at {where} "
            f"({' '.join(str(error).split())[:200]}); try --coordinator HOST:PORT "
            "--num-processes N --process-id I"
        ) from None
