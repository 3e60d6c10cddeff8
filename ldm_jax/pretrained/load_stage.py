"""The checkpoint of a stage, read without changing the run."""

import contextlib
from pathlib import Path

import jax.numpy as jnp

from ldm_jax.build import shape_of
from ldm_jax.config import Config
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.rng import root_key
from ldm_jax.training.checkpoint import CHECKPOINTS, Checkpoint, CheckpointStore
from ldm_jax.training.diffusion_stage import diffusion_stage
from ldm_jax.training.diffusion_step import FrozenParams
from ldm_jax.training.loop import Stage, stage_target
from ldm_jax.training.workdir import check_stage, is_finished
from ldm_jax.types import InputError, RunError


def load_stage(stage: Stage, workdir: Path, *, step: int | None = None) -> Checkpoint:
    """Load the newest intact checkpoint of a stage, or that of one step.

    Of a finished stage that is its last one: what follows was made of no other.

    Raises:
      InputError: If it has none, or none of that step.
      RunError: If none is intact, or not the last one of a finished stage.
    """
    directory, found = workdir / stage.name / CHECKPOINTS, None
    last = is_finished(workdir, stage.name, num_steps=stage.num_steps)
    if last and not any(directory.glob("[0-9]*")):
        raise InputError(
            f"{directory}: got no checkpoints, and the {stage.name} stage is finished; "
            "try a copy of the run, or another --workdir"
        )
    if directory.is_dir():
        store = CheckpointStore(directory, keep=1, read_only=True)
        with contextlib.closing(store):
            if step is None and last:
                found = _last(store, stage, workdir)
            else:
                target = stage_target(stage, root_key(0))  # shapes alone matter
                found = store.restore(target, step=step, check=stage.check)
    if found is None:
        raise InputError(
            f"--workdir: {workdir} has no finished checkpoint of the {stage.name} "
            "stage; run ldm train with the same --workdir first"
        )
    return found


def _last(store: CheckpointStore, stage: Stage, workdir: Path) -> Checkpoint | None:
    """Load the last checkpoint of a finished stage.

    Raises:
      RunError: If it is missing or damaged.
    """
    last = stage.num_steps
    try:
        if last not in (steps := store.steps()):
            there = ", ".join(map(str, steps))
            raise RunError(f"{store.directory}: got the checkpoints {there}")
        target = stage_target(stage, root_key(0))
        found = store.restore(target, step=last, check=stage.check)
        if found is not None:
            check_stage(workdir, stage.name, found.digest)
    except RunError as error:
        raise RunError(
            f"{error}; wanted the last one of the finished {stage.name} stage, of step "
            f"{last}, and no earlier one; give the ldm train command of that run "
            "again: it makes it anew from the one before it"
        ) from None
    return found


def load_second_stage(
    config: Config, model: LatentDiffusion, workdir: Path, *, step: int | None = None
) -> Checkpoint:
    """Load a checkpoint of the diffusion stage, as `load_stage` does.

    Raises:
      InputError: If it has none, or none of that step.
      RunError: If none is intact, or not the last one of a finished stage.
    """
    shapes = FrozenParams({}, shape_of((), jnp.float32), {})
    return load_stage(
        diffusion_stage(config, model, shapes, workdir), workdir, step=step
    )
