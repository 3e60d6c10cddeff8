"""What watches a run from outside its steps: a profile, and a clock for stalls."""

import faulthandler
import sys
import time
from pathlib import Path

import jax

SECONDS_BETWEEN_ARMS = 1.0


class Profile:
    """Trace the steps from `start` to `stop`, for TensorBoard and Perfetto."""

    def __init__(self, folder: Path, steps: tuple[int, int] | None) -> None:
        """Trace nothing yet.

        Args:
          folder: To write to.
          steps: Steps done when it begins and when it ends, or the dispatches that
            hold these; None traces nothing.
        """
        self._folder = folder
        self._steps = steps
        self._tracing = False

    def before(self, done: int, size: int) -> None:
        """Begin or end, by the steps that are done and those that come at once."""
        if self._steps is None:
            return
        start, stop = self._steps
        if not self._tracing and done < stop and done + size > start:
            jax.profiler.start_trace(str(self._folder), create_perfetto_trace=True)
            self._tracing = True
        elif self._tracing and done >= stop:
            self.close()

    def close(self) -> None:
        """End, if it has begun."""
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing, self._steps = False, None


class StallClock:
    """Print the stack of every thread when no step ends for too long."""

    def __init__(self, seconds: int) -> None:
        """Set the clock.

        Args:
          seconds: Until it strikes; 0 for never.
        """
        self._seconds = seconds
        self._armed = 0.0
        self.alive()

    def alive(self) -> None:
        """Set it again: a step has ended."""
        now = time.monotonic()
        if self._seconds and now - self._armed >= SECONDS_BETWEEN_ARMS:
            self._armed = now
            where = sys.__stderr__ or sys.stderr
            faulthandler.dump_traceback_later(self._seconds, repeat=True, file=where)

    def close(self) -> None:
        """Stop it."""
        if self._seconds:
            faulthandler.cancel_dump_traceback_later()
