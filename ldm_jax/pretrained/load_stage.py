"""The checkpoint of a stage, read without changing the run."""

from pathlib import Path

from ldm_jax.rng import root_key
from ldm_jax.training.checkpoint import Checkpoint, CheckpointStore
from ldm_jax.training.loop import CHECKPOINTS, Stage, stage_target
from ldm_jax.types import InputError


def load_stage(stage: Stage, workdir: Path, *, step: int | None = None) -> Checkpoint:
    """Load the newest intact checkpoint of a stage, or that of one step.

    Raises:
      InputError: If it has none, or none of that step.
      RunError: If none is intact.
    """
    directory = workdir / stage.name / CHECKPOINTS
    found = None
    if directory.is_dir():
        store = CheckpointStore(directory, keep=1, read_only=True)
        target = stage_target(stage, root_key(0))  # shapes alone matter
        found = store.restore(target, step=step)
        store.close()
    if found is None:
        raise InputError(
            f"--workdir: {workdir} has no finished checkpoint of the {stage.name} "
            "stage; run ldm train with the same --workdir first"
        )
    return found
