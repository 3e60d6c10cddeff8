"""Config, metrics, scores and images of a run, read from its folder."""

import re
from pathlib import Path
from typing import Any, NamedTuple

from ldm_jax.config import Config, digest, read_config
from ldm_jax.files import printable, read_changes, read_json
from ldm_jax.training.metrics import METRICS_FILE, read_metrics
from ldm_jax.training.workdir import read_final
from ldm_jax.types import InputError

Number = int | float

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
    changes: list[dict[str, Any]]
    """How its config was changed while it trained, as its record says."""
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
      InputError: If the folder is no run, or a file in it is damaged.
    """
    config = read_config(workdir)
    final = read_final(workdir)
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
    metrics = [_read(path, METRICS) for path in found]
    found = sorted((workdir / EVALUATION).glob("reconstructions_*.json"))
    reconstructions = [_read(path, RECONSTRUCTIONS) for path in found]
    plot, sweep = (workdir / STEPS / f"steps.{kind}" for kind in ("png", "json"))
    return RunSummary(
        workdir=workdir,
        config=config,
        config_digest=digest(config),
        stages=stages,
        final=final,
        metrics=metrics,
        reconstructions=reconstructions,
        changes=read_changes(workdir),
        steps=_read(sweep, STEP_SWEEP) if sweep.exists() else None,
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


METRICS = {
    "scores.fid": Number,
    "scores.precision": Number | None,
    "scores.recall": Number | None,
    "protocol.name": str,
    "protocol.network": str,
    "settings.sampler": str,
    "settings.steps": int,
    "settings.guidance_scale": list,
    "seeds": re.compile("[0-9]{1,9}-[0-9]{1,9}"),
    "made_with": dict,
    "network": str,
    "real.source": str,
    "real.data": str,
}
RECONSTRUCTIONS = {"protocol.name": str, "reconstructions.num_images": int}
STEP_SWEEP = {"cheapest.sampler": str, "cheapest.steps": int, "num_images": int}
"""Types of the values that a report reads in the files of other commands."""


def _read(path: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """Read what another command wrote about the run.

    Raises:
      InputError: If a value is missing or has another type.
    """
    remedy = "try removing it, or the command that made it again"
    content = read_json(path, remedy=remedy)
    for name, kind in wanted.items():
        value: Any = content
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if not _is(value, kind):
            raise InputError(f"{path}: {name}: got {printable(repr(value))}; {remedy}")
    return content


def _is(value: Any, kind: Any) -> bool:
    """Return whether a value has a type, or a text a form; of a list, numbers alone."""
    if isinstance(kind, re.Pattern):
        return isinstance(value, str) and kind.fullmatch(value) is not None
    numbers = not isinstance(value, list) or all(isinstance(x, Number) for x in value)
    return isinstance(value, kind) and numbers
