"""Checkpoints: the whole state of a stage, whole or not at all, and proven intact."""

import hashlib
import json
import logging
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from ldm_jax.types import InputError, PyTree, RunError


class Checkpoint(NamedTuple):
    """What was restored.

    Attributes:
      step: The step it was saved at.
      tree: The arrays, in the structure they were saved in.
      notes: The JSON saved beside them.
      digest: sha256 over every leaf.
    """

    step: int
    tree: PyTree
    notes: dict[str, Any]
    digest: str


def tree_digest(tree: PyTree) -> str:
    """Return the sha256 over path, dtype, shape and bytes of every leaf."""
    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.ascontiguousarray(jax.device_get(leaf))
        name = jax.tree_util.keystr(path)
        total.update(f"{name} {array.dtype} {array.shape}\n".encode())
        total.update(array.tobytes())
    return total.hexdigest()


class CheckpointStore:
    """The checkpoints of one stage in one folder.

    A step counts once its writing is complete (Orbax renames a finished folder into
    place) and as long as its leaves have the digest that was noted when it was saved:
    Orbax alone restores flipped bits without a word.
    """

    def __init__(self, directory: Path, *, keep: int, read_only: bool = False) -> None:
        """Open a folder; it is made unless `read_only`.

        Args:
          directory: Of this stage alone.
          keep: How many steps to keep.
          read_only: Only restore.
        """
        logging.getLogger("absl").setLevel(logging.ERROR)
        self.directory = directory.absolute()
        self._read_only = read_only
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            create=not read_only,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
        )
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=options,
            item_names=("state", "notes"),
        )

    def save(self, step: int, tree: PyTree, notes: dict[str, Any]) -> str:
        """Write a checkpoint in the background; an older failure is raised here.

        Args:
          step: Its name.
          tree: Arrays.
          notes: JSON-compatible values.

        Returns:
          The digest of the tree.

        Raises:
          RunError: If a leaf is not finite: such a state is never written.
        """
        self._manager.wait_until_finished()
        host = jax.device_get(tree)
        for path, leaf in jax.tree_util.tree_leaves_with_path(host):
            if np.issubdtype(leaf.dtype, np.floating) and not np.isfinite(leaf).all():
                raise RunError(
                    f"step {step}: {jax.tree_util.keystr(path)} is not finite; nothing "
                    "was written for this step; try a lower learning rate"
                )
        digest = tree_digest(host)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(host),
                notes=ocp.args.JsonSave({**notes, "digest": digest}),
            ),
        )
        return digest

    def restore(self, target: PyTree, *, step: int | None = None) -> Checkpoint | None:
        """Restore the newest intact checkpoint, or that of one step.

        A damaged one is moved into `damaged/` (unless read-only), and the one before
        it is tried.

        Args:
          target: Shapes and dtypes, as `jax.eval_shape` gives them.
          step: Which one; None for the newest.

        Returns:
          The checkpoint, or None if none was ever completed.

        Raises:
          InputError: If there is none of that step.
          RunError: If there are checkpoints and none is intact.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        if step is not None and step not in steps:
            raise InputError(
                f"{self.directory}: no checkpoint of step {step}, wanted one of "
                f"{', '.join(map(str, steps)) or 'those to come'}"
            )
        steps = steps if step is None else [step]
        reasons: list[str] = []
        for at in steps:
            try:
                found = self._read(at, target)
            except Exception as error:
                reasons.append(f"step {at}: {' '.join(str(error).split())[:200]}")
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
        """Wait for the last save and raise what went wrong with it."""
        self._manager.wait_until_finished()
        self._manager.close()

    def _read(self, step: int, target: PyTree) -> Checkpoint:
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(target), notes=ocp.args.JsonRestore()
            ),
        )
        tree, notes = restored["state"], restored["notes"]
        digest = tree_digest(tree)
        if digest != notes["digest"]:
            raise ValueError(
                f"its arrays have the digest {digest[:12]}, saved as "
                f"{notes['digest'][:12]}"
            )
        return Checkpoint(step, tree, notes, digest)

    def _set_aside(self, steps: list[int]) -> None:
        if not steps or self._read_only:
            return
        damaged = self.directory / "damaged"
        damaged.mkdir(exist_ok=True)
        for step in steps:
            target = damaged / f"{step}-{time.time_ns()}"
            os.rename(self.directory / str(step), target)
        self._manager.reload()


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all.

    Raises:
      OSError: If it cannot be written.
    """
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")
    os.replace(part, path)
