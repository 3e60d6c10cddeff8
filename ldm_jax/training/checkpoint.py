"""Checkpoints: the whole state of a stage, whole or not at all, and proven intact."""

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp

from ldm_jax.parallel.multihost import first_alone, gather_texts, together
from ldm_jax.training.asyncio_errors import AsyncioErrors, quieten, reason_of
from ldm_jax.training.digest import join_digests, leaf_digests, tree_digest
from ldm_jax.training.state import TrainState
from ldm_jax.types import InputError, PyTree, RunError

T = TypeVar("T")

SECONDS_BETWEEN_CHECKS = 0.005


class Checkpoint(NamedTuple):
    """What was restored."""

    step: int
    """The step it was saved at."""
    tree: PyTree
    """The arrays, in the structure they were saved in."""
    notes: dict[str, Any]
    """The JSON saved beside them."""
    digest: str
    """sha256 over every leaf."""


class CheckpointStore:
    """The checkpoints of one stage in one folder, of one process or of several.

    A step counts once its writing is complete (Orbax renames a finished folder into
    place) and as long as its leaves and its notes have the digests that were noted
    when it was saved: Orbax alone restores flipped bits without a word. Where there
    are several processes, all of them call every method.
    """

    def __init__(self, directory: Path, *, keep: int, read_only: bool = False) -> None:
        """Open a folder; it is made unless `read_only`.

        Args:
          directory: Of this stage alone.
          keep: How many steps to keep.
          read_only: Only restore.

        Raises:
          InputError: If it is a file.
        """
        self.directory = directory.absolute()
        if self.directory.exists() and not self.directory.is_dir():
            raise InputError(f"{directory}: a file, wanted a folder of checkpoints")
        self._read_only = read_only
        self._saving: int | None = None
        self._failed = False
        self._asyncio_errors = AsyncioErrors(self.directory)
        quieten(self._asyncio_errors)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            create=not read_only,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
            # Made in the background, one that cannot be made keeps the threads that
            # want to write into it, and so the process, for twenty minutes.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        self._manager = ocp.CheckpointManager(
            self.directory, options=options, item_names=("state", "notes")
        )
        # It would ask JAX's counter of questions, which `hosts.StopSignal` asks too, by
        # its steps: the step to stop at, which all agree on, could be passed unseen.
        self._manager.reached_preemption = lambda step: False
        # The manager's own reader waits for all processes at its end, for ever where
        # one of them found its files torn.
        this = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(
            primary_host=this,
            active_processes={this},
            barrier_sync_key_prefix=f"process {this}",
        )
        self._reader = ocp.Checkpointer(
            ocp.CompositeCheckpointHandler(), multiprocessing_options=alone
        )

    def save(self, step: int, tree: PyTree, notes: dict[str, Any]) -> str:
        """Write a checkpoint in the background; an older failure is raised here.

        Args:
          tree: Arrays over all processes.
          notes: JSON-compatible values.

        Returns:
          The digest of the tree.

        Raises:
          RunError: If the step before could not be written, or a leaf is not finite:
            such a state is never written.
        """
        self.wait()
        leaves = leaf_digests(tree)
        for path, leaf in leaves.items():
            if not leaf.finite:
                raise RunError(
                    f"step {step}: {path} is not finite; nothing "
                    "was written for this step; try a lower learning rate"
                )
        digest = join_digests(tree, leaves)
        notes = {
            **notes,
            "digest": digest,
            "leaves": {
                path: [str(leaf.dtype), list(leaf.shape), leaves[path].digest]
                for path, leaf in _leaves(tree)
            },
        }
        notes["sha256"] = notes_digest(notes)
        self._saving, self._asyncio_errors.error = step, None
        with self._details():
            first_alone(lambda: self._probe(step))
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(_stored(tree)),
                    notes=ocp.args.JsonSave(notes),
                ),
            )
        return digest

    def check(self) -> None:
        """Raise what went wrong with a save in the background, as soon as it is known.

        It costs nothing while nothing is being written.

        Raises:
          RunError: If it could not be written, here or on another process.
        """
        if self._saving is None:
            return
        heard, ended = (
            self._asyncio_errors.error,
            not self._manager.is_saving_in_progress(),
        )
        # It ends at a moment of its own on each process; they stop at the same step.
        states = set(gather_texts("failed" if heard else "ended" if ended else ""))
        if "failed" in states:
            self._failed = True
            with together(), self._details():
                if heard:
                    raise heard
        if states == {"ended"}:
            with together():
                self._join()

    def wait(self) -> None:
        """Wait for the last save.

        Raises:
          RunError: If it could not be written, here or on another process.
        """
        while self._saving is not None:
            self.check()
            time.sleep(SECONDS_BETWEEN_CHECKS)

    def is_empty(self) -> bool:
        """Say whether there is nothing to restore."""
        return self._saving is None and not self._manager.all_steps()

    def restore(
        self, target: PyTree, *, step: int | None = None, shardings: PyTree = None
    ) -> Checkpoint | None:
        """Restore the newest intact checkpoint, or that of one step.

        A damaged one is moved into `damaged/` (unless read-only), and the one before
        it is tried.

        Args:
          target: Shapes and dtypes, as `jax.eval_shape` gives them.
          step: Which one; None for the newest.
          shardings: Where each array is to lie; None reads to the host.

        Returns:
          The checkpoint, or None if none was ever completed.

        Raises:
          InputError: If there is none of that step, or it is one of another model.
          RunError: If there are checkpoints and none is intact.
        """
        self.wait()  # for a step that is being written
        steps = sorted(self._manager.all_steps(), reverse=True)
        if step is not None and step not in steps:
            raise InputError(
                f"{self.directory}: no checkpoint of step {step}, wanted one of "
                f"{', '.join(map(str, steps)) or 'those to come'}"
            )
        steps = steps if step is None else [step]
        reasons: list[str] = []
        for at in steps:
            found, reason = self._intact(at, target, shardings)
            if found is None:
                reasons.append(f"step {at}: {reason}")
                continue
            for reason in reasons:
                logging.getLogger(__name__).warning("damaged checkpoint: %s", reason)
            self._set_aside([bad for bad in steps if bad > at])
            return found
        if reasons:
            raise RunError(
                f"{self.directory}: no checkpoint is intact ({'; '.join(reasons)}); "
                "start again in another --workdir"
            )
        return None

    def close(self) -> None:
        """Wait for this process' part of the last save and raise what went wrong.

        Raises:
          RunError: If it could not be written, and nobody was told yet.
        """
        try:
            if not self._failed:
                self._join()
        finally:
            self._close()

    def _close(self) -> None:
        self._reader.close()
        if not self._failed:
            self._manager.close()
            logging.getLogger("absl").removeFilter(self._asyncio_errors)
        elif jax.process_count() == 1:
            # It has been told of, and Orbax may raise more of it. Where there are
            # others it may wait for them for twenty minutes.
            with contextlib.suppress(Exception):
                self._manager.close()

    def _join(self) -> None:
        if self._saving is None:
            return
        with self._details():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        self._saving = None

    def _probe(self, step: int) -> None:
        """Fail alone, where Orbax would while the other processes wait for this one."""
        probe = self.directory / f"{step}.probe"
        probe.mkdir(exist_ok=True)
        probe.rmdir()

    @contextlib.contextmanager
    def _details(self) -> Iterator[None]:
        """Turn what a writing thread raised into one line."""
        try:
            yield
        except Exception as error:
            failed, self._saving, self._failed = self._saving, None, True
            steps = [at for at in self._manager.all_steps() if at != failed]
            left = (
                f"that of step {max(steps)} is kept, and the same command goes on from "
                "there once it can be written"
                if steps
                else "there is none; try again once it can be written"
            )
            raise RunError(
                f"{self.directory}: the checkpoint of step {failed} could not be "
                f"written ({reason_of(error)}); of those before it, {left}"
            ) from error

    def _intact(
        self, step: int, target: PyTree, shardings: PyTree
    ) -> tuple[Checkpoint | None, str]:
        """Read a step; where that fails on any process, say to all of them why.

        They agree after each part, as the next one may be a collective.
        """
        notes, reason = _agreed(lambda: self._read_notes(step))
        if notes is None:
            return None, reason
        self._check_model(step, target, notes)
        tree, reason = _agreed(lambda: self._read(step, target, shardings))
        if tree is None:
            return None, reason
        digest, reason = _agreed(lambda: verified_digest(tree, notes))
        if digest is None:
            return None, reason
        return Checkpoint(step, tree, notes, digest), ""

    def _check_model(self, step: int, target: PyTree, notes: dict[str, Any]) -> None:
        """Raise `InputError` if a checkpoint has other leaves than the target."""
        if "leaves" not in notes:
            return
        there = {path: tuple(shape) for path, (_, shape, _) in notes["leaves"].items()}
        here = {path: tuple(leaf.shape) for path, leaf in _leaves(target)}
        for path in [*here, *(there.keys() - here.keys())]:
            if there.get(path) != here.get(path):
                raise InputError(
                    f"{self.directory}: the checkpoint of step {step} is of another "
                    f"model: {path} is {there.get(path, 'missing')} there, "
                    f"{here.get(path, 'missing')} here; try the config it was made with"
                )

    def _read_notes(self, step: int) -> dict[str, Any]:
        items = ocp.args.Composite(notes=ocp.args.JsonRestore())
        notes = dict(self._reader.restore(self._folder(step), args=items)["notes"])
        saved = notes.pop("sha256", None)  # an early version noted none
        if saved is not None and saved != notes_digest(notes):
            raise ValueError("its notes are not what was saved")
        return notes

    def _read(self, step: int, target: PyTree, shardings: PyTree) -> PyTree:
        if shardings is None:
            to_host = ocp.RestoreArgs(restore_type=np.ndarray)
            restore_args = jax.tree.map(lambda _: to_host, target)
        else:
            restore_args = jax.tree.map(_sharded, target, shardings)
        items = ocp.args.Composite(
            state=ocp.args.PyTreeRestore(
                item=_stored(target), restore_args=_stored(restore_args)
            )
        )
        found = self._reader.restore(self._folder(step), args=items)["state"]
        return _restored(target, found)

    def _folder(self, step: int) -> Path:
        return self.directory / str(step)

    def _set_aside(self, steps: list[int]) -> None:
        if not steps or self._read_only:
            return
        first_alone(lambda: self._move(steps))
        self._manager.reload()

    def _move(self, steps: list[int]) -> None:
        damaged = self.directory / "damaged"
        damaged.mkdir(exist_ok=True)
        for step in steps:
            target = damaged / f"{step}-{time.time_ns()}"
            os.rename(self._folder(step), target)


def verified_digest(tree: PyTree, notes: dict[str, Any]) -> str:
    """Return the digest of what was restored.

    Args:
      tree: The arrays.
      notes: With the digests of when it was saved; an early version noted one sha256
        over everything.

    Raises:
      ValueError: If a leaf has another digest now: which, and how many.
    """
    if "leaves" not in notes:
        digest = tree_digest(tree)
        if digest != notes["digest"]:
            raise ValueError(
                f"its arrays have the digest {digest[:12]}, saved as "
                f"{notes['digest'][:12]}"
            )
        return digest
    leaves = leaf_digests(tree)
    saved = {path: digest for path, (_, _, digest) in notes["leaves"].items()}
    bad = [path for path, leaf in leaves.items() if leaf.digest != saved.get(path)]
    if bad:
        others = f", nor are {len(bad) - 1} other leaves" if len(bad) > 1 else ""
        raise ValueError(f"{bad[0]} is not what was saved{others}")
    return join_digests(tree, leaves)


def _agreed(do: Callable[[], T]) -> tuple[T | None, str]:
    """Do a part of a restore; None on all processes, and why, if it failed on one."""
    found, reason = None, ""
    try:
        found = do()
    except Exception as error:
        reason = reason_of(error)
    details = [text for text in gather_texts(reason) if text]
    return (None, details[0]) if details else (found, "")


def notes_digest(notes: dict[str, Any]) -> str:
    """Return the sha256 of notes, however their JSON is laid out."""
    return hashlib.sha256(json.dumps(notes, sort_keys=True).encode()).hexdigest()


def _sharded(leaf: Any, sharding: Any) -> ocp.ArrayRestoreArgs:
    return ocp.ArrayRestoreArgs(
        sharding=sharding, global_shape=leaf.shape, dtype=leaf.dtype
    )


def _stored(tree: PyTree) -> PyTree:
    """Leave absent parts out of every train state; Orbax would save each None."""

    def fields(part: Any) -> Any:
        if not _is_state(part):
            return part
        return {k: v for k, v in part._asdict().items() if v is not None}

    return jax.tree.map(fields, tree, is_leaf=_is_state)


def _restored(target: PyTree, stored: PyTree) -> PyTree:
    """Invert `_stored`."""

    def part(wanted: Any, found: Any) -> Any:
        return TrainState(**found) if _is_state(wanted) else found

    return jax.tree.map(part, target, stored, is_leaf=_is_state)


def _is_state(part: Any) -> bool:
    return isinstance(part, TrainState)


def _leaves(tree: PyTree) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in leaves]
