"""The page of a story, written whole or not at all."""

import datetime
from importlib.metadata import version
from pathlib import Path

import jax

from ldm_jax.describe import describe
from ldm_jax.report.page import page
from ldm_jax.report.shots import Shots, shoot
from ldm_jax.report.story import Story
from ldm_jax.studio import platform_text
from ldm_jax.training.files import write_text
from ldm_jax.training.parallel import PmapLayout
from ldm_jax.types import InputError, RunError


def write_report(story: Story, out: Path, *, draws: bool) -> None:
    """Draw what a report shows, and write it.

    Args:
      story: Of the run.
      out: The file.
      draws: Whether samples are drawn for it.

    Raises:
      OSError: If it cannot be written.
    """
    shots, note = _shots(story) if draws else (None, "")
    counts = _parameters(story) if draws else {}
    write_text(out, page(story, shots, note=note, facts=counts | _facts(story)))


def _shots(story: Story) -> tuple[Shots | None, str]:
    """Draw, or say why nothing can be drawn: the rest of the page is worth having."""
    config = story.config
    if "diffusion" not in config.stages:
        return None, ""
    condition = config.diffusion.condition
    if condition.context == "embedding" or condition.concat != "none":
        return None, "This model is given pictures or vectors: see its samples above."
    try:
        return shoot(story.workdir, config), ""
    except (InputError, RunError, jax.errors.JaxRuntimeError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        return None, f"Nothing was drawn for this report: {lines[0]}."


def _parameters(story: Story) -> dict[str, str]:
    try:
        counts = describe(story.config, _one_device())
    except InputError:
        return {}  # as of a batch that does not divide by one device
    told = (f"{name} {num:,}" for name, num in counts["parameters"].items())
    return {"parameters": ", ".join(told)}


def _facts(story: Story) -> dict[str, str]:
    data, seed = story.config.data, story.config.seed
    number = data.num_train_examples
    examples = f", {number:,} examples" if number else ""
    device = platform_text(_one_device())
    now = datetime.datetime.now(datetime.UTC)
    final = {} if story.final is None else story.final
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
