"""How well do models of super-resolution and inpainting restore held-out images?

    python benchmarks/restoration.py --workdir runs/digits_superres --picture out.png

What is compared with depends on the run: an enlarged image with the bicubic one, a
filled hole with the mean of what is around it. The peak signal-to-noise ratio is over
all pixels, or over those of the holes, of all images together. One sample is one of
many answers, so the mean of several comes nearer to the truth; both are printed. With
--check it exits 1 when the run falls short of what the documentation says.
"""

import json
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from command import make_parser
from jaxtyping import Array, Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from ldm_jax.build import load_split
from ldm_jax.cli.exit_codes import run_main
from ldm_jax.images import to_float, to_uint8, write_png
from ldm_jax.models.conditioning import ConditionInputs
from ldm_jax.pretrained.load_run import Run, load_run
from ldm_jax.rng import Stream, example_keys, image_keys, root_key
from ldm_jax.sampling.editing import Edit, masked_inputs
from ldm_jax.sampling.sample_fn import make_sample_fn
from ldm_jax.sampling.sampling_config import SamplingConfig
from ldm_jax.training.conditions import HOLE_VALUE, low_resolution, random_holes
from ldm_jax.types import RunError

PROG = "benchmarks/restoration.py"
MIN_GAIN = {"low_resolution": 1.5, "masked_image": 5.0}
"""Decibels of one sample over the plain way."""
HOLE_SEED = 1
PLAIN = {"low_resolution": "bicubic", "masked_image": "mean fill"}
NUM_COLUMNS, ZOOM, GAP, LEFT, FONT_SIZE = 12, 2, 8, 84, 14
PAPER, INK = (255, 255, 255), (40, 40, 40)
Images = UInt8[np.ndarray, "b h w c"]


class Task(NamedTuple):
    """What is to be restored."""

    truth: Images
    """The held-out images."""
    given: Images
    """What is left of them, to look at."""
    plain: Images
    """What the plain way makes of it."""
    counted: Float[np.ndarray, "b h w 1"]
    """1 where a pixel is compared."""
    cond: ConditionInputs
    """What the model is given."""
    edit: Edit
    """What it keeps as it is."""


def enlarge(run: Run, truth: Images) -> Task:
    """Shrink images; the plain way is bicubic."""
    factor = run.config.diffusion.condition.low_resolution_factor
    # What a file of the small image holds: whole grey levels.
    small = to_uint8(
        np.asarray(low_resolution(to_float(jnp.asarray(truth)), factor=factor))
    )
    height, width = truth.shape[1:3]
    plain = [
        [
            np.asarray(
                Image.fromarray(channel).resize(
                    (width, height), Image.Resampling.BICUBIC
                ),
                np.uint8,
            )
            for channel in np.moveaxis(image, -1, 0)
        ]
        for image in small
    ]
    return Task(
        truth=truth,
        given=small.repeat(factor, axis=1).repeat(factor, axis=2),
        plain=np.moveaxis(np.asarray(plain), 1, -1),
        counted=np.ones((*truth.shape[:3], 1)),
        cond=ConditionInputs(image=to_float(jnp.asarray(small))),
        edit=Edit(),
    )


def fill(run: Run, truth: Images) -> Task:
    """Cut holes as in training; the plain way is the mean of what is around them."""
    indices = jnp.arange(len(truth), dtype=jnp.uint32)
    keys = example_keys(root_key(HOLE_SEED), Stream.HOLE, 0, indices)
    holes = random_holes(keys, height=truth.shape[1], width=truth.shape[2])
    cut = np.asarray(holes)
    known = (truth * (1.0 - cut)).sum((1, 2)) / (1.0 - cut).sum((1, 2))
    plain = np.where(cut > 0.5, np.rint(known)[:, None, None], truth).astype(np.uint8)
    images = to_float(jnp.asarray(truth))
    level = to_uint8(np.full((1,), HOLE_VALUE, np.float32))
    return Task(
        truth=truth,
        given=np.where(cut > 0.5, level, truth).astype(np.uint8),
        plain=plain,
        counted=cut,
        cond=ConditionInputs(image=masked_inputs(run.model, run.params, images, holes)),
        edit=Edit(image=images, mask=holes),
    )


def psnr(task: Task, images: Images | Float[np.ndarray, "b h w c"]) -> float:
    """Return the peak signal-to-noise ratio over the pixels that count, in dB."""
    truth = task.truth.astype(np.float64)  # bytes would wrap around
    error = np.square(images.astype(np.float64) - truth) * task.counted
    mean = error.sum() / (task.counted.sum() * task.truth.shape[-1])
    return float(10 * np.log10(255**2 / mean))


def restore(run: Run, task: Task, *, steps: int, seed: int) -> Images:
    """Draw one answer for each image."""
    sample_fn = make_sample_fn(run.model, guided=False)
    first = seed * len(task.truth)
    keys = image_keys(list(range(first, first + len(task.truth))))
    images: Array = sample_fn(
        run.params, keys, task.cond, SamplingConfig(steps=steps), edit=task.edit
    ).images
    return to_uint8(np.asarray(images))


def sheet(rows: dict[str, Images]) -> UInt8[np.ndarray, "h w c"]:
    """Draw the first images of each row behind its name."""
    side = ZOOM * next(iter(rows.values())).shape[1]
    size = (LEFT + NUM_COLUMNS * (side + GAP), len(rows) * (side + GAP) + GAP)
    page = Image.new("RGB", size, PAPER)
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(FONT_SIZE)
    for row, (name, images) in enumerate(rows.items()):
        top = GAP + row * (side + GAP)
        pen.text((GAP, top + side // 2 - FONT_SIZE // 2), name, INK, font)
        for column, image in enumerate(images[:NUM_COLUMNS]):
            pixels = image[..., 0] if image.shape[-1] == 1 else image
            picture = Image.fromarray(pixels).convert("RGB")
            picture = picture.resize((side, side), Image.Resampling.NEAREST)
            page.paste(picture, (LEFT + column * (side + GAP), top))
    return np.asarray(page)


def main(args: list[str]) -> None:
    """Measure, print, draw, and check if asked to."""
    parser = make_parser(PROG, __doc__)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--num", type=int, help="images, of the split; unset: all")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--samples", type=int, default=4, help="of each image")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args(args)
    run = load_run(arguments.workdir)
    concat = run.config.diffusion.condition.concat
    if concat not in MIN_GAIN:
        parser.error(
            f"--workdir: got a run with concat {concat}, wanted one of "
            f"{', '.join(MIN_GAIN)}"
        )
    truth = load_split(run.config, "test", limit=arguments.num).image
    task = (enlarge if concat == "low_resolution" else fill)(run, truth)
    drawn = [
        restore(run, task, steps=arguments.steps, seed=seed)
        for seed in range(arguments.samples)
    ]
    ours = float(np.mean([psnr(task, images) for images in drawn]))
    found = {
        PLAIN[concat]: psnr(task, task.plain),
        "one sample": ours,
        f"mean of {len(drawn)} samples": psnr(task, np.mean(drawn, axis=0)),
    }
    print(f"| {len(truth)} held-out images | PSNR, dB |\n|---|---:|")
    for name, value in found.items():
        print(f"| {name} | {value:.2f} |")
    if arguments.picture:
        rows = {
            "given": task.given,
            PLAIN[concat]: task.plain,
            "ours": drawn[0],
            "truth": task.truth,
        }
        write_png(arguments.picture, sheet(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")
    gain = ours - found[PLAIN[concat]]
    if arguments.check and gain < MIN_GAIN[concat]:
        raise RunError(f"falls short: {gain:.2f} dB better, wanted {MIN_GAIN[concat]}")


if __name__ == "__main__":
    run_main(main, PROG)
