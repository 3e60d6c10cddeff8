"""The log of a run: JSON lines, TensorBoard, a plot, and the progress bar."""

import json
import logging
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ldm_jax.files import naming, parse_json, write_file, write_text
from ldm_jax.parallel.multihost import first_alone, from_first, is_first
from ldm_jax.types import InputError

METRICS_FILE = "metrics.jsonl"
PLOT_FILE = "loss.png"
MIN_PLOTTED = 1e-12
BAR_FORMAT = "{desc:<12} {percentage:3.0f}% |{bar:24}| {n_fmt}/{total_fmt}{postfix}"


HOW = "how"
NOT_NUMBERS = {"stage": str, HOW: str, "metrics": dict, "example_index": list}
"""Types of the values of a record that are not numbers."""
LARGEST_INTEGER = 2**63


class MetricsLog:
    """`metrics.jsonl`, and TensorBoard where `tensorboardX` is installed.

    Attributes:
      path: File of the metrics.
      fault_path: File of the non-finite steps.
    """

    def __init__(self, workdir: Path, *, writes: bool = True) -> None:
        """Open the log of a run for appending.

        Args:
          writes: True on one process; the logs of the others write nothing.
        """
        self.path = workdir / METRICS_FILE
        self.fault_path = workdir / "not_finite.jsonl"
        self._writes = writes
        self._board = _open_board(workdir / "tensorboard") if writes else None

    def rewind(self, stage: str, step: int) -> None:
        """Remove records of `stage` after `step`, and incomplete lines."""
        if not self._writes:
            return
        for path in (self.path, self.fault_path):
            if not path.exists():
                continue
            kept = [
                record
                for record in read_metrics(path)
                if record["stage"] != stage or record["step"] <= step
            ]
            write_text(path, "".join(json.dumps(record) + "\n" for record in kept))

    def records(self, stage: str) -> list[dict[str, Any]]:
        """Read the records of a stage."""
        found = read_metrics(self.path) if self.path.exists() else []
        return [record for record in found if record["stage"] == stage]

    def write(self, stage: str, step: int, values: Mapping[str, float | str]) -> None:
        """Append one record."""
        if not self._writes:
            return
        _append(self.path, {"stage": stage, "step": step, **values})
        if self._board is not None:
            numbers = {k: v for k, v in values.items() if not isinstance(v, str)}
            for name, value in numbers.items():
                self._board.add_scalar(f"{stage}/{name}", value, step)

    def write_fault(self, record: Mapping[str, Any]) -> None:
        """Append the record of a non-finite step."""
        if self._writes:
            _append(self.fault_path, record)

    def close(self) -> None:
        """Close TensorBoard's file."""
        if self._board is not None:
            self._board.close()


def _append(path: Path, record: Mapping[str, Any]) -> None:
    with naming(path), path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the records of a log, and warn of lines that are none.

    Of the last line nothing is said: it is cut where a run was killed.

    Raises:
      InputError: If it is not a regular file.
    """
    if not path.is_file():
        raise InputError(f"{path}: got no regular file, wanted a log; try removing it")
    lines = path.read_bytes().split(b"\n")
    found = [_record(line) for line in lines]
    bad = sum(map(bool, lines[:-1])) - sum(one is not None for one in found[:-1])
    if bad:
        logging.getLogger(__name__).warning(
            "%s: %d lines are no records of a log, and are left out", *(path, bad)
        )
    return [record for record in found if record is not None]


def _record(line: bytes) -> dict[str, Any] | None:
    """Read a line of a log; None if it is no record."""
    try:
        record = parse_json(line.decode(errors="replace"), what="", remedy="")
    except InputError:
        return None
    if not isinstance(record, dict) or not {"stage", "step"} <= record.keys():
        return None
    step = record["step"]
    whole = isinstance(step, int) and not isinstance(step, bool) and step >= 0
    good = (_fits(name, value) for name, value in record.items())
    return record if whole and all(good) else None


def _fits(name: str, value: Any) -> bool:
    """Return whether a value of a record has the type of its name."""
    if name in NOT_NUMBERS:
        return isinstance(value, NOT_NUMBERS[name])
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, float) or abs(value) < LARGEST_INTEGER


def plot_losses(log: Path, path: Path) -> None:
    """Plot loss and scores of each stage against its steps, on logarithmic axes.

    Args:
      log: `metrics.jsonl`.
      path: PNG file; written atomically.
    """
    from matplotlib.figure import Figure

    records = read_metrics(log)
    stages = list(dict.fromkeys(record["stage"] for record in records))
    if not stages:
        return
    panels = [(stage, ("loss", "reconstruction"), True) for stage in stages]
    scored = dict.fromkeys(r["stage"] for r in records if "fid" in r)
    panels += [(stage, ("fid", "held_out_fid"), False) for stage in scored]
    figure = Figure(figsize=(5.5 * len(panels), 3.6), dpi=120)
    all_axes = figure.subplots(1, len(panels), squeeze=False)
    for axes, (stage, names, noisy) in zip(all_axes[0], panels, strict=True):
        rows = [record for record in records if record["stage"] == stage]
        for i, name in enumerate(names):
            details = [row for row in rows if name in row]
            steps, values = ([row[key] for row in details] for key in ("step", name))
            label, look = name.replace("_", " "), {"color": f"C{i}"}
            if not details:
                continue
            if noisy:
                axes.plot(steps, values, **look, alpha=0.3, linewidth=0.8)
                axes.plot(steps, _smooth(values), **look, label=label)
            else:
                axes.plot(steps, values, "o-", **look, markersize=3, label=label)
        axes.set_yscale("log")
        axes.set_title(stage if noisy else f"{stage}: Fréchet distance")
        axes.set_xlabel("step")
        axes.grid(visible=True, which="both", alpha=0.2)
        axes.legend()
    figure.tight_layout()
    write_file(path, lambda file: figure.savefig(file, format="png"))


def progress_bar(stage: str, *, num_steps: int, done: int, visible: bool) -> tqdm:
    """Make a progress bar of step, loss, images/s and remaining time.

    Outside a terminal it prints a line every ten seconds.
    """
    quiet = not sys.stderr.isatty()
    return tqdm(
        total=num_steps,
        initial=done,
        desc=stage,
        bar_format=BAR_FORMAT,
        mininterval=10.0 if quiet else 0.2,
        maxinterval=20.0 if quiet else 1.0,
        file=sys.stderr,
        disable=not visible,
    )


def _smooth(values: list[float]) -> list[float]:
    """Average logarithms with a half-life of six values, without initial bias."""
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        total = 0.9 * total + math.log(max(value, MIN_PLOTTED))
        weight = 0.9 * weight + 1.0
        smoothed.append(math.exp(total / weight))
    return smoothed


def _open_board(directory: Path) -> Any:
    try:
        from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    return SummaryWriter(str(directory))


ScoreRecord = dict[str, float | str]
"""Scores by name, and how they were computed."""
Measure = Callable[[Any, int], ScoreRecord]
"""From averaged parameters and their step to scores. Every process calls it; the scores
of process 0 are logged."""
SCORE = "fid"
"""Key of score records that other records do not have."""


class ScoreCurve:
    """Scores of a stage during training, in the log of its run.

    Scoring takes long, so it follows the save of a state. A run that was killed in
    between adds the missing score when it resumes.
    """

    def __init__(self, stage: Any, log: MetricsLog, *, every: int) -> None:
        """Score a stage every so many steps, if it has a `measure`."""
        self._stage, self._log, self._every = stage, log, every

    def is_due(self, step: int) -> bool:
        """Return whether averaged parameters are scored at a step."""
        if self._stage.measure is None or not step:
            return False
        return step % self._every == 0 or step == self._stage.num_steps

    def is_missing(self, step: int) -> bool:
        """Return whether a due score is not in the log; a collective."""
        if not self.is_due(step):
            return False
        found = is_first() and any(
            SCORE in record and record["step"] == step
            for record in self._log.records(self._stage.name)
        )
        return not from_first(found)

    def add(self, ema: Any, step: int) -> None:
        """Score averaged parameters, whole on this process; a collective."""
        if self._stage.measure is not None:
            scores = self._stage.measure(ema, step)
            first_alone(lambda: self._write(step, scores))

    def _write(self, step: int, scores: ScoreRecord) -> None:
        self._log.write(self._stage.name, step, scores)
        plot_losses(self._log.path, self._log.path.with_name(PLOT_FILE))
