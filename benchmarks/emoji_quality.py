"""Does a run on emoji draw what a name asks for: found among all emoji of the font.

    python benchmarks/emoji_quality.py --workdir runs/emoji --grid emoji.png

Draws a sample for each name that was held out, and for as many that were not, and looks
for it among all pictures of the font: which is nearest, as means of 4x4 pixels? Right
is the one of that very name; of the held-out names the run has never seen it. Chance
finds it once in 2,949. Beside it stands how often the nearest one is at least of the
right subject, the name up to its first comma, and how well the first stage reconstructs
what it never saw. Prints a table, and JSON with --json FILE.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from command import make_parser
from jaxtyping import Float, UInt8
from scenes_quality import How, Row, draw, sheet

from ldm_jax.build import load_split
from ldm_jax.cli import run_main
from ldm_jax.data.sources import open_source
from ldm_jax.first_stage import make_reconstruct
from ldm_jax.images import write_png
from ldm_jax.run import Run, load_run

PROG = "benchmarks/emoji_quality.py"
BLOCK = 4
COLUMNS, ROWS = 8, 4
SPLITS = ("held_out", "train")


def features(images: UInt8[np.ndarray, "b h w 3"]) -> Float[np.ndarray, "b d"]:
    """Average blocks of pixels: a shift of a pixel or a speck is no other picture."""
    b, h, w, c = images.shape
    blocks = images.reshape(b, h // BLOCK, BLOCK, w // BLOCK, BLOCK, c)
    return blocks.mean(axis=(2, 4)).reshape(b, -1).astype(np.float32)


def ranks(
    samples: UInt8[np.ndarray, "b h w 3"], real: UInt8[np.ndarray, "n h w 3"]
) -> np.ndarray:
    """Return for each sample all real pictures, the nearest first."""
    x, y = features(samples), features(real)
    distance = (x**2).sum(1)[:, None] - 2.0 * x @ y.T + (y**2).sum(1)[None]
    return np.argsort(distance, axis=1, kind="stable")


def subject(name: str) -> str:
    """Return a name up to its first comma."""
    return name.split(",")[0]


def captions_of(run: Run, split: str) -> list[str]:
    """Read the names of a split."""
    data = run.config.data
    examples = open_source(data.source, split, directory=data.directory).examples
    return [bytes(examples[i]["caption"]).decode() for i in range(len(examples))]


def measure(run: Run, how: How, *, grid: Path | None) -> dict[str, Any]:
    """Measure a run: shares of 1, and a PSNR in dB."""
    images = {
        split: load_split(run.config, "train" if split == "train" else "test").image
        for split in SPLITS
    }
    names = {split: captions_of(run, split) for split in SPLITS}
    real = np.concatenate([images[split] for split in SPLITS])
    all_names = [name for split in SPLITS for name in names[split]]
    output = make_reconstruct(run.networks)(run.params.autoencoder, images["held_out"])
    error = np.square(output.astype(np.float64) - images["held_out"]).mean()
    found: dict[str, Any] = {"PSNR, held out": float(10 * np.log10(255**2 / error))}
    num, offset, rows = len(names["held_out"]), 0, []
    for split in SPLITS:
        stride = max(len(names[split]) // num, 1)
        chosen = list(range(0, len(names[split]), stride))[:num]
        asked = [names[split][i] for i in chosen]
        samples = draw(run, asked, how)
        order = ranks(samples, real)
        place = [
            int(np.flatnonzero(row == offset + i)[0])
            for row, i in zip(order, chosen, strict=True)
        ]
        near = [all_names[row[0]] for row in order]
        same = [subject(a) == subject(b) for a, b in zip(near, asked, strict=True)]
        found[f"{split}: samples"] = len(chosen)
        found[f"{split}: nearest is the one"] = float(np.mean([p == 0 for p in place]))
        found[f"{split}: among the five nearest"] = float(
            np.mean([p < 5 for p in place])
        )
        found[f"{split}: nearest is of the subject"] = float(np.mean(same))
        if split == "held_out":
            shown = np.linspace(0, num - 1, COLUMNS * ROWS).astype(int)
            for part in np.split(shown, ROWS):
                words = [asked[i] for i in part]
                rows.append(Row(samples[part], words, [True] * COLUMNS))
        offset += len(names[split])
    if grid is not None:
        write_png(grid, sheet(rows))
    return found


def main(arguments: list[str]) -> None:
    """Measure and print."""
    parser = make_parser(PROG, __doc__)
    parser.add_argument("--workdir", type=Path, required=True, help="of the run")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    parser.add_argument("--grid", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    how = How(sampler="ddim", steps=args.steps, scale=args.guidance_scale, eta=0.0)
    found = measure(load_run(args.workdir), how, grid=args.grid)
    print("| measure | value |\n|---|---:|")
    for name, value in found.items():
        if "PSNR" in name:
            text = f"{value:.2f} dB"
        else:
            text = str(value) if isinstance(value, int) else f"{100 * value:.1f} %"
        print(f"| {name} | {text} |")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    run_main(main, PROG)
