"""Several processes as one run: they agree, wait and stop together.

Every function is a collective: all processes call it, in the same order. On a single
process nothing is communicated.
"""

import contextlib
import json
import signal
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from ldm_jax.types import InputError, Preempted, RunError

T = TypeVar("T")


def is_first() -> bool:
    """Return whether this process writes logs and images."""
    return jax.process_index() == 0


def gather_texts(text: str) -> list[str]:
    """Exchange texts; return those of all processes, in order."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = np.ravel(multihost_utils.process_allgather(np.int32(len(data))))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(data)] = data
    rows = np.asarray(multihost_utils.process_allgather(padded))
    rows = rows.reshape(len(sizes), -1)
    return [bytes(row[:n]).decode() for row, n in zip(rows, sizes, strict=True)]


def from_first(value: T) -> T:
    """Return the value of process 0 on every process; JSON holds it unchanged."""
    return json.loads(gather_texts(json.dumps(value))[0])


def wait_for_all(name: str) -> None:
    """Wait until every process calls this."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Raise an error of one process on all of them, with the same message.

    Raises:
      InputError: If the body raised one on any process.
      RunError: Likewise.
      OSError: Likewise, with the same error number.
    """
    failure: Exception | None = None
    try:
        yield
    except (InputError, RunError, OSError) as error:
        failure = error
    kind = "" if failure is None else type(failure).__name__
    number = failure.errno if isinstance(failure, OSError) else None
    details = gather_texts(json.dumps([kind, str(failure or ""), number]))
    if failure is not None:
        raise failure
    for process, (kind, message, number) in enumerate(map(json.loads, details)):
        line = f"process {process}: {message}"
        if number is not None:
            raise OSError(number, line)
        if kind:
            raise RunError(line) if kind == "RunError" else InputError(line)


def first_alone(do: Callable[[], T]) -> T | None:
    """Call `do` on process 0 alone; all processes wait, and raise its error."""
    found = None
    with together():
        if is_first():
            found = do()
    return found


def check_same(facts: Mapping[str, Any]) -> None:
    """Check that every process has the same facts.

    Args:
      facts: JSON-compatible values by name.

    Raises:
      InputError: If a process has another value.
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
    """A request to stop this process or any other (SIGTERM)."""

    def __init__(self) -> None:
        """Start without a request to stop."""
        self._requested = False
        self._polls = 0
        self._unsaved: str | None = None

    def request(self) -> None:
        """Handle a request to stop this process.

        Raises:
          Preempted: Within `at_once`.
        """
        self._requested = True
        if self._unsaved is not None:
            raise Preempted(self._unsaved)

    @contextlib.contextmanager
    def at_once(self, details: str) -> Iterator[None]:
        """Stop the body at any point: it can be interrupted without a loss.

        Args:
          details: Message of the `Preempted`.

        Raises:
          Preempted: If this process is asked to stop, or was before.
        """
        if self._requested:
            raise Preempted(details)
        self._unsaved = details
        try:
            yield
        finally:
            self._unsaved = None

    def agreed(self) -> bool:
        """Return whether all processes stop now; called once a dispatch."""
        self._polls += 1
        if jax.process_count() > 1 and not self._requested:
            # JAX handles the signal on any process, and agrees on a poll to stop at.
            self._requested = multihost_utils.reached_preemption_sync_point(self._polls)
        return self._requested


@contextlib.contextmanager
def stop_signal() -> Iterator[StopSignal]:
    """Turn SIGTERM into a request that the loop reads between two dispatches."""
    stop = StopSignal()
    if jax.process_count() > 1:
        yield stop
        return
    try:
        before = signal.signal(signal.SIGTERM, lambda *_: stop.request())
    except ValueError:  # not the main thread
        yield stop
        return
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
