"""The report of a run, written whole or not at all."""

import datetime
from importlib.metadata import version
from pathlib import Path

import jax

from ldm_jax.files import write_text
from ldm_jax.parallel.make_layout import PmapLayout
from ldm_jax.sampling.pipeline import platform_text
from ldm_jax.tools.report.page import page
from ldm_jax.tools.report.run_summary import RunSummary
from ldm_jax.tools.report.samples import ReportSamples, make_samples
from ldm_jax.training.dry_run import describe
from ldm_jax.types import InputError, RunError


def write_report(summary: RunSummary, out: Path, *, with_samples: bool) -> None:
    """Write the report of a run.

    Args:
      out: The file.
      with_samples: Whether samples are made for it.

    Raises:
      OSError: If it cannot be written.
    """
    samples, note = _samples(summary) if with_samples else (None, "")
    counts = _parameters(summary) if with_samples else {}
    write_text(out, page(summary, samples, note=note, facts=counts | _facts(summary)))


def _samples(summary: RunSummary) -> tuple[ReportSamples | None, str]:
    """Make samples, or return why there are none; the page is written without them."""
    config = summary.config
    if "diffusion" not in config.stages:
        return None, ""
    condition = config.diffusion.condition
    if condition.context == "embedding" or condition.concat != "none":
        return (
            None,
            "This model is conditioned on images or vectors: see its samples above.",
        )
    try:
        return make_samples(summary), ""
    except (InputError, RunError, jax.errors.JaxRuntimeError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        return None, f"No samples were made for this report: {lines[0]}."


def _parameters(summary: RunSummary) -> dict[str, str]:
    try:
        counts = describe(summary.config, _one_device())
    except InputError:
        return {}  # such as a batch that does not divide by one device
    details = (f"{name} {num:,}" for name, num in counts["parameters"].items())
    return {"parameters": ", ".join(details)}


def _facts(summary: RunSummary) -> dict[str, str]:
    data, seed = summary.config.data, summary.config.seed
    number = data.num_train_examples
    examples = f", {number:,} examples" if number else ""
    device = platform_text(_one_device())
    now = datetime.datetime.now(datetime.UTC)
    final = {} if summary.final is None else summary.final
    trained = {"trained on": final["trained_on"]} if "trained_on" in final else {}
    return {
        "data": f"{data.source}, split {data.train_split}{examples}",
        "seed": str(seed),
        **trained,
        "report written": f"{now:%Y-%m-%d %H:%M} UTC on {device}, "
        f"ldm_jax {version('ldm_jax')}, JAX {jax.__version__}",
    }


def _one_device() -> PmapLayout:
    return PmapLayout(PmapLayout().devices[:1])
