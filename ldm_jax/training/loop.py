"""The training loop, the same for every stage: steps, logs, images, checkpoints."""

import contextlib
import hashlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Key

from ldm_jax.config import CheckpointConfig, LogConfig, ParallelConfig
from ldm_jax.data.pipeline import BatchIterator
from ldm_jax.files import naming, read_record
from ldm_jax.parallel.layout import Layout
from ldm_jax.parallel.multihost import (
    StopSignal,
    check_same,
    first_alone,
    is_first,
    together,
)
from ldm_jax.training.checkpoint import CHECKPOINTS, Check, Checkpoint, CheckpointStore
from ldm_jax.training.dispatch import Step, several_steps, skip_nonfinite
from ldm_jax.training.metrics import (
    PLOT_FILE,
    Measure,
    MetricsLog,
    ScoreCurve,
    plot_losses,
    progress_bar,
)
from ldm_jax.training.metrics_buffer import Dispatch, MetricsBuffer
from ldm_jax.training.prefetch import Prefetch
from ldm_jax.training.profiling import Profile, StallClock
from ldm_jax.training.state import TrainState
from ldm_jax.training.workdir import check_changed
from ldm_jax.types import Preempted, PyTree


class Stage(NamedTuple):
    """One stage of training, ready to run."""

    name: str
    """`autoencoder` or `diffusion`."""
    num_steps: int
    """All steps of the stage."""
    batch_size: int
    """Examples of a global batch."""
    step: Step
    """The pure step, with everything bound but its arrays and `reduce`."""
    init: Callable[[], TrainState]
    """Makes the state before the first step."""
    frozen: PyTree
    """Arrays that the step reads and does not change, or None."""
    extra: dict[str, Any]
    """Further arrays of a checkpoint."""
    learning_rate: Callable[[int], Any]
    """From a step to the learning rate, for the log."""
    draw: Callable[[Any, int], None] | None = None
    """Writes images of averaged parameters at a step."""
    measure: Measure | None = None
    """Scores averaged parameters at a step."""
    write_averages: Callable[[Any, int], None] | None = None
    """Writes the power-function averages at a step."""
    average_steps: tuple[int, ...] = ()
    """Steps at which those are written, rising."""
    check: Check | None = None
    """Says why a checkpoint is not one of this run; None where nothing is known."""


class LoopConfig(NamedTuple):
    """Settings of the training loop."""

    workdir: Path
    """Folder of the run."""
    checkpoint: CheckpointConfig
    """When the state is saved."""
    log: LogConfig
    """When metrics and images are written."""
    parallel: ParallelConfig = ParallelConfig()
    """Steps a dispatch, parts of a batch, and the longest time of a dispatch."""
    max_skipped: int = 0
    """Non-finite steps that may be skipped."""
    profile: tuple[int, int] | None = None
    """First and last step of a trace; None traces nothing."""
    scores_every: int = 0
    """Steps between two scores of a stage that has a measure."""


class Finished(NamedTuple):
    """A finished stage."""

    ema: PyTree
    """Its averaged parameters, whole on this process."""
    extra: dict[str, Any]
    """Further arrays of its checkpoints."""
    digest: str
    """sha256 over every leaf of the last checkpoint."""
    seconds: float
    """Training time, without interruptions."""


def checkpoint_tree(
    state: TrainState, root_key: Key[Array, ""], extra: dict[str, Any]
) -> dict[str, Any]:
    """Return the arrays of a checkpoint."""
    return {"state": state, "root_key": jax.random.key_data(root_key), "extra": extra}


def stage_target(stage: Stage, root_key: Key[Array, ""]) -> PyTree:
    """Return the shapes and dtypes of a stage's checkpoint."""
    return jax.eval_shape(lambda: checkpoint_tree(stage.init(), root_key, stage.extra))


def dispatch_size(
    done: int, *, num_steps: int, loop_config: LoopConfig, also: tuple[int, ...] = ()
) -> int:
    """Return how many steps the next dispatch makes.

    It makes `steps_per_dispatch` steps, or one if something is due before those are
    made. The result depends on `done` alone, so a resumed run makes the same dispatches
    as an unbroken one.

    Args:
      done: Steps made.
      also: Further steps at which something is due, rising.
    """
    every = (
        loop_config.checkpoint.every,
        loop_config.log.every,
        loop_config.log.images_every,
    )
    later = [step for step in also if step > done]
    due = min(num_steps, *(done - done % n + n for n in every), *later[:1])
    size = loop_config.parallel.steps_per_dispatch
    return size if done + size <= due else min(1, num_steps - done)


def run_stage(
    stage: Stage,
    *,
    loop_config: LoopConfig,
    layout: Layout,
    iterator: BatchIterator,
    root_key: Key[Array, ""],
    notes: dict[str, Any],
    stop: StopSignal,
) -> Finished:
    """Train a stage to its end, from its newest intact checkpoint if there is one.

    Args:
      iterator: The stage's batches from the first; closed afterwards.
      notes: JSON saved with every checkpoint.

    Raises:
      Preempted: If the process was asked to stop; the state is saved.
      RunError: If a loss is not finite, no checkpoint is intact, or one could not be
        written.
      OSError: If another file cannot be written.
    """
    directory = loop_config.workdir / stage.name
    first_alone(lambda: directory.mkdir(exist_ok=True))
    with contextlib.closing(iterator):
        trainer = Trainer(stage, loop_config, layout, root_key, notes)
        with contextlib.closing(trainer):
            return trainer.run(iterator, stop)


class Trainer:
    """Trains one stage; the only mutable state of the loop."""

    def __init__(
        self,
        stage: Stage,
        loop_config: LoopConfig,
        layout: Layout,
        root_key: Key[Array, ""],
        notes: dict[str, Any],
    ) -> None:
        """Open the checkpoints and the log."""
        self._stage, self._config, self._layout = stage, loop_config, layout
        self._root_key, self._notes = root_key, notes
        self._started = time.perf_counter()
        self._digest = ""
        self._checked: set[int] = set()
        workdir = loop_config.workdir
        checkpoints = workdir / stage.name / CHECKPOINTS
        self._store = CheckpointStore(checkpoints, keep=loop_config.checkpoint.keep)
        self._log = MetricsLog(workdir, writes=is_first())
        self._curve = ScoreCurve(stage, self._log, every=loop_config.scores_every)
        self._clock = StallClock(loop_config.parallel.stall_timeout)
        self._profile = Profile(workdir / "profile" / stage.name, loop_config.profile)

    def close(self) -> None:
        """Close everything that is open; raise the error of an unfinished save."""
        self._profile.close()
        self._clock.close()
        self._log.close()
        self._store.close()

    def run(self, iterator: BatchIterator, stop: StopSignal) -> Finished:
        """Make the remaining steps."""
        stage = self._stage
        found, shardings = None, None
        if not self._store.is_empty():
            target = stage_target(stage, self._root_key)
            shardings = self._layout.restore_shardings(target)
            found = self._store.restore(target, shardings=shardings, check=stage.check)
        with together():
            step = 0 if found is None else found.step
            check_changed(self._config.workdir, stage.name, step)
        if found is not None and found.step == stage.num_steps:
            return self._restored(found, whole=shardings is None)
        self._begin(found, iterator)
        del found
        with progress_bar(
            stage.name, num_steps=stage.num_steps, done=self._done, visible=is_first()
        ) as bar:
            if stop.agreed():
                raise Preempted(f"{stage.name} step {self._done}: nothing new to save")
            if self._curve.is_missing(self._done):
                self._score()
            while self._done < stage.num_steps:
                before = self._done
                self._dispatch()
                stopping = stop.agreed()
                if self._is_due(self._config.log.every):
                    bar.set_postfix_str(self._buffer.log(), refresh=False)
                bar.update(self._done - before)
                self._write(stopping=stopping)
                is_last = self._done == stage.num_steps
                if is_last or stopping:
                    self._store.wait()
                if stopping and not is_last:
                    raise Preempted(f"{stage.name} step {self._done} is saved")
                if self._curve.is_due(self._done):
                    self._score()
        ema = self._layout.local(self._state.ema)
        return Finished(ema, self._extra, self._digest, self._seconds())

    def _restored(self, found: Checkpoint, *, whole: bool) -> Finished:
        """Return a stage that was finished before, and score it if that is missing."""
        kept = found.tree["state"].ema, found.tree["extra"]
        ema, extra = kept if whole else self._layout.local(kept)
        if self._curve.is_missing(found.step):
            self._curve.add(ema, found.step)
        return Finished(ema, extra, found.digest, found.notes["seconds"])

    def _begin(self, found: Checkpoint | None, iterator: BatchIterator) -> None:
        """Place the initial or the restored state on the devices."""
        stage, layout = self._stage, self._layout
        self._done, self._before, skipped = 0, 0.0, 0
        if found is not None:
            self._done, self._before = found.step, found.notes["seconds"]
            skipped = found.notes.get("skipped", 0)
            iterator.set_state(found.notes["data"])
        first_alone(lambda: self._log.rewind(stage.name, self._done))
        self._keys = layout.place(self._root_key)
        self._frozen = layout.place(stage.frozen)
        self._batches = Prefetch(iterator, layout)
        self._buffer = MetricsBuffer(
            stage,
            self._log,
            layout,
            progress=self._done,
            skipped=skipped,
            max_skipped=self._config.max_skipped,
        )
        step = stage.step
        if self._config.max_skipped:
            step = skip_nonfinite(step)
        step = layout.alike(step)
        accumulate = self._config.parallel.accumulate
        self._one = layout.map_step(step, accumulate=accumulate)
        self._several = layout.map_step(several_steps(step), accumulate=accumulate)
        if found is None:
            self._state, self._extra = self._init(), stage.extra
        else:
            self._state = layout.place(found.tree["state"])
            self._extra = found.tree["extra"]

    def _init(self) -> PyTree:
        """Make the initial state while the first dispatch is traced and compiled."""
        make, layout, size = self._stage.init, self._layout, self._size(self._done)
        if layout.process_count > 1:
            return layout.init(make)
        state = layout.stand_ins(jax.eval_shape(make), (), ())[0]
        with ThreadPoolExecutor(1) as threads:
            made = threads.submit(layout.init, make)
            mapped, batch = self._mapped(size), self._batches.peek(size)
            mapped.lower(state, self._frozen, batch, self._keys).compile()
            return made.result()

    def _mapped(self, size: int) -> Any:
        return self._one if size == 1 else self._several

    def _dispatch(self) -> None:
        size = self._size(self._done)
        self._profile.before(self._done, size)
        batch, indices = self._batches.take(size, then=self._size(self._done + size))
        mapped = self._mapped(size)
        if size not in self._checked:
            self._check_program(mapped, batch)
            self._checked.add(size)
        self._state, metrics = mapped(self._state, self._frozen, batch, self._keys)
        self._done += size
        self._buffer.add(Dispatch(self._done, metrics, indices))
        self._clock.alive()
        self._store.check()

    def _size(self, done: int) -> int:
        stage = self._stage
        return dispatch_size(
            done,
            num_steps=stage.num_steps,
            loop_config=self._config,
            also=stage.average_steps,
        )

    def _check_program(self, mapped: Any, batch: PyTree) -> None:
        """Raise `InputError` if the processes would run different programs."""
        if self._layout.process_count == 1:
            return
        lowered = mapped.lower(self._state, self._frozen, batch, self._keys)
        text = lowered.as_text().encode()
        check_same({f"{self._stage.name} step": hashlib.sha256(text).hexdigest()})

    def _is_due(self, every: int) -> bool:
        return self._done % every == 0 or self._done == self._stage.num_steps

    def _write(self, *, stopping: bool) -> None:
        """Write images, averages and the state, as far as they are due.

        The state comes last: a run that is killed in between writes the others again.
        """
        draw_due = self._is_due(self._config.log.images_every)
        averages_due = self._done in self._stage.average_steps
        save_due = stopping or self._is_due(self._config.checkpoint.every)
        if not (draw_due or averages_due or save_due):
            return
        self._buffer.check()
        with self._buffer.paused():
            if draw_due:
                self._draw()
            if averages_due:
                self._write_averages()
            if save_due:
                self._save()

    def _draw(self) -> None:
        ema = self._layout.local(self._state.ema)

        def draw() -> None:
            if self._stage.draw is not None:
                with naming(self._config.workdir / self._stage.name):
                    self._stage.draw(ema, self._done)
            plot_losses(self._log.path, self._config.workdir / PLOT_FILE)

        first_alone(draw)

    def _write_averages(self) -> None:
        averages = self._layout.local(self._state.averages)
        write = self._stage.write_averages
        if write is not None:
            first_alone(lambda: write(averages, self._done))

    def _score(self) -> None:
        with self._buffer.paused():
            self._curve.add(self._layout.local(self._state.ema), self._done)

    def _save(self) -> None:
        tree = checkpoint_tree(
            self._layout.saved(self._state), self._root_key, self._extra
        )
        beside = {name: jax.device_get(tree[name]) for name in ("root_key", "extra")}
        notes = {
            **self._notes,
            "data": self._batches.position(),
            "seconds": self._seconds(),
            "skipped": self._buffer.skipped,
        }
        if (record := read_record(self._config.workdir)) is not None:
            notes["record"] = record
        self._digest = self._store.save(self._done, {**tree, **beside}, notes)

    def _seconds(self) -> float:
        return self._before + time.perf_counter() - self._started
