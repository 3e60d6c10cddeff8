"""How good is the digits run: read by an SVM that never saw a sample, and measured.

    python benchmarks/digits_quality.py --workdir runs/digits

Prints a table, and JSON with --json FILE. With --check it exits 1 when the run falls
short of the documented figures.
"""

import json
from pathlib import Path
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
from command import make_parser
from sklearn.decomposition import PCA
from sklearn.svm import SVC

from ldm_jax.build import load_split
from ldm_jax.cli.exit_codes import run_main
from ldm_jax.data.pipeline import Batch
from ldm_jax.evaluation.fid import frechet_distance, moments
from ldm_jax.images import to_uint8
from ldm_jax.models.conditioning import ConditionInputs
from ldm_jax.pretrained.load_run import Run, load_run
from ldm_jax.rng import image_keys
from ldm_jax.sampling.sample_fn import make_sample_fn
from ldm_jax.sampling.sampling_config import SamplingConfig
from ldm_jax.training.autoencoder_stage import make_reconstruct
from ldm_jax.types import RunError

PROG = "benchmarks/digits_quality.py"
NUM_COMPONENTS = 32
SVM_C, SVM_GAMMA = 1.0, 0.002
MIN_READ_RIGHT = 0.98
MIN_PSNR = 34.0
MAX_FRECHET_RATIO = 3.0
Row = tuple[str, float, str]


def shrink(images: np.ndarray) -> np.ndarray:
    """Average 32x32 images over blocks to the digits' own 8x8, in [0, 16]."""
    num, side = images.shape[:2]
    block = side // 8
    blocks = images[..., 0].reshape(num, 8, block, 8, block).astype(np.float64)
    return blocks.mean(axis=(2, 4)).reshape(num, 64) / 255.0 * 16.0


def draw(run: Run, per_class: int, steps: int, scale: float) -> Batch:
    """Sample every class with the seeds 0, 1, 2 ..., label by label."""
    settings = SamplingConfig(steps=steps, guidance_scale=(scale,))
    sample_fn = make_sample_fn(run.model, guided=settings.guided)
    seeds = list(range(per_class)) * 10
    labels = np.repeat(np.arange(10), per_class).astype(np.int32)
    cond = ConditionInputs(label=jnp.asarray(labels))
    samples = sample_fn(run.params, image_keys(seeds), cond, settings)
    images = to_uint8(np.asarray(samples.images))
    return Batch(images, labels, np.arange(len(labels), dtype=np.uint32))


def nearest(points: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the Euclidean distance of each point to the nearest of the others."""
    squares = (
        np.square(points).sum(axis=1)[:, None]
        + np.square(others).sum(axis=1)[None, :]
        - 2.0 * points @ others.T
    )
    return np.sqrt(np.maximum(squares, 0.0)).min(axis=1)


def measure(run: Run, per_class: int, steps: int, scale: float) -> list[Row]:
    """Measure a run.

    Args:
      run: Trained.
      per_class: Samples of each class.
      steps: DDIM steps.
      scale: Guidance scale of the guided samples.

    Returns:
      Name, value and format of each figure.
    """
    train, test = load_split(run.config, "train"), load_split(run.config, "test")
    train_x, test_x = shrink(train.image), shrink(test.image)
    svm = SVC(C=SVM_C, gamma=cast(Any, SVM_GAMMA)).fit(train_x, train.label)
    pca = PCA(NUM_COMPONENTS, random_state=0).fit(train_x)
    reference = moments(pca.transform(train_x))

    def distance(features: np.ndarray) -> float:
        return frechet_distance(moments(pca.transform(features)), reference)

    reconstruct = make_reconstruct(run.model)
    output = reconstruct(run.params.autoencoder, test.image).astype(np.float64)
    psnr = 10 * np.log10(255**2 / np.square(output - test.image).mean())
    guided, plain = draw(run, per_class, steps, scale), draw(run, per_class, steps, 1.0)
    guided_x, plain_x = shrink(guided.image), shrink(plain.image)
    closest_real = nearest(test_x, train_x).min()
    floor = distance(test_x)
    num = len(guided.label)
    return [
        (
            "held-out real digits the SVM reads right",
            svm.score(test_x, test.label),
            "%",
        ),
        (f"{num} guided samples read right", svm.score(guided_x, guided.label), "%"),
        (f"{num} unguided samples read right", svm.score(plain_x, plain.label), "%"),
        ("reconstruction of the held-out digits, PSNR", psnr, "dB"),
        ("Fréchet distance, held-out real digits (floor)", floor, ""),
        ("Fréchet distance, unguided samples", distance(plain_x), ""),
        ("Fréchet distance, guided samples", distance(guided_x), ""),
        ("unguided over floor", distance(plain_x) / floor, "x"),
        (
            "guided samples nearer to a training digit than any held-out one",
            float((nearest(guided_x, train_x) < closest_real).mean()),
            "%",
        ),
        (
            "unguided samples nearer to a training digit than any held-out one",
            float((nearest(plain_x, train_x) < closest_real).mean()),
            "%",
        ),
    ]


def main(args: list[str]) -> None:
    """Measure, print, and check if asked to."""
    parser = make_parser(PROG, __doc__)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--per-class", type=int, default=100)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance-scale", type=float, default=2.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args(args)
    run = load_run(arguments.workdir)
    rows = measure(run, arguments.per_class, arguments.steps, arguments.guidance_scale)
    print("| measure | value |\n|---|---:|")
    for name, value, unit in rows:
        text = f"{100 * value:.1f} %" if unit == "%" else f"{value:.2f} {unit}".strip()
        print(f"| {name} | {text} |")
    values = {name: float(value) for name, value, _ in rows}
    if arguments.json:
        arguments.json.write_text(json.dumps(values, indent=2) + "\n")
    read, psnr, ratio = rows[1][1], rows[3][1], rows[7][1]
    kept = read >= MIN_READ_RIGHT and psnr >= MIN_PSNR and ratio <= MAX_FRECHET_RATIO
    if arguments.check and not kept:
        raise RunError(
            f"falls short: {read:.3f} read right (wanted {MIN_READ_RIGHT}), "
            f"{psnr:.1f} dB (wanted {MIN_PSNR}), {ratio:.2f} times the floor (wanted "
            f"at most {MAX_FRECHET_RATIO})"
        )


if __name__ == "__main__":
    run_main(main, PROG)
