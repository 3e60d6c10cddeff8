"""Checkpoints of a stage: written atomically, verified when they are read."""

import asyncio
import contextlib
import gc
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import jax
import numpy as np
import orbax.checkpoint as ocp

from ldm_jax.files import json_digest, read_json, sync_folder
from ldm_jax.parallel.multihost import first_alone, gather_texts, together
from ldm_jax.training.digest import join_digests, leaf_digests, tree_digest
from ldm_jax.training.orbax_errors import OrbaxErrors, reason_of
from ldm_jax.training.state import TrainState
from ldm_jax.types import InputError, PyTree, RunError

T = TypeVar("T")

CHECKPOINTS = "checkpoints"
"""Folder of a stage's checkpoints, in its own folder."""
NOTES = "notes/metadata"
"""File of the notes, in the folder of a checkpoint."""
SECONDS_BETWEEN_CHECKS = 0.005


class Checkpoint(NamedTuple):
    """A restored checkpoint."""

    step: int
    """The step it was saved at."""
    tree: PyTree
    """The arrays, in the structure they were saved in."""
    notes: dict[str, Any]
    """The JSON that was saved with them."""
    digest: str
    """sha256 over every leaf."""


Check = Callable[[Checkpoint], str]
"""Returns why a checkpoint is not one of a run, or ""."""


class SyncedPath(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """A checkpoint that is on the disk before it is valid, and before others go.

    Orbax leaves that to the system: a loss of power would leave names without content.
    """

    async def finalize(self) -> None:
        """Write the files to the disk, rename their folder, and write its name."""
        await asyncio.to_thread(sync_tree, Path(self.get()))
        await super().finalize()
        final = Path(self.get_final())
        await asyncio.to_thread(sync_tree, final)  # notes of Orbax on the renaming
        await asyncio.to_thread(sync_folder, final.parent)


class _AllReads:
    """Ends the other reads of arrays before the error of one leaves the event loop.

    Orbax closes the loop; tensorstore prints a traceback for a read that ends later.
    """

    async def deserialize(self, infos: Any, args: Any = None) -> Any:
        """Read arrays, as the handler that this is mixed into."""
        before, reader = asyncio.all_tasks(), cast(Any, super())
        try:
            return await reader.deserialize(infos, args)
        except Exception:
            while others := asyncio.all_tasks() - before:
                await asyncio.gather(*others, return_exceptions=True)
            raise


class _NumpyReads(_AllReads, ocp.type_handlers.NumpyHandler):
    """Reads arrays to the host."""


class _DeviceReads(_AllReads, ocp.type_handlers.ArrayHandler):
    """Reads arrays to devices."""


class CheckpointStore:
    """The checkpoints of one stage, in one folder.

    A checkpoint is valid once it is complete (`SyncedPath` renames its folder) and as
    long as its leaves and notes have the digests that were saved with them: Orbax alone
    restores flipped bits without an error. With several processes, all of them call
    every method.
    """

    def __init__(self, directory: Path, *, keep: int, read_only: bool = False) -> None:
        """Open a folder; it is created unless `read_only`.

        Args:
          directory: Holds nothing but these checkpoints.
          keep: How many steps to keep.

        Raises:
          InputError: If it is a file.
        """
        self.directory = directory.absolute()
        if self.directory.exists() and not self.directory.is_dir():
            raise InputError(f"{directory}: a file, wanted a folder of checkpoints")
        self._read_only = read_only
        self._saving: int | None = None
        self._failed = False
        self._errors = OrbaxErrors(self.directory)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            create=not read_only,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
            temporary_path_class=SyncedPath,
            # In the background, a folder that cannot be created blocks the threads
            # that write into it, and so the process, for twenty minutes.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        self._manager = ocp.CheckpointManager(
            self.directory, options=options, item_names=("state", "notes")
        )
        # Orbax would poll JAX's preemption sync point, which `StopSignal` polls too,
        # with its own steps: the processes could miss the step at which to stop.
        self._manager.reached_preemption = lambda step: False
        # The manager's own reader waits for all processes, for ever if one of them
        # cannot read its files.
        this = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(
            primary_host=this,
            active_processes={this},
            barrier_sync_key_prefix=f"process {this}",
        )
        reads = ocp.type_handlers.create_type_handler_registry(
            (np.ndarray, _NumpyReads()), (jax.Array, _DeviceReads())
        )
        state = ocp.PyTreeCheckpointHandler(
            type_handler_registry=reads, multiprocessing_options=alone
        )
        self._reader = ocp.Checkpointer(
            ocp.CompositeCheckpointHandler(state=state), multiprocessing_options=alone
        )

    def save(self, step: int, tree: PyTree, notes: dict[str, Any]) -> str:
        """Write a checkpoint in the background.

        Args:
          tree: Arrays over all processes.
          notes: JSON-compatible values.

        Returns:
          The digest of the tree.

        Raises:
          RunError: If the previous checkpoint could not be written, or a leaf is not
            finite.
        """
        self.wait()
        leaves = leaf_digests(tree)
        for path, leaf in leaves.items():
            if not leaf.finite:
                raise RunError(
                    f"step {step}: {path} is not finite; nothing was written for this "
                    "step; try a lower learning rate"
                )
        digest = join_digests(tree, leaves)
        notes = {
            **notes,
            "step": step,
            "digest": digest,
            "leaves": {
                path: [str(leaf.dtype), list(leaf.shape), leaves[path].digest]
                for path, leaf in _leaves(tree)
            },
        }
        notes["sha256"] = json_digest(notes)
        self._saving, self._errors.error = step, None
        with self._reported():
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
        """Raise the error of a save in the background as soon as it is known.

        Costs nothing while nothing is being written.

        Raises:
          RunError: If a process could not write the checkpoint.
        """
        if self._saving is None:
            return
        error = self._errors.error
        ended = not self._manager.is_saving_in_progress()
        # Saves end at different times on the processes, which stop at the same step.
        states = set(gather_texts("failed" if error else "ended" if ended else ""))
        if "failed" in states:
            self._failed = True
            with together(), self._reported():
                if error:
                    raise error
        if states == {"ended"}:
            with together():
                self._join()

    def wait(self) -> None:
        """Wait until the last save has ended.

        Raises:
          RunError: If a process could not write the checkpoint.
        """
        while self._saving is not None:
            self.check()
            time.sleep(SECONDS_BETWEEN_CHECKS)

    def is_empty(self) -> bool:
        """Return whether there is nothing to restore."""
        return self._saving is None and not self.steps()

    def steps(self) -> list[int]:
        """Return the steps of the checkpoints that are there, the newest first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def restore(
        self,
        target: PyTree,
        *,
        step: int | None = None,
        shardings: PyTree = None,
        check: Check | None = None,
    ) -> Checkpoint | None:
        """Restore the newest intact checkpoint, or that of one step.

        A damaged checkpoint is moved into `damaged/` (unless read-only), and the one
        before it is tried.

        Args:
          target: Shapes and dtypes, as `jax.eval_shape` gives them.
          step: None for the newest.
          shardings: Of the restored arrays; None restores to the host.
          check: Says why a checkpoint is not one of this run; such a one counts as
            damaged. What it raises is raised on all processes.

        Returns:
          The checkpoint, or None if none was ever completed.

        Raises:
          InputError: If there is no checkpoint of that step, or it has other leaves.
          RunError: If there are checkpoints and none is intact.
        """
        self.wait()
        steps = self.steps()
        if step is not None and step not in steps:
            raise InputError(
                f"{self.directory}: no checkpoint of step {step}, wanted one of "
                f"{', '.join(map(str, steps)) or 'those to come'}"
            )
        steps = steps if step is None else [step]
        reasons: list[str] = []
        for at in steps:
            found, reason = self._intact(at, target, shardings, check)
            if found is None:
                reasons.append(f"step {at}: {reason}")
                continue
            for reason in reasons:
                logging.getLogger(__name__).warning("damaged checkpoint: %s", reason)
            self._set_aside([bad for bad in steps if bad > at])
            return found
        if step is not None and reasons:
            raise RunError(f"{self.directory}: damaged checkpoint: {reasons[0]}")
        if reasons:
            raise RunError(
                f"{self.directory}: no checkpoint is intact ({'; '.join(reasons)}); "
                "try a copy, or start again in another --workdir"
            )
        return None

    def close(self) -> None:
        """Wait for this process' part of the last save, and close the store.

        Raises:
          RunError: If it could not be written and no method has raised that yet.
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
            self._errors.close()
        elif jax.process_count() == 1:
            # Orbax may raise the reported error again. With several processes it may
            # wait for the others for twenty minutes.
            with contextlib.suppress(Exception):
                self._manager.close()
        # Of a failed save asyncio logs the other writes when they are collected, at the
        # end of the process at the latest: they stay filtered.

    def _join(self) -> None:
        if self._saving is None:
            return
        with self._reported():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        self._saving = None

    def _probe(self, step: int) -> None:
        """Fail on one process, where Orbax would let the other processes wait."""
        probe = self.directory / f"{step}.probe"
        probe.mkdir(exist_ok=True)
        probe.rmdir()

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        """Raise the error of a writing thread as a `RunError` of one line."""
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
        self, step: int, target: PyTree, shardings: PyTree, check: Check | None
    ) -> tuple[Checkpoint | None, str]:
        """Read a step; if that fails on any process, all return the reason.

        They agree after each part, since the next one may be a collective.
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
        found = Checkpoint(step, tree, notes, digest)
        with together():
            foreign = check(found) if check else ""
        reasons = [text for text in gather_texts(foreign) if text]
        return (None, reasons[0]) if reasons else (found, "")

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
        check_regular(self._folder(step))
        notes = read_json(self._folder(step) / NOTES, remedy="try a copy")
        saved = notes.pop("sha256", None)  # None in early versions
        if saved is not None and saved != json_digest(notes):
            raise ValueError("its notes are not what was saved")
        if notes.get("step", step) != step:  # none in early versions
            raise ValueError(f"it was saved as step {notes['step']}")
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


def newest_notes(directory: Path) -> Iterator[dict[str, Any]]:
    """Read the intact notes of a folder of checkpoints, the newest first."""
    steps = [path for path in directory.glob("*") if path.name.isdecimal()]
    for step in sorted(steps, key=lambda path: int(path.name), reverse=True):
        with contextlib.suppress(InputError):
            notes = read_json(step / NOTES)
            if notes.pop("sha256", None) == json_digest(notes):
                yield notes


def check_regular(folder: Path) -> None:
    """Raise `ValueError` if a folder holds anything but regular files and folders.

    A pipe would be waited for, and a device such as /dev/zero read without end.
    """
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place, name)
            if not path.is_file():
                raise ValueError(f"{path.relative_to(folder)} is no regular file")


def sync_tree(folder: Path) -> None:
    """Write a folder to the disk, with all in it."""
    for place, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(place, name), "rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(place))


def verified_digest(tree: PyTree, notes: dict[str, Any]) -> str:
    """Return the digest of restored arrays, after a check of every leaf.

    Args:
      notes: With the digests of the saved leaves; early versions saved one sha256 over
        all of them.

    Raises:
      ValueError: If a leaf has another digest.
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
    """Call `do`; if it fails on one process, return None and the reason on all."""
    found, reason = None, ""
    try:
        found = do()
    except Exception as error:
        reason = reason_of(error)
    if reason:
        gc.collect()  # now asyncio logs reads that failed too, while that is filtered
    details = [text for text in gather_texts(reason) if text]
    return (None, details[0]) if details else (found, "")


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
