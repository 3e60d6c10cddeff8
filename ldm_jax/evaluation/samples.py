"""Features of a run's samples by seed, in one file for every 256 seeds."""

import functools
import time
from pathlib import Path
from typing import NamedTuple, cast

import jax
import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from ldm_jax.config import DataConfig
from ldm_jax.data.sources import read_captions
from ldm_jax.evaluation.extractors import Extractor
from ldm_jax.evaluation.features import FeatureSet, join, read_arrays, write_arrays
from ldm_jax.images import grid, write_png
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.sampling.conditions import ConditionTexts, ImageSpec
from ldm_jax.sampling.pipeline import Pipeline, sample_images
from ldm_jax.types import InputError

SHARD = 256
"""Samples whose features are one file, once it is complete."""
PART = 128
"""Samples between two writes of the file; an interruption loses at most as many."""
GRID_SIDE = 10
MAX_CAPTIONS = 10_000


class SamplingTime(NamedTuple):
    """Number and time of the samples of a process."""

    num_images: int
    """Number of new samples."""
    seconds: float
    """Time they took."""


class ShardFile(NamedTuple):
    """A file of the features of a shard's first samples."""

    path: Path | None
    """The file; None if there is none."""
    num: int
    """Number of samples."""


def extract_samples(
    pipeline: Pipeline,
    extractor: Extractor,
    folder: Path,
    *,
    num_images: int,
    shows_progress: bool = True,
) -> SamplingTime:
    """Sample this process' share of the missing seeds, and write their features.

    Args:
      folder: Where the features are written.
      num_images: Number of samples of all processes: seeds 0 to one less.
      shows_progress: Whether a progress bar is shown.
    """
    num_shards = -(-num_images // SHARD)
    mine = range(jax.process_index(), num_shards, jax.process_count())
    sizes = {i: min(SHARD, num_images - i * SHARD) for i in mine}
    there = {i: _find(folder, i, size) for i, size in sizes.items()}
    missing = [i for i, size in sizes.items() if there[i].num < size]
    condition_texts = conditions_by_seed(
        pipeline.model, pipeline.run.config.data, num_images
    )
    specs = [
        ImageSpec(condition_texts[seed % len(condition_texts)], seed)
        for i in missing
        for seed in range(i * SHARD + there[i].num, i * SHARD + sizes[i])
    ]
    began = time.monotonic()
    done = num_images - len(specs)
    with tqdm(
        total=num_images,
        initial=done,
        unit=" images",
        mininterval=1.0,
        disable=not shows_progress,
    ) as bar:
        samples = sample_images(pipeline, specs)
        for i in missing:
            before = there[i]
            while before.num < sizes[i]:
                images: list[np.ndarray] = []
                for _ in range(min(PART, sizes[i] - before.num)):
                    images.append(next(samples).image)
                    bar.update()
                stacked = np.stack(images)
                if i == 0 and before.num == 0:
                    _write_grid(folder / "samples.png", stacked)
                before = _add(folder, i, before, extractor.extract(stacked))
    return SamplingTime(len(specs), time.monotonic() - began)


def _add(folder: Path, shard: int, before: ShardFile, new: FeatureSet) -> ShardFile:
    """Write the features of a shard's first samples, more than before."""
    if before.path is not None:
        new = join([_read(before.path), new])
    after = ShardFile(_path(folder, shard, len(new.pooled)), len(new.pooled))
    arrays = {k: v for k, v in new._asdict().items() if v is not None}
    write_arrays(cast(Path, after.path), arrays)
    if before.path is not None:
        before.path.unlink()
    return after


def conditions_by_seed(
    model: LatentDiffusion, data: DataConfig, num_images: int
) -> list[ConditionTexts]:
    """Return the conditions of samples; seed i has row i, modulo their number.

    They are the classes in turn, or the captions of the held-out split in order.

    Raises:
      InputError: If the captions cannot be read.
    """
    rows: list[ConditionTexts] = [{}]
    if model.condition.uses_classes:
        rows = [{"label": str(label)} for label in range(model.num_classes)]
    if model.condition.uses_tokens:
        captions = read_captions(
            data.source,
            data.test_split,
            directory=data.directory,
            limit=min(num_images, MAX_CAPTIONS),
        )
        rows = [
            {**rows[i % len(rows)], "prompt": caption}
            for i, caption in enumerate(captions)
        ]
    return rows


def read_features(folder: Path, *, num_images: int) -> FeatureSet:
    """Read the features that `extract_samples` wrote.

    Raises:
      InputError: If a file is missing or damaged.
    """
    parts: list[FeatureSet] = []
    for start in range(0, num_images, SHARD):
        size = min(SHARD, num_images - start)
        found = _find(folder, start // SHARD, size)
        if found.path is None or found.num < size:
            raise InputError(
                f"{folder}: features of samples {start} to {start + size - 1} are "
                "missing; give the same command again"
            )
        cut = functools.partial(_first, num=size)
        parts.append(jax.tree.map(cut, _read(found.path)))
    return join(parts)


def _first(rows: np.ndarray, *, num: int) -> np.ndarray:
    return rows[:num]


def _read(path: Path) -> FeatureSet:
    arrays = read_arrays(path)
    return FeatureSet(arrays["pooled"], arrays.get("spatial"), arrays.get("logits"))


def _find(folder: Path, shard: int, size: int) -> ShardFile:
    """Find the file of a shard's first `size` samples, or of as many as there are.

    A command for fewer samples, or an interrupted one, left a file of fewer.
    """
    counts = [SHARD] if _path(folder, shard, SHARD).exists() else []
    name = _path(folder, shard, SHARD).stem
    for path in folder.glob(f"{name}_*.npz"):
        if (tail := path.stem.removeprefix(f"{name}_")).isdecimal():
            counts.append(int(tail))
    if not counts:
        return ShardFile(None, 0)
    enough = [num for num in counts if num >= size]
    num = min(enough) if enough else max(counts)
    return ShardFile(_path(folder, shard, num), num)


def _path(folder: Path, shard: int, num: int) -> Path:
    """Name a file of features; with their number, if it is less than a shard's."""
    tail = "" if num == SHARD else f"_{num}"
    return folder / f"features_{shard:06d}{tail}.npz"


def _write_grid(path: Path, images: UInt8[np.ndarray, "n h w c"]) -> None:
    first = images[: GRID_SIDE * GRID_SIDE]
    write_png(path, grid(first, columns=min(GRID_SIDE, len(first))))
