"""Several processes as one run: agree, wait, stop together.

Everything here is a collective: every process calls it, in the same order. On one
process each call is what it says, without a collective.
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


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Do a part of the run that can fail on one process alone.

    Raises:
      InputError: If it did, here or elsewhere; on every process the same line.
      RunError: Likewise.
      OSError: Likewise, with the same number.
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
        self._unsaved: str | None = None

    def hear(self) -> None:
        """Note that this process was told to stop.

        Raises:
          Preempted: If nothing is to be saved first, see `at_once`.
        """
        self._heard = True
        if self._unsaved is not None:
            raise Preempted(self._unsaved)

    @contextlib.contextmanager
    def at_once(self, details: str) -> Iterator[None]:
        """Do what can be stopped anywhere and loses nothing that is worth a wait.

        Args:
          details: What to say if it is.

        Raises:
          Preempted: If this process is told to stop, or was before.
        """
        if self._heard:
            raise Preempted(details)
        self._unsaved = details
        try:
            yield
        finally:
            self._unsaved = None

    def agreed(self) -> bool:
        """Say whether all stop here; every process asks once a dispatch."""
        self._questions += 1
        if jax.process_count() > 1 and not self._heard:
            # JAX's own handler hears it, on any process, and picks a question to come.
            question = self._questions
            self._heard = multihost_utils.reached_preemption_sync_point(question)
        return self._heard


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
