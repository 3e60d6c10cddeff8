"""Ahead-of-time compilation, and the compiler's analysis of a program."""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from ldm_jax.tools.plan.chips import Chip, chip_of_kind
from ldm_jax.tools.plan.hlo import (
    Collective,
    Kernel,
    Shortage,
    collectives,
    estimated_cycles,
    kernels,
    parse_program,
    parse_shortage,
)
from ldm_jax.types import RunError

SECONDS_BETWEEN_LINES = 30.0
Say = Callable[[str], None]


class Memory(NamedTuple):
    """Bytes of a device's memory that a program uses."""

    needed: float
    """Bytes that are allocated: arguments, temporaries and code."""
    arguments: float
    """Bytes of state, batch and frozen parameters, with the padding of their
    layouts."""
    temporaries: float
    """Bytes of intermediate values and new outputs."""
    code: float
    """Bytes of the program."""
    peak: float
    """Largest number of bytes in use at one time, without fragmentation."""


class Compiled(NamedTuple):
    """Result of a compilation; numbers are of one device."""

    seconds: float
    """Wall time of tracing and compiling."""
    memory: Memory | None
    """Memory of the program; None if it does not fit."""
    shortage: Shortage | None
    """Memory that is missing; None if it fits."""
    flops: float
    """FLOPs that the compiler counts."""
    moved: float
    """Bytes read and written that the compiler counts."""
    cycles: int
    """Cycles that the compiler estimates, without kernels; 0 if it does not."""
    kernels: list[Kernel]
    """Pallas kernels, of which the compiler estimates no cycles."""
    collectives: list[Collective]
    """Collectives of the program."""


def compile_program(
    lower: Callable[[], jax.stages.Lowered], *, label: str, say: Say
) -> Compiled:
    """Trace and compile a program, with a line of progress every 30 s.

    Args:
      lower: Traces the program.
      label: Name of the program in the lines of progress.
      say: Called with a line of progress.

    Raises:
      RunError: If it cannot be compiled for another reason than its size.
    """
    start = time.perf_counter()
    try:
        with _progress(f"tracing {label}", say):
            lowered = lower()
        with _progress(f"compiling {label}", say):
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        shortage = parse_shortage(str(error))
        if shortage is None:
            lines = str(error).splitlines() or [type(error).__name__]
            raise RunError(f"the compiler refuses {label}: {lines[0]}") from None
        seconds = time.perf_counter() - start
        return Compiled(seconds, None, shortage, 0.0, 0.0, 0, [], [])
    program = parse_program(compiled.as_text() or "")
    cost = compiled.cost_analysis() or {}
    return Compiled(
        seconds=time.perf_counter() - start,
        memory=_memory(compiled.memory_analysis()),
        shortage=None,
        flops=float(cost.get("flops", 0.0)),
        moved=float(cost.get("bytes accessed", 0.0)),
        cycles=estimated_cycles(program),
        kernels=kernels(program),
        collectives=collectives(program),
    )


def chip_of(device: Any) -> Chip | None:
    """Return the chip of a device; None if it is not in the table."""
    return chip_of_kind(device.device_kind)


def usable_bytes(device: Any, chip: Chip | None, num_devices: int) -> float:
    """Return the bytes that a program may use on a device; 0 if unknown.

    Args:
      device: A device of this machine, or of a topology.
      chip: Its entry in the table.
      num_devices: Devices that share the memory, if the device is a CPU.
    """
    if device.platform == "cpu":
        whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return whole / num_devices
    if chip is not None and chip.clock:
        return chip.usable
    stats = device.memory_stats() or {}
    limit = stats.get("bytes_limit", chip.usable if chip else 0.0)
    return float(limit)


def _memory(stats: Any) -> Memory:
    outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
    code = float(stats.generated_code_size_in_bytes)
    arguments = float(stats.argument_size_in_bytes)
    temporaries = float(stats.temp_size_in_bytes + outputs)
    needed = arguments + temporaries + code
    peak = float(getattr(stats, "peak_memory_in_bytes", 0)) or arguments + temporaries
    return Memory(needed, arguments, temporaries, code, peak)


@contextlib.contextmanager
def _progress(what: str, say: Say) -> Iterator[None]:
    start = time.perf_counter()
    done = threading.Event()
    say(what)

    def tick() -> None:
        while not done.wait(SECONDS_BETWEEN_LINES):
            say(f"{what}: {time.perf_counter() - start:.0f} s so far")

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
