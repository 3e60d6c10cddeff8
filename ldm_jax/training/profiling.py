"""A profiler trace of some steps, and stack traces of a stalled run."""

import faulthandler
import sys
import time
from pathlib import Path

import jax

SECONDS_BETWEEN_ARMS = 1.0


class Profile:
    """Traces some steps for TensorBoard and Perfetto."""

    def __init__(self, folder: Path, steps: tuple[int, int] | None) -> None:
        """Prepare a trace.

        Args:
          folder: Receives the trace.
          steps: Numbers of finished steps at its start and end, widened to whole
            dispatches; None traces nothing.
        """
        self._folder = folder
        self._steps = steps
        self._tracing = False

    def before(self, done: int, size: int) -> None:
        """Start or stop the trace before a dispatch of `size` steps after `done`."""
        if self._steps is None:
            return
        start, stop = self._steps
        if not self._tracing and done < stop and done + size > start:
            jax.profiler.start_trace(str(self._folder), create_perfetto_trace=True)
            self._tracing = True
        elif self._tracing and done >= stop:
            self.close()

    def close(self) -> None:
        """Stop the trace if it is running."""
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing, self._steps = False, None


class StallClock:
    """Prints the stack of every thread if no step ends for too long."""

    def __init__(self, seconds: int) -> None:
        """Start the clock.

        Args:
          seconds: Longest time without the end of a step; 0 for no limit.
        """
        self._seconds = seconds
        self._armed = 0.0
        self.alive()

    def alive(self) -> None:
        """Restart the clock: a step has ended."""
        now = time.monotonic()
        if self._seconds and now - self._armed >= SECONDS_BETWEEN_ARMS:
            self._armed = now
            where = sys.__stderr__ or sys.stderr
            faulthandler.dump_traceback_later(self._seconds, repeat=True, file=where)

    def close(self) -> None:
        """Stop the clock."""
        if self._seconds:
            faulthandler.cancel_dump_traceback_later()
