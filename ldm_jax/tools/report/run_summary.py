"""What there is to tell of a run, read from its folder. Imports no JAX."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from ldm_jax.config import Config, digest, read_config
from ldm_jax.training.metrics import METRICS_FILE, read_metrics
from ldm_jax.types import InputError

PICTURES = {"autoencoder": "reconstructions", "diffusion": "samples"}
"""What the pictures of each stage are called on disk."""
MOST_PICTURES = 6
"""Of a stage over its training."""
EVALUATION, STEPS = "evaluation", "steps"


class StageImage(NamedTuple):
    """A picture that training drew."""

    step: int
    """When."""
    path: Path
    """Where it is."""


class StageSummary(NamedTuple):
    """One stage of a run."""

    name: str
    """Of the stage."""
    done: int
    """Steps made."""
    total: int
    """Steps it has in all."""
    seconds: float | None
    """Of its training; None while it is not finished."""
    records: list[dict[str, Any]]
    """Lines of its log."""
    pictures: list[StageImage]
    """Over its training, the last one last."""


class RunSummary(NamedTuple):
    """A run."""

    workdir: Path
    """Its folder."""
    config: Config
    """What was trained."""
    config_digest: str
    """Of the config."""
    stages: list[StageSummary]
    """In order."""
    final: dict[str, Any] | None
    """Of `final.json`; None while the run is not finished."""
    metrics: list[dict[str, Any]]
    """Of every `metrics.json` of an evaluation."""
    reconstructions: list[dict[str, Any]]
    """What was found of the first stage, by protocol."""
    steps: dict[str, Any] | None
    """Of `steps.json`, with its picture; None where it was not made."""
    steps_picture: Path | None
    """The plot of it."""

    @property
    def name(self) -> str:
        """The run's folder, as it is called."""
        return self.workdir.resolve().name

    @property
    def is_finished(self) -> bool:
        """Whether everything was trained."""
        return self.final is not None


def read_run_summary(workdir: Path) -> RunSummary:
    """Read what there is; a run that is not finished has less.

    Raises:
      InputError: If the folder is no run.
    """
    config = read_config(workdir)
    final = _json(workdir / "final.json")
    seconds = {} if final is None else final.get("seconds_by_stage", {})
    log = workdir / METRICS_FILE
    records = read_metrics(log) if log.exists() else []
    stages: list[StageSummary] = []
    for name in config.stages:
        own = [record for record in records if record["stage"] == name]
        if not own and name == "autoencoder" and config.first_stage is not None:
            continue  # it was taken from elsewhere
        total = getattr(config, name).steps
        done = max((record["step"] for record in own), default=0)
        stages.append(
            StageSummary(
                name,
                total if name in seconds else done,
                total,
                seconds.get(name),
                own,
                _pictures(workdir / name, PICTURES[name]),
            )
        )
    found = sorted((workdir / EVALUATION).glob("*/metrics.json"))
    metrics = [one for path in found if (one := _json(path)) is not None]
    found = sorted((workdir / EVALUATION).glob("reconstructions_*.json"))
    reconstructions = [one for path in found if (one := _json(path)) is not None]
    picture = workdir / STEPS / "steps.png"
    return RunSummary(
        workdir=workdir,
        config=config,
        config_digest=digest(config),
        stages=stages,
        final=final,
        metrics=metrics,
        reconstructions=reconstructions,
        steps=_json(workdir / STEPS / "steps.json"),
        steps_picture=picture if picture.exists() else None,
    )


def _pictures(folder: Path, name: str) -> list[StageImage]:
    found: list[StageImage] = []
    for path in sorted(folder.glob(f"{name}_*.png")):
        if match := re.fullmatch(rf"{name}_(\d+)\.png", path.name):
            found.append(StageImage(int(match[1]), path))
    if len(found) <= MOST_PICTURES:
        return found
    last = len(found) - 1
    chosen = {round(i * last / (MOST_PICTURES - 1)) for i in range(MOST_PICTURES)}
    return [found[i] for i in sorted(chosen)]


def _json(path: Path) -> dict[str, Any] | None:
    """Read a file of JSON; None where there is none, or a part of one."""
    try:
        value = json.loads(path.read_text())
    except (ValueError, OSError):
        return None
    return value if isinstance(value, dict) else None


def check_out(path: Path) -> None:
    """Raise `InputError` if a page cannot be written there."""
    if path.is_dir():
        raise InputError(
            f"--out: {path} is a folder, wanted a file such as report.html"
        )
    if not path.parent.is_dir():
        raise InputError(f"--out: {path.parent} is not a folder; try to make it first")
