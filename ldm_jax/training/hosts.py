"""Several processes as one run: join, agree, wait, stop together, say who is missing.

Everything here is a collective: every process calls it, in the same order. On one
process each call is what it says, without a collective.
"""

import contextlib
import json
import signal
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from ldm_jax.types import InputError, RunError

T = TypeVar("T")

CONNECT_TIMEOUT = 300
"""Seconds to wait for the others when joining."""


class Pod(NamedTuple):
    """How to find the other processes; all None asks the cluster.

    Attributes:
      coordinator: `HOST:PORT` of process 0.
      num_processes: How many there are.
      process_id: Which one this is.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


def join(pod: Pod | None, *, peer_timeout: int) -> None:
    """Join the other processes, if there are any.

    Args:
      pod: How to find them; None for a run of one process.
      peer_timeout: Seconds without a sign of life after which one counts as dead. Then
        the others end themselves too, and name it.

    Raises:
      InputError: If the cluster does not say how, or the others do not come.
    """
    if pod is None or jax.distributed.is_initialized():
        return
    try:
        jax.distributed.initialize(
            coordinator_address=pod.coordinator,
            num_processes=pod.num_processes,
            process_id=pod.process_id,
            initialization_timeout=CONNECT_TIMEOUT,
            heartbeat_timeout_seconds=peer_timeout,
        )
    except (ValueError, RuntimeError) as error:
        where = pod.coordinator or "what the cluster says"
        raise InputError(
            f"--pod: could not join the others at {where} "
            f"({' '.join(str(error).split())[:200]}); try --coordinator HOST:PORT "
            "--num-processes N --process-id I"
        ) from None


def is_first() -> bool:
    """Say whether this is the process that writes logs and pictures."""
    return jax.process_index() == 0


def gather_texts(text: str) -> list[str]:
    """Tell every process a text; return what each told, in order of processes."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = np.ravel(multihost_utils.process_allgather(np.int32(len(data))))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(data)] = data
    rows = np.asarray(multihost_utils.process_allgather(padded))
    rows = rows.reshape(len(sizes), -1)
    return [bytes(row[:n]).decode() for row, n in zip(rows, sizes, strict=True)]


def wait_for_all(name: str) -> None:
    """Wait until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def all_agree(fine: bool) -> bool:
    """Say whether it is fine on every process."""
    return all(text == "1" for text in gather_texts("1" if fine else "0"))


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Do a part of the run that can fail on one process alone.

    Raises:
      InputError: If it did, here or elsewhere; on every process the same line.
      RunError: Likewise.
    """
    failure: Exception | None = None
    try:
        yield
    except (InputError, RunError, OSError) as error:
        failure = error
    kind = "" if failure is None else type(failure).__name__
    told = gather_texts(json.dumps([kind, str(failure or "")]))
    if failure is not None:
        raise failure
    for process, (kind, message) in enumerate(map(json.loads, told)):
        if kind:
            error = RunError if kind == "RunError" else InputError
            raise error(f"process {process}: {message}")


def first_alone(do: Callable[[], T]) -> T | None:
    """Do something on process 0 alone, and wait for it; its failure is everyone's."""
    found = None
    with together():
        if is_first():
            found = do()
    return found


def check_same(facts: Mapping[str, Any]) -> None:
    """Check that every process has the same facts.

    Args:
      facts: JSON-compatible values by what to call them.

    Raises:
      InputError: If one has not: which process, which fact, and both values.
    """
    everyone = [json.loads(text) for text in gather_texts(json.dumps(dict(facts)))]
    for process, theirs in enumerate(everyone):
        different = [
            f"{name} ({everyone[0].get(name)!r} on process 0, {theirs.get(name)!r} "
            f"on process {process})"
            for name in everyone[0].keys() | theirs.keys()
            if everyone[0].get(name) != theirs.get(name)
        ]
        if different:
            raise InputError(
                f"processes differ: {', '.join(sorted(different))}; try the same "
                "command and the same versions everywhere"
            )


class StopSignal:
    """Whether the machine is about to be taken away (SIGTERM), agreed upon by all."""

    def __init__(self) -> None:
        """Start with nothing heard and no question asked."""
        self._heard = False
        self._questions = 0

    def hear(self) -> None:
        """Note that this process was told to stop."""
        self._heard = True

    def agreed(self) -> bool:
        """Say whether all stop here; every process asks once a dispatch."""
        self._questions += 1
        if jax.process_count() == 1:
            return self._heard
        # JAX's own handler hears it, on any process, and picks a question to come.
        return multihost_utils.reached_preemption_sync_point(self._questions)


@contextlib.contextmanager
def stop_signal() -> Iterator[StopSignal]:
    """Turn SIGTERM into a question that the loop asks between two dispatches."""
    stop = StopSignal()
    if jax.process_count() > 1:
        yield stop
        return
    try:
        before = signal.signal(signal.SIGTERM, lambda *_: stop.hear())
    except ValueError:  # not the main thread: nobody to tell
        yield stop
        return
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
