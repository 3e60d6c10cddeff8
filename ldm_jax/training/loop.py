"""The loop: when to save, draw, step, log and stop. The same for every stage."""

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Key

from ldm_jax.config import CheckpointConfig, LogConfig, ParallelConfig
from ldm_jax.data.pipeline import BatchIterator
from ldm_jax.files import naming
from ldm_jax.parallel.layout import Layout
from ldm_jax.parallel.multihost import StopSignal, check_same, first_alone, is_first
from ldm_jax.training.checkpoint import Checkpoint, CheckpointStore
from ldm_jax.training.dispatch import several_steps, skip_nonfinite
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
from ldm_jax.types import Preempted, PyTree

CHECKPOINTS = "checkpoints"


class Stage(NamedTuple):
    """One stage of training, built and ready to run."""

    name: str
    """`autoencoder` or `diffusion`."""
    num_steps: int
    """Steps it takes in all."""
    batch_size: int
    """Global."""
    step: Callable[..., tuple[TrainState, Any]]
    """The pure step, all but state, frozen, batch and key bound."""
    init: Callable[[], TrainState]
    """Makes the state before the first step."""
    frozen: PyTree
    """Arrays the step reads and never changes, or None."""
    extra: dict[str, Any]
    """More arrays that belong into the checkpoint."""
    learning_rate: Callable[[int], Any]
    """Of a step, for the log."""
    draw: Callable[[Any, int], None] | None = None
    """Writes the pictures of averaged parameters at a step; None writes none."""
    measure: Measure | None = None
    """Scores them; None does not."""
    keep: Callable[[Any, int], None] | None = None
    """Writes the other averages that its state has, at a step."""
    kept_steps: tuple[int, ...] = ()
    """At which it does."""


class LoopConfig(NamedTuple):
    """When the loop writes, where, and what it bears."""

    workdir: Path
    """Folder of the run."""
    checkpoint: CheckpointConfig
    """When the state is written."""
    log: LogConfig
    """When numbers and pictures are."""
    parallel: ParallelConfig = ParallelConfig()
    """Steps a dispatch, and how long one may take."""
    max_skipped: int = 0
    """Steps that may be skipped for not being finite."""
    profile: tuple[int, int] | None = None
    """Steps between which a trace is written; None for none."""
    scores_every: int = 0
    """Steps between two scores of a stage that has a measure."""


class Finished(NamedTuple):
    """A stage that has made all its steps."""

    ema: PyTree
    """Its averaged parameters, whole on this process."""
    extra: dict[str, Any]
    """The arrays kept beside its state."""
    digest: str
    """sha256 over every leaf of what was saved."""
    seconds: float
    """Wall time, interruptions left out."""


def checkpoint_tree(
    state: TrainState, root_key: Key[Array, ""], extra: dict[str, Any]
) -> dict[str, Any]:
    """Collect what a checkpoint of a stage holds."""
    return {"state": state, "root_key": jax.random.key_data(root_key), "extra": extra}


def stage_target(stage: Stage, root_key: Key[Array, ""]) -> PyTree:
    """Return the shapes and dtypes of a stage's checkpoint."""
    return jax.eval_shape(lambda: checkpoint_tree(stage.init(), root_key, stage.extra))


def dispatch_size(
    done: int, *, num_steps: int, loop_config: LoopConfig, also: tuple[int, ...] = ()
) -> int:
    """Return how many steps to make at once after `done` of them.

    As many as are asked for, if nothing is due before they are made; else one. A
    function of `done` alone, so that a run that is stopped anywhere and goes on makes
    the dispatches that the unbroken run makes.

    Args:
      done: Steps made.
      loop_config: When something is due.
      also: Steps at which something else is, rising.
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
    """Run a stage to its end, from its newest checkpoint if there is one.

    Args:
      stage: What to run.
      loop_config: When and where to write.
      layout: Where the arrays live.
      iterator: The stage's batches, from the first; set to its place on a resume.
      notes: JSON saved with every checkpoint (the config).
      stop: Whether the machine is about to be taken away.

    Returns:
      The finished stage.

    Raises:
      Preempted: If it is, once the state is saved.
      RunError: If a loss is not finite, no checkpoint is intact, or one could not be
        written.
      OSError: If something cannot be written.
    """
    directory = loop_config.workdir / stage.name
    first_alone(lambda: directory.mkdir(exist_ok=True))
    store = CheckpointStore(directory / CHECKPOINTS, keep=loop_config.checkpoint.keep)
    log = MetricsLog(loop_config.workdir, writes=is_first())
    curve = ScoreCurve(
        stage, log, every=loop_config.scores_every, measure=stage.measure
    )
    clock = StallClock(loop_config.parallel.stall_timeout)
    profile = Profile(loop_config.workdir / "profile" / stage.name, loop_config.profile)
    try:
        found, shardings = None, None
        if not store.is_empty():
            target = stage_target(stage, root_key)
            shardings = layout.restore_shardings(target)
            found = store.restore(target, shardings=shardings)
        if found is not None and found.step == stage.num_steps:
            kept = found.tree["state"].ema, found.tree["extra"]
            ema, extra = kept if shardings is None else layout.local(kept)
            if curve.is_missing(found.step):
                curve.add(ema, found.step)
            return Finished(ema, extra, found.digest, found.notes["seconds"])
        done = found.step if found else 0
        first_alone(lambda: log.rewind(stage.name, done))
        trainer = Trainer(
            stage, loop_config, layout, root_key, notes, store, log, curve
        )
        trainer.begin(found, iterator)
        del found
        return trainer.run(stop, clock, profile)
    finally:
        profile.close()
        clock.close()
        log.close()
        iterator.close()
        store.close()


class Trainer:
    """One stage on its way: the only thing here that changes."""

    def __init__(
        self,
        stage: Stage,
        loop_config: LoopConfig,
        layout: Layout,
        root_key: Key[Array, ""],
        notes: dict[str, Any],
        store: CheckpointStore,
        log: MetricsLog,
        curve: ScoreCurve,
    ) -> None:
        """Keep what does not change."""
        self._stage, self._loop_config, self._layout = stage, loop_config, layout
        self._root_key, self._notes = root_key, notes
        self._store, self._log, self._curve = store, log, curve
        self._started = time.perf_counter()
        self._digest = ""
        self._checked: set[int] = set()

    def begin(self, found: Checkpoint | None, iterator: BatchIterator) -> None:
        """Lay out the state before the first step, or where a run stopped."""
        stage, layout = self._stage, self._layout
        self._done, self._before, skipped = 0, 0.0, 0
        if found is None:
            state, self._extra = layout.init(stage.init), stage.extra
        else:
            self._done, self._before = found.step, found.notes["seconds"]
            skipped = found.notes.get("skipped", 0)
            state, self._extra = layout.place(found.tree["state"]), found.tree["extra"]
            iterator.set_state(found.notes["data"])
        self._state = state
        self._keys = layout.place(self._root_key)
        self._frozen = layout.place(stage.frozen)
        self._batches = Prefetch(iterator, layout)
        self._buffer = MetricsBuffer(
            stage,
            self._log,
            layout,
            progress=self._done,
            skipped=skipped,
            max_skipped=self._loop_config.max_skipped,
        )
        step = stage.step
        if self._loop_config.max_skipped:
            step = skip_nonfinite(step)
        accumulate = self._loop_config.parallel.accumulate
        self._one = layout.map_step(step, accumulate=accumulate)
        self._several = layout.map_step(several_steps(step), accumulate=accumulate)

    def run(self, stop: StopSignal, clock: StallClock, profile: Profile) -> Finished:
        """Make what is left of the steps."""
        stage, loop_config = self._stage, self._loop_config
        with progress_bar(
            stage.name, num_steps=stage.num_steps, done=self._done, visible=is_first()
        ) as bar:
            if stop.agreed():
                raise Preempted(f"{stage.name} step {self._done}: nothing new to save")
            if self._curve.is_missing(self._done):
                self._score()
            while self._done < stage.num_steps:
                profile.before(self._done, self._size(self._done))
                before = self._done
                self._dispatch()
                clock.alive()
                self._store.check()
                done, stopping = self._done, stop.agreed()
                is_last = done == stage.num_steps
                if is_last or done % loop_config.log.every == 0:
                    bar.set_postfix_str(self._buffer.log(), refresh=False)
                bar.update(done - before)
                draw_due = is_last or done % loop_config.log.images_every == 0
                save_due = (
                    is_last or stopping or done % loop_config.checkpoint.every == 0
                )
                keep_due = done in stage.kept_steps
                if draw_due or save_due or keep_due:
                    self._buffer.check()
                    with self._buffer.paused():
                        # The state last: a kill in between makes the rest again.
                        if draw_due:
                            self._draw()
                        if keep_due:
                            self._keep()
                        if save_due:
                            self._save()
                if is_last or stopping:
                    self._store.wait()
                if stopping and not is_last:
                    raise Preempted(f"{stage.name} step {done} is saved")
                if self._curve.is_due(done):
                    self._score()
        ema = self._layout.local(self._state.ema)
        return Finished(ema, self._extra, self._digest, self._seconds())

    def _dispatch(self) -> None:
        size = self._size(self._done)
        batch, indices = self._batches.take(size, then=self._size(self._done + size))
        mapped = self._one if size == 1 else self._several
        if size not in self._checked:
            self._check_program(mapped, batch)
            self._checked.add(size)
        self._state, metrics = mapped(self._state, self._frozen, batch, self._keys)
        self._done += size
        self._buffer.add(Dispatch(self._done, metrics, indices))

    def _size(self, done: int) -> int:
        stage = self._stage
        return dispatch_size(
            done,
            num_steps=stage.num_steps,
            loop_config=self._loop_config,
            also=stage.kept_steps,
        )

    def _check_program(self, mapped: Any, batch: PyTree) -> None:
        """Stop if the processes would not run the same program."""
        if self._layout.process_count == 1:
            return
        lowered = mapped.lower(self._state, self._frozen, batch, self._keys)
        text = lowered.as_text().encode()
        check_same({f"{self._stage.name} step": hashlib.sha256(text).hexdigest()})

    def _draw(self) -> None:
        ema = self._layout.local(self._state.ema)

        def draw() -> None:
            if self._stage.draw is not None:
                with naming(self._loop_config.workdir / self._stage.name):
                    self._stage.draw(ema, self._done)
            plot_losses(self._log.path, self._loop_config.workdir / PLOT_FILE)

        first_alone(draw)

    def _keep(self) -> None:
        averages, keep = self._layout.local(self._state.averages), self._stage.keep
        if keep is not None:
            first_alone(lambda: keep(averages, self._done))

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
        self._digest = self._store.save(self._done, {**tree, **beside}, notes)

    def _seconds(self) -> float:
        return self._before + time.perf_counter() - self._started
