"""Samples of a run by seed, and what a network says of them, file by file."""

import time
from pathlib import Path

import jax
import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from ldm_jax.config import Config
from ldm_jax.data.sources import read_captions
from ldm_jax.drawing import draw
from ldm_jax.evaluation.features import FeatureSet, join, read_arrays, write_arrays
from ldm_jax.images import grid, write_png
from ldm_jax.scoring.extractors import Extractor
from ldm_jax.studio import Studio
from ldm_jax.subjects import Shown, Subject

SHARD = 256
"""Samples whose features are one file: an interruption costs no more of a process."""
GRID_SIDE = 10
MOST_CAPTIONS = 10_000


def draw_shards(
    studio: Studio,
    extractor: Extractor,
    folder: Path,
    *,
    num_images: int,
    tells: bool = True,
) -> float:
    """Draw the samples whose features are not there yet; this process' share.

    Args:
      studio: What draws.
      extractor: What looks at them.
      folder: Where features go.
      num_images: How many there are in the end.
      tells: Whether a bar shows how far it is.

    Returns:
      Seconds that it took.
    """
    paths = _shards(folder, num_images)
    mine = range(jax.process_index(), len(paths), jax.process_count())
    missing = [i for i in mine if not paths[i].exists()]
    shown = shown_by_seed(studio.run.config, num_images)
    subjects = [
        Subject(shown[seed % len(shown)], seed)
        for i in missing
        for seed in range(i * SHARD, min((i + 1) * SHARD, num_images))
    ]
    began = time.monotonic()
    done = num_images - len(subjects)
    with tqdm(
        total=num_images,
        initial=done,
        unit=" images",
        mininterval=1.0,
        disable=not tells,
    ) as bar:
        pictures = draw(studio, subjects)
        for i in missing:
            num = min(SHARD, num_images - i * SHARD)
            images: list[np.ndarray] = []
            for _ in range(num):
                images.append(next(pictures).image)
                bar.update()
            stacked = np.stack(images)
            if i == 0:
                _write_grid(folder / "samples.png", stacked)
            seen = extractor.extract(stacked)
            arrays = {k: v for k, v in seen._asdict().items() if v is not None}
            write_arrays(paths[i], arrays)
    return time.monotonic() - began


def shown_by_seed(config: Config, num_images: int) -> list[Shown]:
    """Say what samples show, seed by seed, over and over.

    Classes in turn; captions of the held-out split in order.

    Raises:
      InputError: If the captions cannot be read.
    """
    condition, data = config.diffusion.condition, config.data
    rows: list[Shown] = [{}]
    if condition.uses_classes:
        rows = [{"label": str(label)} for label in range(data.num_classes)]
    if condition.uses_tokens:
        captions = read_captions(data.source, data.test_split, directory=data.directory)
        chosen = list(captions)[: min(num_images, MOST_CAPTIONS)]
        rows = [
            {**rows[i % len(rows)], "prompt": caption}
            for i, caption in enumerate(chosen)
        ]
    return rows


def read_shards(folder: Path, *, num_images: int) -> FeatureSet:
    """Read what `draw_shards` wrote.

    Raises:
      InputError: If a file is missing or damaged.
    """
    found = [read_arrays(path) for path in _shards(folder, num_images)]
    return join(
        [FeatureSet(a["pooled"], a.get("spatial"), a.get("logits")) for a in found]
    )


def _shards(folder: Path, num_images: int) -> list[Path]:
    """List the files of features. A last one of fewer has its number in its name."""
    paths: list[Path] = []
    for start in range(0, num_images, SHARD):
        size = min(SHARD, num_images - start)
        tail = "" if size == SHARD else f"_{size}"
        paths.append(folder / f"features_{start // SHARD:06d}{tail}.npz")
    return paths


def _write_grid(path: Path, images: UInt8[np.ndarray, "n h w c"]) -> None:
    shown = images[: GRID_SIDE * GRID_SIDE]
    write_png(path, grid(shown, columns=min(GRID_SIDE, len(shown))))
