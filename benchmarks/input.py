"""Does the input keep up: images/s a core of each source, and how long a step waits.

    python benchmarks/input.py

A source is read as training reads it: in its shuffled order, resized, in batches. What
it costs is the processor time of all threads. Then stage 2 of the digits and the scenes
is trained for some steps, and the share of the time is printed that the loop spent
asking for batches: an upper bound of waiting, as the devices compute meanwhile.
"""

import functools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from command import make_parser
from PIL import Image

from ldm_jax.build import build_model, open_iterator
from ldm_jax.cli.exit_codes import run_main
from ldm_jax.config import Config
from ldm_jax.config.load_config import load_config
from ldm_jax.data.pipeline import BatchIterator, make_iterator, prepare_example
from ldm_jax.data.sources import open_source
from ldm_jax.latent_diffusion import init_autoencoder
from ldm_jax.parallel.make_layout import make_layout
from ldm_jax.parallel.multihost import stop_signal
from ldm_jax.rng import root_key
from ldm_jax.training.diffusion_stage import diffusion_stage
from ldm_jax.training.diffusion_step import FrozenParams
from ldm_jax.training.loop import LoopConfig, run_stage
from ldm_jax.training.train_tokenizer import keep_tokenizer, with_own_tokenizer
from ldm_jax.types import RunError

PROG = "benchmarks/input.py"
BATCH = 32
WARM_UP = 10
MAX_WAITING = 0.05
NUM_PHOTOS, PHOTO_SIDES = 256, (480, 360)
SCENES = "builder:examples/scenes/scenes_dataset_builder.py/one"
CONFIGS = ("configs/digits.py", "examples/scenes/config.py")


class Reading(NamedTuple):
    """A source to read."""

    name: str
    """What to call it."""
    source: str
    """As `data.source` has it."""
    side: int
    """What images are resized to, in pixels."""
    channels: int
    """Of the images."""


class Timed:
    """An iterator that keeps when it was asked, and when it answered."""

    def __init__(self, iterator: BatchIterator) -> None:
        """Wrap an iterator."""
        self._iterator = iterator
        self.asked: list[float] = []
        self.answered: list[float] = []

    def __next__(self) -> Any:
        """Return the next element."""
        self.asked.append(time.perf_counter())
        element = next(self._iterator)
        self.answered.append(time.perf_counter())
        return element

    def get_state(self) -> Any:
        """Return the position."""
        return self._iterator.get_state()

    def set_state(self, state: Any) -> None:
        """Go to a position."""
        self._iterator.set_state(state)

    def close(self) -> None:
        """Stop the reading threads."""
        self._iterator.close()

    @property
    def waiting(self) -> float:
        """Share of the time that was spent in answering, after some steps."""
        asked, answered = self.asked[WARM_UP:], self.answered[WARM_UP:]
        spent = sum(b - a for a, b in zip(asked, answered, strict=True))
        return spent / (answered[-1] - asked[0])


def write_photos(folder: Path) -> None:
    """Write JPEG files that cost as much to read as photos do."""
    folder.mkdir()
    random = np.random.default_rng(0)
    width, height = PHOTO_SIDES
    for i in range(NUM_PHOTOS):
        coarse = random.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        photo = Image.fromarray(coarse).resize(
            (width, height), Image.Resampling.BICUBIC
        )
        grain = random.normal(0.0, 6.0, (height, width, 3))
        noisy = np.clip(np.asarray(photo) + grain, 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{i:05d}.jpg", quality=90)


def images_a_core(reading: Reading, *, batches: int) -> float:
    """Return how many images a second of one core makes ready."""
    examples = open_source(reading.source, "train", directory=None).examples
    prepare = functools.partial(
        prepare_example, image_size=reading.side, image_channels=reading.channels
    )
    iterator = make_iterator(
        examples,
        prepare,
        batch_size=BATCH,
        seed=0,
        process_index=0,
        process_count=1,
    )
    for _ in range(WARM_UP):
        next(iterator)
    start = time.process_time()
    for _ in range(batches):
        next(iterator)
    spent = time.process_time() - start
    iterator.close()
    return batches * BATCH / spent


def waiting_share(config: Config, workdir: Path, *, steps: int) -> float:
    """Train stage 2 on latents of an untrained first stage, and time its input."""
    layout = make_layout(config.parallel)
    workdir.mkdir()
    keep_tokenizer(config, workdir)
    config = with_own_tokenizer(config, workdir)
    model = build_model(config)
    frozen = FrozenParams(
        init_autoencoder(model, root_key(config.seed)), jnp.float32(1.0), {}
    )
    stage = diffusion_stage(config, model, frozen, workdir)
    stage = stage._replace(num_steps=steps, draw=lambda ema, step: None)
    iterator = Timed(open_iterator(config, batch_size=stage.batch_size, layout=layout))
    with stop_signal() as stop:
        run_stage(
            stage,
            loop_config=LoopConfig(
                workdir,
                config.checkpoint,
                config.log,
                config.parallel,
                config.max_skipped_steps,
                None,
            ),
            layout=layout,
            iterator=iterator,
            root_key=root_key(config.seed),
            notes={},
            stop=stop,
        )
    return iterator.waiting


def main(args: list[str]) -> None:
    """Measure, print, and check if asked to."""
    parser = make_parser(PROG, __doc__)
    parser.add_argument("--batches", type=int, default=60)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args(args)
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder) / "photos"
        write_photos(photos)
        readings = [
            Reading("digits, 8x8 PNG to 32x32", "tfds:digits", 32, 1),
            Reading("scenes, 32x32 PNG", SCENES, 32, 3),
            Reading("folder of 480x360 JPEG to 256x256", f"folder:{photos}", 256, 3),
        ]
        print("| source | images/s a core |\n|---|---:|")
        for reading in readings:
            rates = [
                images_a_core(reading, batches=arguments.batches)
                for _ in range(arguments.repeats)
            ]
            found[f"{reading.name}, images/s a core"] = statistics.median(rates)
            print(f"| {reading.name} | {statistics.median(rates):,.0f} |")
        print("\n| stage 2 of | share of the time asking for batches |\n|---|---:|")
        for path in CONFIGS:
            workdir = Path(folder) / Path(path).stem
            share = waiting_share(load_config(path), workdir, steps=arguments.steps)
            found[f"{path}, waiting"] = share
            print(f"| {path} | {100 * share:.2f} % |")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")
    slow = [
        name
        for name, value in found.items()
        if "waiting" in name and value > MAX_WAITING
    ]
    if arguments.check and slow:
        raise RunError(f"falls short: {', '.join(slow)} above {MAX_WAITING}")


if __name__ == "__main__":
    run_main(main, PROG)
