"""The loop: when to save, draw, step, log and stop. The same for every stage."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Key

from ldm_jax.config import CheckpointConfig, LogConfig
from ldm_jax.data.pipeline import BatchIterator, to_batch
from ldm_jax.training.checkpoint import Checkpoint, CheckpointStore
from ldm_jax.training.log import MetricsLog, plot_losses, progress_bar
from ldm_jax.training.parallel import PmapLayout
from ldm_jax.training.state import AnyState
from ldm_jax.types import PyTree, RunError

CHECKPOINTS = "checkpoints"


class Stage(NamedTuple):
    """One stage of training, built and ready to run.

    Attributes:
      name: `autoencoder` or `diffusion`.
      num_steps: Steps it takes in all.
      batch_size: Global.
      step: The pure step, all but state, frozen, batch and key bound.
      init: Makes the state before the first step.
      frozen: Arrays the step reads and never changes, or None.
      extra: More arrays that belong into the checkpoint.
      learning_rate: Of a step, for the log.
      draw: Writes the pictures of a state.
    """

    name: str
    num_steps: int
    batch_size: int
    step: Callable[..., tuple[AnyState, Any]]
    init: Callable[[], AnyState]
    frozen: PyTree
    extra: dict[str, Any]
    learning_rate: Callable[[int], Any]
    draw: Callable[[Any, int], None]


class Watch(NamedTuple):
    """When the loop writes, and where.

    Attributes:
      workdir: Folder of the run.
      checkpoint: When the state is written.
      log: When numbers and pictures are.
    """

    workdir: Path
    checkpoint: CheckpointConfig
    log: LogConfig


class Finished(NamedTuple):
    """A stage that has made all its steps.

    Attributes:
      state: Its last state, on this process' first device.
      extra: The arrays kept beside it.
      digest: sha256 over every leaf of what was saved.
      seconds: Wall time, interruptions left out.
    """

    state: AnyState
    extra: dict[str, Any]
    digest: str
    seconds: float


class Prefetch:
    """One batch ahead on the device; its position is that of what was handed out."""

    def __init__(self, iterator: BatchIterator, layout: PmapLayout) -> None:
        """Wrap an iterator; nothing is read yet."""
        self._iterator = iterator
        self._layout = layout
        self._next: PyTree = None
        self._position = iterator.get_state()

    def position(self) -> Any:
        """Return the state from which the next batch would be read again."""
        return self._position

    def take(self, *, last: bool) -> PyTree:
        """Hand out a batch and, unless it is the `last`, start sending the next."""
        batch = self._read() if self._next is None else self._next
        self._position = self._iterator.get_state()
        self._next = None if last else self._read()
        return batch

    def _read(self) -> PyTree:
        return self._layout.split(to_batch(next(self._iterator)))


def checkpoint_tree(
    state: AnyState, root_key: Key[Array, ""], extra: dict[str, Any]
) -> dict[str, Any]:
    """Collect what a checkpoint of a stage holds."""
    return {"state": state, "root_key": jax.random.key_data(root_key), "extra": extra}


def stage_target(stage: Stage, root_key: Key[Array, ""]) -> PyTree:
    """Return the shapes and dtypes of a stage's checkpoint."""
    return jax.eval_shape(lambda: checkpoint_tree(stage.init(), root_key, stage.extra))


def run_stage(
    stage: Stage,
    *,
    watch: Watch,
    layout: PmapLayout,
    iterator: BatchIterator,
    root_key: Key[Array, ""],
    notes: dict[str, Any],
) -> Finished:
    """Run a stage to its end, from its newest checkpoint if there is one.

    Args:
      stage: What to run.
      watch: When and where to write.
      layout: Where the arrays live.
      iterator: The stage's batches, from the first; set to its place on a resume.
      root_key: The run's.
      notes: JSON saved with every checkpoint (the config).

    Returns:
      The finished stage.

    Raises:
      RunError: If a loss is not finite, or no checkpoint is intact.
      OSError: If something cannot be written.
    """
    directory = watch.workdir / stage.name
    directory.mkdir(exist_ok=True)
    store = CheckpointStore(directory / CHECKPOINTS, keep=watch.checkpoint.keep)
    log = MetricsLog(watch.workdir)
    try:
        found = store.restore(stage_target(stage, root_key))
        if found is not None and found.step == stage.num_steps:
            return _finished(found)
        log.rewind(stage.name, found.step if found else 0)
        return _run_steps(
            stage, found, watch, layout, iterator, root_key, notes, store, log
        )
    finally:
        log.close()
        iterator.close()
        store.close()


def _finished(found: Checkpoint) -> Finished:
    return Finished(
        state=found.tree["state"],
        extra=found.tree["extra"],
        digest=found.digest,
        seconds=found.notes["seconds"],
    )


def _run_steps(
    stage: Stage,
    found: Checkpoint | None,
    watch: Watch,
    layout: PmapLayout,
    iterator: BatchIterator,
    root_key: Key[Array, ""],
    notes: dict[str, Any],
    store: CheckpointStore,
    log: MetricsLog,
) -> Finished:
    start = time.perf_counter()
    done, before = 0, 0.0
    state, extra = (stage.init(), stage.extra)
    if found is not None:
        done, before = found.step, found.notes["seconds"]
        state, extra = found.tree["state"], found.tree["extra"]
        iterator.set_state(found.notes["data"])
    state = layout.place(state)
    keys, frozen = layout.place(root_key), layout.place(stage.frozen)
    mapped = layout.map_step(stage.step)
    batches = Prefetch(iterator, layout)
    pending = PendingMetrics(stage, log, layout, progress=done)
    digest = ""

    def save(step: int) -> str:
        return store.save(
            step,
            checkpoint_tree(layout.local(state), root_key, extra),
            {
                **notes,
                "data": batches.position(),
                "seconds": before + time.perf_counter() - start,
            },
        )

    with progress_bar(stage.name, num_steps=stage.num_steps, done=done) as bar:
        for step in range(done + 1, stage.num_steps + 1):
            batch = batches.take(last=step == stage.num_steps)
            state, metrics = mapped(state, frozen, batch, keys)
            pending.add(step, metrics)
            is_last = step == stage.num_steps
            save_due = is_last or step % watch.checkpoint.every == 0
            draw_due = is_last or step % watch.log.images_every == 0
            if is_last or step % watch.log.every == 0:
                bar.set_postfix_str(pending.log(), refresh=False)
            bar.update()
            if save_due or draw_due:
                pending.check()
                with pending.paused():
                    # Pictures first: a kill in between draws them again.
                    if draw_due:
                        stage.draw(layout.local(state), step)
                        plot_losses(log.path, watch.workdir / "loss.png")
                    if save_due:
                        digest = save(step)
    return Finished(
        state=layout.local(state),
        extra=extra,
        digest=digest,
        seconds=before + time.perf_counter() - start,
    )


class PendingMetrics:
    """Metrics still on the device; read together, so that no step waits for them."""

    def __init__(
        self, stage: Stage, log: MetricsLog, layout: PmapLayout, *, progress: int
    ) -> None:
        """Start with nothing pending and the clock running."""
        self._stage = stage
        self._log = log
        self._layout = layout
        self._rows: list[tuple[int, Any]] = []
        self._last: tuple[int, Any] | None = None
        self._logged = progress
        self._clock = time.perf_counter()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what happens inside out of the images per second."""
        start = time.perf_counter()
        yield
        self._clock += time.perf_counter() - start

    def add(self, step: int, metrics: Any) -> None:
        """Keep the metrics of a step; wait for those of the step before.

        Two steps in flight hide the host's work. Emulated devices get one: they share
        their threads, and queued steps can dead-lock.
        """
        if self._layout.emulated:
            jax.block_until_ready(metrics)
        elif self._rows:
            jax.block_until_ready(self._rows[-1][1])
        self._rows.append((step, metrics))

    def check(self) -> None:
        """Read what is pending.

        Raises:
          RunError: If a metric of any step is not finite.
        """
        rows = jax.device_get(
            [(step, self._layout.local(metrics)) for step, metrics in self._rows]
        )
        self._rows = []
        for step, metrics in rows:
            bad = [
                f"{name} = {value}"
                for name, value in _told(metrics).items()
                if not np.isfinite(value)
            ]
            if bad:
                raise RunError(
                    f"{self._stage.name} step {step}: {', '.join(bad)} is not finite; "
                    "the last checkpoint before it is kept; try a lower "
                    f"--{self._stage.name}.optim.lr in a new --workdir"
                )
            self._last = (step, metrics)

    def log(self) -> str:
        """Check what is pending, log the last step, and say how it goes.

        Returns:
          Loss, images per second and time left, for the progress bar.

        Raises:
          RunError: If a metric of any step is not finite.
        """
        self.check()
        if self._last is None:
            return ""
        step, metrics = self._last
        now = time.perf_counter()
        steps_per_second = (step - self._logged) / max(now - self._clock, 1e-9)
        values = {name: float(value) for name, value in _told(metrics).items()}
        values["learning_rate"] = float(self._stage.learning_rate(step - 1))
        values["images_per_second"] = steps_per_second * self._stage.batch_size
        self._log.write(self._stage.name, step, values)
        self._logged, self._clock = step, now
        left = (self._stage.num_steps - step) / max(steps_per_second, 1e-9)
        return (
            f"loss {values['loss']:.4f}  {values['images_per_second']:.0f} images/s  "
            f"{int(left) // 60}:{int(left) % 60:02d} left"
        )


def _told(metrics: Any) -> dict[str, Any]:
    """Name the metrics of a step; None marks one that this run does not have."""
    return {k: value for k, value in metrics._asdict().items() if value is not None}
