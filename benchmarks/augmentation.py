"""Do samples of a diffusion model help a classifier that has few real images?

    python benchmarks/augmentation.py --out runs/augmentation --json augmentation.json

For n = 50, 100, 200 and 500 real digits and five seeds each: both stages are trained on
these n digits and on nothing else, `ldm sample --as-dataset` draws 50 digits of each
class, and a small network is trained to read digits, on the real ones alone and with
the samples. It is tested on the 297 held-out digits.

Seed s takes the digits from s * (1500 - n) // 4 on, in the data set's own order: five
windows, which do not overlap up to n = 300 and overlap by half at n = 500.

What is compared is the same network in four ways, with the same number of steps, batch
size and rates. With samples, half of every batch is samples. Warped, each image is
turned by up to 10 degrees and shifted by up to an eighth of its side, anew in every
batch: what one would do without a diffusion model. Each accuracy is the mean of three
networks that differ in their first parameters and order of images; means and intervals
(95 %, Student's t) are over the seeds. The held-out digits are the same for all.

Every finished pair of n and seed is kept in --out, so that the same command goes on
where it was stopped. The whole took two hours on one CPU core.
"""

import dataclasses
import json
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from command import make_parser
from digit_reader import Arm, Examples, accuracy, labelled, shrink
from jaxtyping import UInt8
from scipy import stats
from sklearn.svm import SVC

from ldm_jax.build import load_split
from ldm_jax.cli.exit_codes import run_main
from ldm_jax.cli.huge_pages import use_huge_pages
from ldm_jax.config import Config
from ldm_jax.config.launch import Launch
from ldm_jax.config.load_config import load_config
from ldm_jax.data.pipeline import Batch, load_all
from ldm_jax.data.sources import open_source
from ldm_jax.files import write_json
from ldm_jax.parallel.launch import start
from ldm_jax.rng import root_key
from ldm_jax.run import train
from ldm_jax.sampling.request import SampleRequest
from ldm_jax.sampling.sampling_config import SamplingConfig
from ldm_jax.sampling.synthetic_dataset import DATA_SETS, NAME, write_dataset

PROG = "benchmarks/augmentation.py"
NUM_TRAIN, NUM_WINDOWS = 1500, 5
SVM_C, SVM_GAMMA = 1.0, 0.002
"""Of `digits_quality.py`: it reads 99.3 % of the held-out digits right."""
SECONDS_BY_STEP = {
    "autoencoder": 0.17,
    "diffusion": 0.15,
    "sample": 0.0023,
    "classifier": 0.01,
}
"""On two cores of an Intel Xeon; `sample` is a step of one image, and `classifier` one
of all four networks."""
ACCURACY_FILE = "accuracy.json"
SECONDS_TO_START = 40.0
ARMS = {
    "real alone": Arm(False, False),
    "warped": Arm(False, True),
    "with samples": Arm(True, False),
    "with samples, warped": Arm(True, True),
}
PAIRS = {
    "samples add": ("with samples", "real alone"),
    "samples add to warping": ("with samples, warped", "warped"),
}


def window(n: int, seed: int) -> tuple[int, int]:
    """Return which training digits a seed takes: the first, and the one after."""
    first = seed * (NUM_TRAIN - n) // (NUM_WINDOWS - 1)
    return first, first + n


def config_of(given: Namespace, n: int, seed: int) -> Config:
    """Make the config of a run that sees n digits alone."""
    config = load_config(given.config)
    first, end = window(n, seed)
    stages: dict[str, Any] = {}
    for name in ("autoencoder", "diffusion"):
        stage, steps = getattr(config, name), getattr(given, f"{name}_steps")
        share = steps / stage.steps
        optim = dataclasses.replace(
            stage.optim,
            warmup_steps=round(stage.optim.warmup_steps * share),
            decay_steps=round(stage.optim.decay_steps * share),
        )
        stages[name] = dataclasses.replace(stage, steps=steps, optim=optim)
    data = dataclasses.replace(
        config.data, train_split=f"train[{first}:{end}]", num_train_examples=n
    )
    longest = max(given.autoencoder_steps, given.diffusion_steps)
    return dataclasses.replace(
        config,
        seed=seed,
        data=data,
        checkpoint=dataclasses.replace(config.checkpoint, every=longest),
        log=dataclasses.replace(config.log, every=50, images_every=longest),
        **stages,
    )


def draw_samples(given: Namespace, config: Config, folder: Path) -> Batch:
    """Draw samples of a run as a user does, and read them as one."""
    settings = SamplingConfig(
        workdir=str(folder / "run"),
        steps=given.sample_steps,
        guidance_scale=(given.guidance_scale,),
    )
    seeds = tuple(range(given.per_class))
    write_dataset(settings, SampleRequest(as_dataset=folder / "samples", seeds=seeds))
    directory = str(folder / "samples" / DATA_SETS)
    source = open_source(f"tfds:{NAME}", "train", directory=directory)
    side, channels = config.data.image_size, config.data.image_channels
    return load_all(source.examples, image_size=side, image_channels=channels)


def read_right(config: Config, samples: Batch) -> float:
    """Return the part of samples that an SVM of all 1,500 digits reads as their label.

    What the samples are worth, not what the classifier may know.
    """
    whole = dataclasses.replace(
        config.data, train_split="train", num_train_examples=NUM_TRAIN
    )
    real = load_split(dataclasses.replace(config, data=whole), "train")

    def features(images: UInt8[np.ndarray, "b h w 1"]) -> np.ndarray:
        grey = np.asarray(shrink(jnp.asarray(images, jnp.float32)))
        return grey.reshape(len(grey), -1) / 255.0 * 16.0

    svm = SVC(C=SVM_C, gamma=cast(Any, SVM_GAMMA))
    svm.fit(features(real.image), real.label)
    return float(svm.score(features(samples.image), samples.label))


def folder_of(given: Namespace, n: int, seed: int) -> Path:
    """Return where a pair is kept."""
    return given.out / f"n{n:04d}_seed{seed}"


def measure(given: Namespace, n: int, seed: int) -> dict[str, Any]:
    """Train, sample and classify for one pair; or read what was found before."""
    folder = folder_of(given, n, seed)
    config, asked = config_of(given, n, seed), settings_of(given)
    path = folder / ACCURACY_FILE
    if path.exists():
        found = json.loads(path.read_text())
        if found["settings"] == asked:
            return found
    began = time.monotonic()
    final = train(config, folder / "run").final
    made = draw_samples(given, config, folder)
    real, test = load_split(config, "train"), load_split(config, "test")
    examples = Examples(*map(labelled, (real, made, test)))
    keys = [jax.random.fold_in(root_key(seed), i) for i in range(given.classifiers)]
    scores = {
        name: [
            float(accuracy(key, examples, arm=arm, num_steps=given.classifier_steps))
            for key in keys
        ]
        for name, arm in ARMS.items()
    }
    found = {
        "settings": asked,
        "window": window(n, seed),
        "digest": final["digest"],
        "read_right": read_right(config, made),
        "accuracy": scores,
        "seconds": round(time.monotonic() - began, 1),
    }
    write_json(path, found)
    return found


def settings_of(given: Namespace) -> dict[str, Any]:
    """Say what a result depends on."""
    others = ("out", "json", "sizes", "num_seeds")
    return {k: v for k, v in vars(given).items() if k not in others}


def expected_seconds(given: Namespace) -> float:
    """Guess how long one pair takes."""
    num_samples = 10 * given.per_class * given.sample_steps
    num_samples *= 1 if given.guidance_scale == 1.0 else 2
    return (
        SECONDS_TO_START
        + SECONDS_BY_STEP["autoencoder"] * given.autoencoder_steps
        + SECONDS_BY_STEP["diffusion"] * given.diffusion_steps
        + SECONDS_BY_STEP["sample"] * num_samples
        + SECONDS_BY_STEP["classifier"] * given.classifier_steps * given.classifiers
    )


class Interval(NamedTuple):
    """A mean over seeds and half the width of its 95 % interval."""

    mean: float
    """In per cent."""
    half: float | None
    """Likewise; None for one seed."""

    @property
    def text(self) -> str:
        """As it stands in the table."""
        return f"{self.mean:.1f}" + ("" if self.half is None else f" ± {self.half:.1f}")


def interval(values: list[float]) -> Interval:
    """Average values in [0, 1] or [-1, 1], one a seed; Student's t."""
    percent = 100.0 * np.asarray(values)
    if len(percent) == 1:
        return Interval(float(percent[0]), None)
    error = percent.std(ddof=1) / np.sqrt(len(percent))
    quantile = stats.t.ppf(0.975, len(percent) - 1)
    return Interval(float(percent.mean()), float(quantile * error))


def summarise(found: list[dict[str, Any]]) -> dict[str, Interval]:
    """Average what was found for one n over its seeds."""
    scores = {
        name: [float(np.mean(one["accuracy"][name])) for one in found] for name in ARMS
    }
    columns = {name: interval(values) for name, values in scores.items()}
    for name, (more, less) in PAIRS.items():
        pairs = zip(scores[more], scores[less], strict=True)
        columns[name] = interval([a - b for a, b in pairs])
    columns["samples an SVM of all digits reads right"] = interval(
        [one["read_right"] for one in found]
    )
    return columns


def print_table(rows: dict[int, dict[str, Interval]]) -> None:
    """Print means and intervals in per cent, a row for each n."""
    names = list(next(iter(rows.values())))
    print(f"| real digits | {' | '.join(names)} |")
    print("|---:" * (1 + len(names)) + "|")
    for n, columns in rows.items():
        print(f"| {n} | {' | '.join(columns[name].text for name in names)} |")


def say(text: str) -> None:
    """Tell of the progress."""
    print(text, file=sys.stderr, flush=True)


def parse(args: list[str]) -> Namespace:
    """Read the command line."""
    parser = make_parser(PROG, __doc__)
    parser.add_argument("--out", type=Path, required=True, help="kept between calls")
    parser.add_argument("--sizes", type=int, nargs="+", default=[50, 100, 200, 500])
    parser.add_argument("--num-seeds", type=int, default=NUM_WINDOWS)
    parser.add_argument("--config", default="configs/digits.py")
    parser.add_argument("--autoencoder-steps", type=int, default=300)
    parser.add_argument("--diffusion-steps", type=int, default=700)
    parser.add_argument("--per-class", type=int, default=50, help="samples")
    parser.add_argument("--sample-steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=1.0)
    parser.add_argument("--classifiers", type=int, default=3, help="of each kind")
    parser.add_argument("--classifier-steps", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(args)
    if not 1 <= given.num_seeds <= NUM_WINDOWS:
        parser.error(f"--num-seeds: got {given.num_seeds}, wanted 1 to {NUM_WINDOWS}")
    if not all(1 <= n <= NUM_TRAIN for n in given.sizes):
        parser.error(f"--sizes: got {given.sizes}, wanted 1 to {NUM_TRAIN} each")
    return given


def main(args: list[str]) -> None:
    """Measure what is missing, and print all of it."""
    given = parse(args)
    launch = Launch(compilation_cache=given.out.absolute() / ".compiled")
    start(launch)
    pairs = [(n, seed) for n in given.sizes for seed in range(given.num_seeds)]
    found: dict[tuple[int, int], dict[str, Any]] = {}
    for n, seed in pairs:
        missing = [
            pair
            for pair in pairs
            if pair not in found
            and not (folder_of(given, *pair) / ACCURACY_FILE).exists()
        ]
        minutes = expected_seconds(given) * len(missing) / 60
        first, end = window(n, seed)
        say(f"n {n}, seed {seed}: digits {first} to {end - 1}; {minutes:.0f} min to go")
        found[n, seed] = one = measure(given, n, seed)
        details = [
            f"{name} {100 * np.mean(x):.1f}" for name, x in one["accuracy"].items()
        ]
        say(f"n {n}, seed {seed}: {', '.join(details)} % ({one['seconds']:.0f} s)")
        jax.clear_caches()  # the programs of another n are other programs
    rows = {
        n: summarise([found[n, seed] for seed in range(given.num_seeds)])
        for n in given.sizes
    }
    print_table(rows)
    if given.json:
        content = {
            "settings": settings_of(given),
            "intervals": {
                n: {name: one._asdict() for name, one in columns.items()}
                for n, columns in rows.items()
            },
            "found": {f"{n}, {seed}": one for (n, seed), one in found.items()},
        }
        write_json(given.json, content)


if __name__ == "__main__":
    use_huge_pages()
    run_main(main, PROG)
