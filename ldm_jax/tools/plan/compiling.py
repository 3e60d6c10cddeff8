"""Compiling a program ahead of time, and reading what the compiler found."""

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
    """Bytes of a device that a program takes."""

    needed: float
    """Arguments, temporaries and the program, which is what is set aside."""
    arguments: float
    """State, batch and what is frozen, with the padding of their layouts."""
    temporaries: float
    """What lives within a run of the program, and what it returns anew."""
    code: float
    """The program itself."""
    peak: float
    """Most that is in use at one time, without the gaps between."""


class Compiled(NamedTuple):
    """A compiled program, or why there is none."""

    seconds: float
    """Wall time of tracing and compiling."""
    memory: Memory | None
    """What it takes; None if it does not fit."""
    shortage: Shortage | None
    """What it would take; None if it fits."""
    flops: float
    """That the compiler counts, for each device."""
    moved: float
    """Bytes that it counts as read and written, for each device."""
    cycles: int
    """That it estimates for all that computes; 0 where it does not."""
    kernels: list[Kernel]
    """Of which it estimates none."""
    collectives: list[Collective]
    """All of them."""


def compile_program(
    lower: Callable[[], jax.stages.Lowered], *, label: str, say: Say
) -> Compiled:
    """Trace and compile a program, saying now and then that it goes on.

    Args:
      lower: Traces it.
      label: What to call it.
      say: Takes a line of progress.

    Returns:
      What the compiler found; a program that is too large is an answer too.

    Raises:
      RunError: If it cannot be compiled for another reason.
    """
    start = time.perf_counter()
    try:
        with _ticking(f"tracing {label}", say):
            lowered = lower()
        with _ticking(f"compiling {label}", say):
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
    """Return what is known of a device; None if nothing is."""
    return chip_of_kind(device.device_kind)


def usable_bytes(device: Any, chip: Chip | None, num_devices: int) -> float:
    """Return the bytes that a program may take on a device.

    Args:
      device: One that is here, or of a topology.
      chip: What is known of it.
      num_devices: How many share a machine, where the device is a CPU.
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
def _ticking(what: str, say: Say) -> Iterator[None]:
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
