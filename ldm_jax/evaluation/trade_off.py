"""Quality against cost of samplers: rows, the cheapest, a table and a plot."""

import dataclasses
import operator
from pathlib import Path
from typing import NamedTuple

from ldm_jax.evaluation.protocols import Protocol
from ldm_jax.types import PrecisionName, SamplerName, SpacingName

TOLERANCE = 0.05
"""Relative difference to the smallest distance that counts as equal."""
REFERENCE_SAMPLER: SamplerName = "dpmpp_2m"
"""Sampler of the converged images."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepsRequest:
    """Samplers and numbers of steps to compare."""

    workdir: Path
    """Folder of the run."""
    samplers: tuple[SamplerName, ...]
    """The samplers."""
    steps: tuple[int, ...]
    """Numbers of denoising steps, each in [1, T]."""
    spacing: SpacingName | None
    """Spacing of the steps; None for the schedule's default."""
    num_images: int
    """Images of each setting, at least 2."""
    guidance_scale: float
    """At least 0; 1 is no guidance."""
    protocol: Protocol | None
    """Protocol of the features; None for components of small images."""
    inception: Path | None
    """File of Inception's weights, if the protocol needs it."""
    limit_steps: int
    """Steps of the converged images; at most those of the schedule are used."""
    precision: PrecisionName | None
    """Products of float32 on GPUs and TPUs; None for the run's."""
    out: Path
    """Folder for the results."""


class SweepRow(NamedTuple):
    """Cost and quality of a setting."""

    sampler: str
    """The sampler."""
    steps: int
    """Denoising steps."""
    calls: int
    """Network calls of an image; twice as many evaluations under guidance."""
    seconds: float
    """Seconds an image, in calls of `sampling.chunk` images."""
    distance: float
    """Fréchet distance to the training split."""
    error: float | None
    """Root mean square distance to the same seeds' converged images, in grey levels of
    255; None for stochastic samplers."""


def cheapest(rows: list[SweepRow], *, tolerance: float = TOLERANCE) -> SweepRow:
    """Return the row with the fewest network calls among the best; then seconds.

    Args:
      rows: At least one.
      tolerance: Relative difference to the smallest distance that counts as equal.
    """
    best = min(row.distance for row in rows)
    good = [row for row in rows if row.distance <= (1.0 + tolerance) * best]
    return min(good, key=lambda row: (row.calls, row.seconds))


def to_table(rows: list[SweepRow], chosen: SweepRow) -> str:
    """Write rows as Markdown, the chosen one in bold."""
    lines = [
        "| sampler | steps | network calls | ms an image | Fréchet distance "
        "| grey levels from the limit |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        error = "" if row.error is None else f"{row.error:.2f}"
        cells = [
            row.sampler,
            str(row.steps),
            str(row.calls),
            f"{1e3 * row.seconds:.3g}",
            f"{row.distance:.4g}",
            error,
        ]
        mark = "**" if row == chosen else ""
        marked = [f"{mark}{cell}{mark}" if cell else "" for cell in cells]
        lines.append(f"| {' | '.join(marked)} |")
    return "\n".join(lines)


def plot(
    rows: list[SweepRow],
    chosen: SweepRow,
    path: Path,
    *,
    held_out_distance: float | None,
) -> None:
    """Plot quality against steps and seconds, and convergence against network calls.

    Args:
      chosen: The row to circle.
      path: The PNG to write.
      held_out_distance: Distance of held-out images; None where they are too few.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [
        ("steps", "denoising steps", "distance", "Fréchet distance"),
        ("seconds", "seconds an image", "distance", "Fréchet distance"),
        ("calls", "network calls", "error", "grey levels from the limit"),
    ]
    figure, all_axes = pyplot.subplots(1, 3, figsize=(13.5, 4.2), dpi=120)
    for axes, (x, x_label, y, y_label) in zip(all_axes, panels, strict=True):
        for i, sampler in enumerate(dict.fromkeys(row.sampler for row in rows)):
            line = [r for r in rows if r.sampler == sampler]
            line = [r for r in line if getattr(r, y) is not None]
            line.sort(key=operator.attrgetter(x))
            xs, ys = ([getattr(r, name) for r in line] for name in (x, y))
            axes.plot(xs, ys, "o-", color=f"C{i}", markersize=4, label=sampler)
        if y == "distance":
            if held_out_distance is not None:
                line_style = {"color": "grey", "ls": "--"}
                axes.axhline(held_out_distance, **line_style, label="held-out images")
            circle = {"s": 160, "facecolors": "none", "edgecolors": "black"}
            spot = getattr(chosen, x), chosen.distance
            axes.scatter(*spot, **circle, label="cheapest within 5 %")
        axes.set(xscale="log", yscale="log", xlabel=x_label, ylabel=y_label)
        axes.grid(visible=True, which="both", alpha=0.2)
    ticks = sorted({row.steps for row in rows})
    all_axes[0].set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
    all_axes[0].minorticks_off()
    all_axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def in_words(row: SweepRow) -> str:
    """Write a setting as flags of `ldm sample`, and its cost."""
    return (
        f"--sampler {row.sampler} --steps {row.steps} "
        f"({row.calls} network calls, {1e3 * row.seconds:.3g} ms an image)"
    )
