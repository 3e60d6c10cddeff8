"""A run and its folder: train what is not finished, seal it, load it again."""

import contextlib
import fcntl
import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ldm_jax import config as config_lib
from ldm_jax.build import (
    autoencoder_stage,
    build_networks,
    check_batches,
    diffusion_stage,
    measure_latent_scale,
    open_iterator,
    shape_of,
)
from ldm_jax.config import CONFIG_FILE, Config
from ldm_jax.generate import Networks, SampleParams
from ldm_jax.rng import root_key
from ldm_jax.training.checkpoint import Checkpoint, CheckpointStore, write_json
from ldm_jax.training.diffusion_step import FirstStage
from ldm_jax.training.loop import (
    CHECKPOINTS,
    Finished,
    Stage,
    Watch,
    run_stage,
    stage_target,
)
from ldm_jax.training.parallel import PmapLayout
from ldm_jax.types import InputError, PyTree

STAGE_NAMES = ("autoencoder", "diffusion")
FINAL_FILE = "final.json"
SCALE_FILE = "latent_scale.json"
LOCK_FILE = ".lock"


class Outcome(NamedTuple):
    """How a run ended.

    Attributes:
      final: The content of `final.json`.
      trained: False if nothing was left to do.
    """

    final: dict[str, Any]
    trained: bool


def train(config: Config, workdir: Path) -> Outcome:
    """Run the stages of a run that are not finished, and write `final.json`.

    Args:
      config: Of the run; must equal the one the folder was made with.
      workdir: Its folder; made if it is not there.

    Returns:
      How it ended.

    Raises:
      InputError: If the folder belongs to another config or another process, a batch
        does not divide by the devices, or the data cannot be read.
      RunError: If a loss is not finite, or no checkpoint is intact.
      OSError: If something cannot be written.
    """
    layout = PmapLayout()
    check_batches(config, layout)
    with open_workdir(config, workdir):
        final_path = workdir / FINAL_FILE
        if final_path.exists():
            return Outcome(json.loads(final_path.read_text()), trained=False)
        networks = build_networks(config)
        run = functools.partial(_run, config=config, workdir=workdir, layout=layout)
        first = run(autoencoder_stage(config, networks, workdir))
        params = first.state.ema
        scale = _latent_scale(config, networks, params, layout, workdir)
        first_stage = FirstStage(params, scale)
        second = run(diffusion_stage(config, networks, first_stage, workdir))
        finished = {"autoencoder": first, "diffusion": second}
        final = {
            "digest": run_digest({k: v.digest for k, v in finished.items()}),
            "digest_by_stage": {k: v.digest for k, v in finished.items()},
            "seconds_by_stage": {k: round(v.seconds, 1) for k, v in finished.items()},
            "latent_scale": float(scale),
            "config_digest": config_lib.digest(config),
        }
        write_json(final_path, final)
        return Outcome(final, trained=True)


class Run(NamedTuple):
    """A trained run, ready to sample.

    Attributes:
      config: The config that made it.
      networks: Built from it.
      params: Averaged parameters of both stages, and the latent scale.
      digest: Of the state the parameters were taken from; that of `final.json` once
        the run is finished.
      step: Diffusion step they were taken at.
    """

    config: Config
    networks: Networks
    params: SampleParams
    digest: str
    step: int


def load_run(workdir: str | Path) -> Run:
    """Load the newest checkpoint of a run for sampling.

    Args:
      workdir: The folder that was given to `train.py`.

    Returns:
      The run.

    Raises:
      InputError: If the folder is not a run or has no finished checkpoint.
      RunError: If no checkpoint is intact.
    """
    workdir = Path(workdir)
    config = config_lib.read_config(workdir)
    networks = build_networks(config)
    first_stage = autoencoder_stage(config, networks, workdir)
    first = _load_stage(first_stage, workdir, config)
    scale = shape_of((), jnp.float32)
    frozen = FirstStage(first.tree["state"].ema, scale)
    second_stage = diffusion_stage(config, networks, frozen, workdir)
    second = _load_stage(second_stage, workdir, config)
    params = SampleParams(
        autoencoder=frozen.params,
        unet=second.tree["state"].ema,
        latent_scale=second.tree["extra"]["latent_scale"],
    )
    digest = run_digest({"autoencoder": first.digest, "diffusion": second.digest})
    return Run(config, networks, jax.device_put(params), digest, second.step)


def run_digest(digest_by_stage: dict[str, str]) -> str:
    """Join the digests of both stages into one sha256."""
    text = "".join(f"{name} {digest_by_stage[name]}\n" for name in STAGE_NAMES)
    return hashlib.sha256(text.encode()).hexdigest()


def _load_stage(stage: Stage, workdir: Path, config: Config) -> Checkpoint:
    directory = workdir / stage.name / CHECKPOINTS
    found = None
    if directory.is_dir():
        store = CheckpointStore(directory, keep=config.checkpoint.keep, read_only=True)
        found = store.restore(stage_target(stage, root_key(config.seed)))
        store.close()
    if found is None:
        raise InputError(
            f"--workdir: {workdir} has no finished checkpoint of the {stage.name} "
            "stage; run train.py with the same --workdir first"
        )
    return found


@contextlib.contextmanager
def open_workdir(config: Config, workdir: Path) -> Iterator[None]:
    """Take a run's folder for this process alone, and write or check its config.

    Args:
      config: Of the run.
      workdir: Its folder; made if it is not there.

    Raises:
      InputError: If it was made with another config, holds something else, or
        another process is training in it.
      OSError: If it cannot be written.
    """
    path = workdir / CONFIG_FILE
    if path.exists():
        theirs = config_lib.from_json(path.read_text())
        if fields := config_lib.differences(theirs, config):
            raise InputError(
                f"--workdir: {workdir} was made with a different config: "
                f"{', '.join(fields)}; try another --workdir or the same values"
            )
    elif workdir.exists() and not workdir.is_dir():
        raise InputError(f"--workdir: {workdir} is a file, wanted a folder")
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / LOCK_FILE).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"--workdir: another process is training in {workdir}; wait for it or "
                "try another --workdir"
            ) from None
        if not path.exists():
            part = path.with_name(path.name + ".part")
            part.write_text(config_lib.to_json(config))
            part.replace(path)
        yield


def _run(
    stage: Stage, *, config: Config, workdir: Path, layout: PmapLayout
) -> Finished:
    return run_stage(
        stage,
        watch=Watch(workdir, config.checkpoint, config.log),
        layout=layout,
        iterator=open_iterator(config, batch_size=stage.batch_size, layout=layout),
        root_key=root_key(config.seed),
        notes={"config": json.loads(config_lib.to_json(config))},
    )


def _latent_scale(
    config: Config,
    networks: Networks,
    params: PyTree,
    layout: PmapLayout,
    workdir: Path,
) -> Float[Array, ""]:
    """Measure the latent scale once; a killed run finds it in the folder."""
    path = workdir / "autoencoder" / SCALE_FILE
    if path.exists():
        return jnp.asarray(json.loads(path.read_text())["latent_scale"], jnp.float32)
    scale = measure_latent_scale(config, networks, jax.device_put(params), layout)
    write_json(path, {"latent_scale": float(scale)})
    return scale
