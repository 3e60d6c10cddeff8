"""The start of a program: compilation cache, CPU devices, other processes.

Nothing here imports JAX before `start`, so that help and input errors are fast.
"""

import contextlib
import gc
import logging
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from ldm_jax.config import ParallelConfig
from ldm_jax.config.launch import Launch
from ldm_jax.parallel.join import SECONDS_BETWEEN_NOTICES, meet
from ldm_jax.types import InputError

CACHE_VARIABLE = "JAX_COMPILATION_CACHE_DIR"
MIN_COMPILE_SECONDS = 0.5
SECONDS_OF_GRACE = 60
"""After `join_timeout`, in which this program ends before JAX ends it by a signal."""
OBJECTS_BETWEEN_COLLECTIONS = 20_000
"""Imports and tracing make many objects and few cycles of them: with Python's default
of 700, an eighth of the start was spent on the search for cycles."""


def num_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_devices_are_given() -> bool:
    """Return whether the user set the number of CPU devices."""
    flags = os.environ.get("XLA_FLAGS", "")
    return (
        "JAX_NUM_CPU_DEVICES" in os.environ
        or "xla_force_host_platform_device_count" in flags
    )


def start(
    launch: Launch,
    *,
    beside: Path | None = None,
    peer_timeout: int = ParallelConfig.peer_timeout,
    cpu_devices: int = 1,
    cpu_threads: int = 0,
) -> None:
    """Start JAX: set its cache and its CPU devices, join the other processes.

    Args:
      beside: A run; compiled programs are cached next to its folder if the launch names
        no folder. None caches nothing then.
      peer_timeout: Seconds without a heartbeat after which a process is considered
        dead; the other processes then end with its name.
      cpu_devices: CPU devices, if there are as many cores and the user set no number.
      cpu_threads: Threads of the CPU's programs, on which the order of some of their
        sums depends; 0 for as many as cores, and at least the devices.

    Raises:
      InputError: If the cluster does not describe how to join, or processes are
        missing.
    """
    gc.set_threshold(max(gc.get_threshold()[0], OBJECTS_BETWEEN_COLLECTIONS))
    if cpu_threads:
        os.environ["NPROC"] = str(cpu_threads)  # XLA reads it at its start
    import jax

    setting = "jax_default_matmul_precision"
    if (given := getattr(jax.config, setting)) is not None:
        logging.getLogger(__name__).warning(
            "JAX_DEFAULT_MATMUL_PRECISION: got %s, which networks do not follow; "
            "try --precision highest",
            given,
        )
    cache = launch.cache_folder(beside=beside)
    if cache is not None and CACHE_VARIABLE not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache))
        seconds = "jax_persistent_cache_min_compile_time_secs"
        jax.config.update(seconds, MIN_COMPILE_SECONDS)
    devices = min(cpu_devices, num_cores())
    if devices > 1 and not cpu_devices_are_given():
        with contextlib.suppress(RuntimeError):  # JAX has started already
            jax.config.update("jax_num_cpu_devices", devices)
    if not launch.joins or jax.distributed.is_initialized():
        return
    meet(launch)
    try:
        with _ending_after(launch.join_timeout):
            jax.distributed.initialize(
                coordinator_address=launch.coordinator,
                num_processes=launch.num_processes,
                process_id=launch.process_id,
                initialization_timeout=launch.join_timeout + SECONDS_OF_GRACE,
                heartbeat_timeout_seconds=peer_timeout,
            )
    except (ValueError, RuntimeError) as error:
        where = launch.coordinator or "the place the cluster names"
        raise InputError(
            f"--pod: could not join the others at {where} "
            f"({' '.join(str(error).split())[:200]}); try --coordinator HOST:PORT "
            "--num-processes N --process-id I"
        ) from None


@contextlib.contextmanager
def _ending_after(timeout: int) -> Iterator[None]:
    """End the program in one line if the body, which JAX blocks, takes too long."""
    joined = threading.Event()

    def watch() -> None:
        for waited in range(0, timeout, SECONDS_BETWEEN_NOTICES):
            if joined.wait(min(SECONDS_BETWEEN_NOTICES, timeout - waited)):
                return
            logging.getLogger(__name__).warning(
                "--pod: the other processes are not all there (%d s of %d s)",
                min(waited + SECONDS_BETWEEN_NOTICES, timeout),
                timeout,
            )
        sys.stderr.write(
            "\nldm: error: --pod: the other processes did not all come in "
            f"{timeout} s; try to start every process, or a longer --join-timeout\n"
        )
        sys.stderr.flush()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        joined.set()
