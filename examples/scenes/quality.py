"""Share of a text-to-image run's samples that an exact checker reads as asked.

    python -m examples.scenes.quality --workdir runs/scenes --grid scenes.png

Captions come from two splits that the run never saw: `test`, of the pairs of colour and
shape it was trained on, and `held_out`, of the others. Prints a table, and JSON with
--json FILE. With --check it exits 1 when the run falls short of the figures
in docs/reference/benchmarks.md.
"""

import itertools
import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from examples.scenes.captions import parse_caption
from examples.scenes.checker.scenes import Reading, Verdict, check, read_scenes
from ldm_jax.build import open_tokenizer
from ldm_jax.cli.exit_codes import run_main
from ldm_jax.config import Config
from ldm_jax.config.flags import parse_flags
from ldm_jax.config.validation import checked_dataclass, require, require_at_least
from ldm_jax.data.sources import open_source
from ldm_jax.images import to_uint8, write_png
from ldm_jax.models.conditioning import ConditionInputs
from ldm_jax.pretrained.load_run import Run, load_run
from ldm_jax.rng import image_keys
from ldm_jax.sampling.sample_fn import make_sample_fn
from ldm_jax.sampling.sampling_config import SamplingConfig
from ldm_jax.training.autoencoder_stage import make_reconstruct
from ldm_jax.types import RunError, SamplerName

PROG = "examples/scenes/quality.py"
SPLITS = {"test": "training pairs", "held_out": "held-out pairs"}
MIN_REAL, MIN_RECONSTRUCTED = 0.99, 0.98
MIN_DRAWN = {1: {"test": 0.97, "held_out": 0.95}, 2: {"test": 0.85}}
"""Of samples right, by things in a picture."""
NUM_COLUMNS, ROWS = 8, 2
"""Samples shown of each split."""
TILE, GAP, LINE, LINES, WIDTH = 128, 16, 15, 3, 22
FONT_SIZE = 12
PAPER, INK, FRAME, RED = (255, 255, 255), (40, 40, 40), (225, 225, 225), (220, 30, 30)
Images = UInt8[np.ndarray, "b h w 3"]


@checked_dataclass
class Flags:
    """Measure what share of a run's samples shows what their captions say."""

    workdir: Path
    """Folder of the run."""
    things: int = 1
    """Things in each picture."""
    num: int = 500
    """Captions of each split."""
    sampler: SamplerName = "ddim"
    """Sampler."""
    steps: int = 50
    """Denoising steps."""
    guidance_scale: float = 2.0
    """Guidance scale, 1 for none."""
    guidance_low: float = 0.0
    """Guide only where the noise-to-signal ratio is above this."""
    guidance_high: float | None = None
    """Guide only where the noise-to-signal ratio is at most this; None for all."""
    eta: float = 0.0
    """DDIM's share of fresh noise."""
    first_seed: int = 0
    """Seed of the first caption; the others follow."""
    grid: Path | None = None
    """File for the first samples of both splits."""
    json: Path | None = None
    """File for the figures."""
    check: bool = False
    """Exit with 1 if the run falls short of the documented figures."""

    def _check(self) -> None:
        require(self, "things", self.things in MIN_DRAWN, "1 or 2")
        require_at_least(self, 8, "num")


class Row(NamedTuple):
    """Samples to show, side by side."""

    images: Images
    """The samples."""
    captions: list[str]
    """What was asked for."""
    right: list[bool]
    """Whether it is there."""


class Asked(NamedTuple):
    """Pictures and what they show, of one split."""

    images: Images
    """As they are drawn."""
    captions: list[str]
    """One for each."""


def read_split(config: Config, split: str, *, things: int, num: int) -> Asked:
    """Take the first pictures of a split with so many things.

    Of two things or more, only those whose caption says how they stand.
    """
    data = config.data
    examples = open_source(data.source, split, directory=data.directory).examples
    images: list[np.ndarray] = []
    captions: list[str] = []
    for i in range(len(examples)):
        caption = bytes(examples[i]["caption"]).decode()
        wanted = parse_caption(caption)
        says_all = things == 1 or wanted.relation is not None
        if len(wanted.things) == things and says_all:
            images.append(examples[i]["image"])
            captions.append(caption)
        if len(captions) == num:
            break
    return Asked(np.stack(images), captions)


def draw(
    run: Run, captions: list[str], settings: SamplingConfig, *, first_seed: int
) -> Images:
    """Draw each caption once, every one with a seed of its own."""
    tokens = open_tokenizer(run.config.diffusion.condition).encode(captions)
    sample_fn = make_sample_fn(run.model, guided=settings.guided)
    cond = ConditionInputs(tokens=jnp.asarray(tokens))
    keys = image_keys([first_seed + i for i in range(len(captions))])
    samples = sample_fn(run.params, keys, cond, settings)
    return to_uint8(np.asarray(samples.images))


def score(captions: list[str], images: Images) -> list[Verdict]:
    """Check every picture against its caption."""
    readings: list[Reading] = read_scenes(images)
    return [check(c, r) for c, r in zip(captions, readings, strict=True)]


def share(verdicts: list[Verdict], right: Callable[[Verdict], bool]) -> float:
    """Return the part of verdicts that are right."""
    return float(np.mean([right(verdict) for verdict in verdicts]))


def pair_is_right(verdict: Verdict) -> bool:
    """Say whether shapes and colours are as asked, and nothing else is there."""
    return verdict.number and verdict.pairs


def measure(run: Run, flags: Flags) -> dict[str, float]:
    """Measure a run; all figures but the PSNR are parts of 1."""
    settings = SamplingConfig(
        sampler=flags.sampler,
        steps=flags.steps,
        eta=flags.eta,
        guidance_scale=(flags.guidance_scale,),
        guidance_low=flags.guidance_low,
        guidance_high=flags.guidance_high,
    )
    found: dict[str, float] = {}
    rows: list[Row] = []
    for split, name in SPLITS.items():
        asked = read_split(run.config, split, things=flags.things, num=flags.num)
        output = make_reconstruct(run.model)(run.params.autoencoder, asked.images)
        error = np.square(output.astype(np.float64) - asked.images).mean()
        real, again = score(asked.captions, asked.images), score(asked.captions, output)
        found[f"{name}: real pictures read right"] = share(real, lambda v: v.all)
        found[f"{name}: reconstructions read right"] = share(again, lambda v: v.all)
        found[f"{name}: reconstructions, PSNR"] = float(10 * np.log10(255**2 / error))
        drawn = draw(run, asked.captions, settings, first_seed=flags.first_seed)
        verdicts = score(asked.captions, drawn)
        found[f"{name}: samples with shape and colour right"] = share(
            verdicts, pair_is_right
        )
        found[f"{name}: samples with everything right"] = share(
            verdicts, lambda v: v.all
        )
        for field in Verdict._fields[:-1]:
            found[f"{name}: samples, {field}"] = float(
                np.mean([getattr(verdict, field) for verdict in verdicts])
            )
        right = [verdict.all for verdict in verdicts]
        for start in range(0, min(flags.num, ROWS * NUM_COLUMNS), NUM_COLUMNS):
            part = slice(start, start + NUM_COLUMNS)
            rows.append(Row(drawn[part], asked.captions[part], right[part]))
    if flags.grid is not None:
        write_png(flags.grid, sheet(rows))
    return found


def sheet(rows: list[Row]) -> UInt8[np.ndarray, "h w 3"]:
    """Draw samples above their captions; a red frame is round what is not as asked."""
    cell_w, cell_h = TILE + GAP, TILE + LINES * LINE + GAP
    size = (NUM_COLUMNS * cell_w + GAP, len(rows) * cell_h + GAP)
    page = Image.new("RGB", size, PAPER)
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(FONT_SIZE)
    places = itertools.product(range(len(rows)), range(NUM_COLUMNS))
    for row, column in places:
        image, right = rows[row].images[column], rows[row].right[column]
        left, top = GAP + column * cell_w, GAP + row * cell_h
        enlarged = Image.fromarray(image).resize((TILE, TILE), Image.Resampling.NEAREST)
        page.paste(enlarged, (left, top))
        box = (left - 1, top - 1, left + TILE, top + TILE)
        pen.rectangle(box, outline=FRAME if right else RED, width=1 if right else 3)
        lines = textwrap.wrap(rows[row].captions[column], WIDTH)[:LINES]
        pen.multiline_text((left, top + TILE + 3), "\n".join(lines), INK, font)
    return np.asarray(page)


def shortfalls(found: dict[str, float], *, things: int) -> list[str]:
    """List the figures that are below the documented ones."""
    kind = "shape and colour" if things == 1 else "everything"
    bounds: dict[str, float] = {}
    for split, name in SPLITS.items():
        bounds[f"{name}: real pictures read right"] = MIN_REAL
        bounds[f"{name}: reconstructions read right"] = MIN_RECONSTRUCTED
        if split in MIN_DRAWN[things]:
            bounds[f"{name}: samples with {kind} right"] = MIN_DRAWN[things][split]
    return [
        f"{name} {found[name]:.3f} (wanted {bound})"
        for name, bound in bounds.items()
        if found[name] < bound
    ]


def main(args: list[str]) -> None:
    """Measure, print, and check if asked to."""
    flags = parse_flags(Flags, args, prog=PROG)
    found = measure(load_run(flags.workdir), flags)
    print("| measure | value |\n|---|---:|")
    for name, value in found.items():
        text = f"{value:.2f} dB" if "PSNR" in name else f"{100 * value:.1f} %"
        print(f"| {name} | {text} |")
    if flags.json:
        flags.json.write_text(json.dumps(found, indent=2) + "\n")
    short = shortfalls(found, things=flags.things)
    if flags.check and short:
        raise RunError(f"falls short: {'; '.join(short)}")


if __name__ == "__main__":
    run_main(main, PROG)
