"""Metrics still on the device: read late, so that no step waits for them."""

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
    """What one call of the mapped step gave."""

    step: int
    """The last step of it."""
    metrics: Any
    """On the device; with a leading axis of steps where it made several."""
    example_index: UInt32[np.ndarray, "k b"]
    """Of this process' examples, for each step."""


class MetricsBuffer:
    """The metrics of the steps since the last look at them.

    Attributes:
      skipped: Steps of the stage that changed nothing, as they were not finite.
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
        """Start with nothing pending and the clock running."""
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
        """Leave what happens inside out of the images per second."""
        start = time.perf_counter()
        yield
        self._clock += time.perf_counter() - start

    def add(self, dispatch: Dispatch) -> None:
        """Keep the metrics of a dispatch; wait for those of the one before.

        Two in flight hide the host's work. Emulated devices get one: they share
        their threads, and queued steps can dead-lock.
        """
        if self._layout.emulated:
            jax.block_until_ready(dispatch.metrics)
        elif self._rows:
            jax.block_until_ready(self._rows[-1].metrics)
        self._rows.append(dispatch)

    def check(self) -> None:
        """Read what is pending; on several processes, all of them look.

        Raises:
          RunError: If more steps are not finite than may be skipped.
        """
        rows, self._rows = self._rows, []
        found = jax.device_get([self._layout.local(row.metrics) for row in rows])
        for row, metrics in zip(rows, found, strict=True):
            num = len(row.example_index)
            details = _details(metrics)
            for i in range(num):
                step = row.step - num + 1 + i
                values = {k: float(np.ravel(value)[i]) for k, value in details.items()}
                if all(map(math.isfinite, values.values())):
                    self._last = (step, values)
                else:
                    self._fault(step, values, row.example_index[i])

    def _fault(
        self, step: int, values: dict[str, float], indices: UInt32[np.ndarray, " b"]
    ) -> None:
        """Write down a step that was not finite, so that it can be made again."""
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
        """Check what is pending, log the last step, and say how it goes.

        Returns:
          Loss, images per second and time left, for the progress bar.

        Raises:
          RunError: If more steps are not finite than may be skipped.
        """
        self.check()
        if self._last is None:
            return ""
        step, values = self._last
        now = time.perf_counter()
        steps_per_second = (step - self._logged) / max(now - self._clock, 1e-9)
        made = max(step - 1 - self.skipped, 0)  # by the updates that were made
        values["learning_rate"] = float(self._stage.learning_rate(made))
        values["images_per_second"] = steps_per_second * self._stage.batch_size
        first_alone(lambda: self._log.write(self._stage.name, step, values))
        self._logged, self._clock, self._last = step, now, None
        left = (self._stage.num_steps - step) / max(steps_per_second, 1e-9)
        return (
            f"loss {values['loss']:.4f}  {values['images_per_second']:.0f} images/s  "
            f"{int(left) // 60}:{int(left) % 60:02d} left"
        )


def _details(metrics: Any) -> dict[str, Any]:
    """Name the metrics of a step; None marks one that this run does not have."""
    return {k: value for k, value in metrics._asdict().items() if value is not None}
