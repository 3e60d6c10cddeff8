"""Metrics on the device, read late so that no step waits for them."""

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import UInt32

from ldm_jax.parallel.layout import Layout
from ldm_jax.parallel.multihost import first_alone, gather_texts
from ldm_jax.training.metrics import MetricsLog
from ldm_jax.types import RunError


class Dispatch(NamedTuple):
    """Metrics of one call of the mapped step."""

    step: int
    """The last step of the call."""
    metrics: Any
    """On the device, with a leading axis of steps if the call made several."""
    example_index: UInt32[np.ndarray, "k b"]
    """Index of this process' examples, by step."""


class MetricsBuffer:
    """Metrics of the steps since the last check.

    Attributes:
      skipped: Non-finite steps of the stage, which changed nothing.
    """

    def __init__(
        self,
        stage: Any,
        log: MetricsLog,
        layout: Layout,
        *,
        progress: int,
        skipped: int,
        max_skipped: int,
    ) -> None:
        """Start with an empty buffer and the clock running.

        Args:
          progress: Steps that were made before.
          skipped: Steps that were skipped before.
        """
        self.skipped = skipped
        self._max_skipped = max_skipped
        self._stage = stage
        self._log = log
        self._layout = layout
        self._rows: list[Dispatch] = []
        self._last: tuple[int, dict[str, float]] | None = None
        self._logged = progress
        self._clock = time.perf_counter()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the body from the images per second."""
        start = time.perf_counter()
        yield
        self._clock += time.perf_counter() - start

    def add(self, dispatch: Dispatch) -> None:
        """Keep the metrics of a dispatch, and wait for the dispatch before it.

        Two dispatches in flight hide the host's work. Emulated devices get one: they
        share threads, and queued steps can dead-lock.
        """
        if self._layout.emulated:
            jax.block_until_ready(dispatch.metrics)
        elif self._rows:
            jax.block_until_ready(self._rows[-1].metrics)
        self._rows.append(dispatch)

    def check(self) -> None:
        """Read the buffered metrics; a collective.

        Raises:
          RunError: If more steps are non-finite than may be skipped.
        """
        rows, self._rows = self._rows, []
        found = jax.device_get([self._layout.local(row.metrics) for row in rows])
        for row, metrics in zip(rows, found, strict=True):
            num = len(row.example_index)
            by_name = _by_name(metrics)
            for i in range(num):
                step = row.step - num + 1 + i
                values = {k: float(np.ravel(value)[i]) for k, value in by_name.items()}
                if all(map(math.isfinite, values.values())):
                    self._last = (step, values)
                else:
                    self._fault(step, values, row.example_index[i])

    def _fault(
        self, step: int, values: dict[str, float], indices: UInt32[np.ndarray, " b"]
    ) -> None:
        """Log a non-finite step with its examples, so that it can be reproduced."""
        everyone = gather_texts(",".join(map(str, indices)))
        record = {
            "stage": self._stage.name,
            "step": step,
            "metrics": {name: repr(value) for name, value in values.items()},
            "example_index": [[int(i) for i in t.split(",")] for t in everyone],
        }
        first_alone(lambda: self._log.write_fault(record))
        self.skipped += 1
        if self.skipped <= self._max_skipped:
            return
        bad = [f"{k} = {v}" for k, v in values.items() if not math.isfinite(v)]
        before = (
            f", after {self.skipped - 1} that were skipped" if self.skipped > 1 else ""
        )
        raise RunError(
            f"{self._stage.name} step {step}: {', '.join(bad)} is not finite{before}; "
            f"its examples are in {self._log.fault_path.name}, and the last checkpoint "
            f"before it is kept; try a lower --{self._stage.name}.optim.lr in a new "
            "--workdir, or --max-skipped-steps N"
        )

    def log(self) -> str:
        """Check the buffered metrics and log those of the last step.

        Returns:
          Loss, images per second and remaining time, for the progress bar.

        Raises:
          RunError: If more steps are non-finite than may be skipped.
        """
        self.check()
        if self._last is None:
            return ""
        step, values = self._last
        now = time.perf_counter()
        steps_per_second = (step - self._logged) / max(now - self._clock, 1e-9)
        made = max(step - 1 - self.skipped, 0)  # the schedule counts updates
        values["learning_rate"] = float(self._stage.learning_rate(made))
        values["images_per_second"] = steps_per_second * self._stage.batch_size
        first_alone(lambda: self._log.write(self._stage.name, step, values))
        self._logged, self._clock, self._last = step, now, None
        left = (self._stage.num_steps - step) / max(steps_per_second, 1e-9)
        return (
            f"loss {values['loss']:.4f}  {values['images_per_second']:.0f} images/s  "
            f"{int(left) // 60}:{int(left) % 60:02d} left"
        )


def _by_name(metrics: Any) -> dict[str, Any]:
    """Return the metrics of a step by name, without those that do not apply."""
    return {k: value for k, value in metrics._asdict().items() if value is not None}
