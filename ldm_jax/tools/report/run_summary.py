"""Config, metrics, scores and images of a run, read from its folder. Imports no JAX."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from ldm_jax.config import Config, digest, read_config
from ldm_jax.training.metrics import METRICS_FILE, read_metrics
from ldm_jax.types import InputError

IMAGE_NAMES = {"autoencoder": "reconstructions", "diffusion": "samples"}
"""Names of each stage's images on disk."""
MAX_IMAGES = 6
"""Images of a stage in a report."""
EVALUATION, STEPS = "evaluation", "steps"


class StageImage(NamedTuple):
    """An image that training wrote."""

    step: int
    """Training step."""
    path: Path
    """Path of the image."""


class StageSummary(NamedTuple):
    """One stage of a run."""

    name: str
    """Name of the stage."""
    done: int
    """Finished steps."""
    total: int
    """Steps of the whole stage."""
    seconds: float | None
    """Training time; None while the stage is not finished."""
    records: list[dict[str, Any]]
    """Records of its log."""
    images: list[StageImage]
    """Images, in order of training."""


class RunSummary(NamedTuple):
    """A run."""

    workdir: Path
    """Its folder."""
    config: Config
    """Its config."""
    config_digest: str
    """Digest of the config."""
    stages: list[StageSummary]
    """Its stages, in order."""
    final: dict[str, Any] | None
    """Content of `final.json`; None while the run is not finished."""
    metrics: list[dict[str, Any]]
    """Content of each evaluation's `metrics.json`."""
    reconstructions: list[dict[str, Any]]
    """Scores of the first stage, by protocol."""
    steps: dict[str, Any] | None
    """Content of `steps.json`; None where there is none."""
    steps_plot: Path | None
    """Path of `steps.png`; None likewise."""

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        return self.workdir.resolve().name

    @property
    def is_finished(self) -> bool:
        """Whether every stage is trained."""
        return self.final is not None


def read_run_summary(workdir: Path) -> RunSummary:
    """Read the summary of a run, finished or not.

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
            continue  # the first stage is another run's
        total = getattr(config, name).steps
        done = max((record["step"] for record in own), default=0)
        stages.append(
            StageSummary(
                name,
                total if name in seconds else done,
                total,
                seconds.get(name),
                own,
                _images(workdir / name, IMAGE_NAMES[name]),
            )
        )
    found = sorted((workdir / EVALUATION).glob("*/metrics.json"))
    metrics = [one for path in found if (one := _json(path)) is not None]
    found = sorted((workdir / EVALUATION).glob("reconstructions_*.json"))
    reconstructions = [one for path in found if (one := _json(path)) is not None]
    plot = workdir / STEPS / "steps.png"
    return RunSummary(
        workdir=workdir,
        config=config,
        config_digest=digest(config),
        stages=stages,
        final=final,
        metrics=metrics,
        reconstructions=reconstructions,
        steps=_json(workdir / STEPS / "steps.json"),
        steps_plot=plot if plot.exists() else None,
    )


def _images(folder: Path, name: str) -> list[StageImage]:
    found: list[StageImage] = []
    for path in sorted(folder.glob(f"{name}_*.png")):
        if match := re.fullmatch(rf"{name}_(\d+)\.png", path.name):
            found.append(StageImage(int(match[1]), path))
    if len(found) <= MAX_IMAGES:
        return found
    last = len(found) - 1
    chosen = {round(i * last / (MAX_IMAGES - 1)) for i in range(MAX_IMAGES)}
    return [found[i] for i in sorted(chosen)]


def _json(path: Path) -> dict[str, Any] | None:
    """Read a JSON file; None if it is missing or incomplete."""
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
