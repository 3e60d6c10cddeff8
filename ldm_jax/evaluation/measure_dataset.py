"""Statistics of a run's real images, measured by all processes together."""

import hashlib
import itertools
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int, UInt8

from ldm_jax.build import open_split
from ldm_jax.config import Config
from ldm_jax.data.pipeline import prepare_example, shuffled_order
from ldm_jax.data.sources import Examples
from ldm_jax.evaluation.extractors import Extractor
from ldm_jax.evaluation.features import (
    MOST_KEPT,
    Provenance,
    Reference,
    read_arrays,
    reference_of,
    write_arrays,
)
from ldm_jax.evaluation.fid import Sums, merge_all, sums_of
from ldm_jax.evaluation.protocols import Protocol
from ldm_jax.evaluation.scores import check_enough
from ldm_jax.parallel.multihost import first_alone, is_first, together
from ldm_jax.types import InputError

ROWS = 256
"""Real images that are in memory at once."""


def read_block(
    config: Config, examples: Examples, start: int
) -> UInt8[np.ndarray, "b h w c"]:
    """Read the `ROWS` examples from `start` on, as the run sees them, without flips."""
    data = config.data
    rows = [
        prepare_example(
            {**examples[i], "index": i},
            image_size=data.image_size,
            image_channels=data.image_channels,
        )["image"]
        for i in range(start, min(start + ROWS, len(examples)))
    ]
    return np.stack(rows)


class Share(NamedTuple):
    """What one of several processes finds of the real images: its blocks of them."""

    pooled: Sums | None
    """Sums of features, in the order of its blocks; None if it has no block."""
    spatial: Sums | None
    """Sums of sFID's; None too where the network has none."""
    kept: Float[np.ndarray, "n d"]
    """Features that are kept one by one."""
    numbers: Int[np.ndarray, " n"]
    """Numbers of the images that those are of."""
    digests: list[bytes]
    """Of the images of each of its blocks."""


def measure_real(
    config: Config, protocol: Protocol, extractor: Extractor, *, folder: Path
) -> Reference | None:
    """Measure the training split, in one pass that all processes share.

    Each reads every n-th block of images, looks at it on its own devices, and keeps
    sums. They meet as files in the folder, which all processes see.

    Args:
      protocol: How.
      folder: Where shares meet; on one process nothing is written.

    Returns:
      The statistics; None on all processes but the first.

    Raises:
      InputError: If the data cannot be read, or are too few.
      OSError: If a share cannot be written.
    """
    processes = jax.process_count()
    paths = [folder / f"share_{i}_of_{processes}.npz" for i in range(processes)]
    with together():
        examples = open_split(config, "train").examples
        if not len(examples):
            raise InputError(f"--data.source: {config.data.source} holds no images")
        mine = _look(config, examples, extractor)
        if not is_first():
            _write_share(paths[jax.process_index()], mine)

    def joined() -> Reference:
        shares = [mine, *map(_read_share, paths[1:])]
        for path in paths[1:]:
            path.unlink()
        return _join(config, protocol, extractor, shares, num=len(examples))

    return first_alone(joined)


def _join(
    config: Config,
    protocol: Protocol,
    extractor: Extractor,
    shares: list[Share],
    *,
    num: int,
) -> Reference:
    """Make one of what all processes found."""
    pooled = merge_all(share.pooled for share in shares if share.pooled is not None)
    spatial = [share.spatial for share in shares if share.spatial is not None]
    check_enough(pooled.num, len(pooled.mean), what=f"{config.data.source}")
    # Block by block in order, whoever looked at them.
    rounds = itertools.zip_longest(*(share.digests for share in shares), fillvalue=b"")
    data = hashlib.sha256(b"".join(itertools.chain.from_iterable(rounds)))
    provenance = Provenance(
        protocol=protocol.name,
        network=extractor.digest,
        source=config.data.source,
        split=config.data.train_split,
        num_images=pooled.num,
        image_size=config.data.image_size,
        data=data.hexdigest(),
    )
    # In an order in which the first ones stand for all.
    rank = np.argsort(shuffled_order(num))
    numbers = np.concatenate([share.numbers for share in shares])
    kept = np.concatenate([share.kept for share in shares if len(share.kept)])
    return reference_of(
        provenance,
        pooled,
        merge_all(spatial) if spatial else None,
        kept[np.argsort(rank[numbers])],
    )


def _look(config: Config, examples: Examples, extractor: Extractor) -> Share:
    """Measure this process' blocks."""
    is_kept = np.zeros(len(examples), bool)
    is_kept[shuffled_order(len(examples))[:MOST_KEPT]] = True
    pooled: list[Sums] = []
    spatial: list[Sums] = []
    kept: list[np.ndarray] = []
    numbers: list[np.ndarray] = [np.zeros(0, np.int64)]
    digests: list[bytes] = []
    first, step = jax.process_index() * ROWS, jax.process_count() * ROWS
    for start in range(first, len(examples), step):
        images = read_block(config, examples, start)
        digests.append(hashlib.sha256(images.tobytes()).digest())
        seen = extractor.extract(images)
        pooled = [merge_all([*pooled, sums_of(seen.pooled)])]
        if seen.spatial is not None:
            spatial = [merge_all([*spatial, sums_of(seen.spatial)])]
        which = np.flatnonzero(is_kept[start : start + len(images)])
        kept.append(seen.pooled[which])
        numbers.append(start + which)
    return Share(
        pooled[0] if pooled else None,
        spatial[0] if spatial else None,
        np.concatenate(kept) if kept else np.zeros((0, 0), np.float32),
        np.concatenate(numbers),
        digests,
    )


def _write_share(path: Path, share: Share) -> None:
    arrays = {"numbers": share.numbers, "kept": share.kept}
    arrays["digests"] = np.frombuffer(b"".join(share.digests), np.uint8)
    for name, sums in (("pooled", share.pooled), ("spatial", share.spatial)):
        if sums is not None:
            found = sums._asdict().items()
            arrays |= {f"{name}_{field}": np.asarray(value) for field, value in found}
    write_arrays(path, arrays)


def _read_share(path: Path) -> Share:
    arrays = read_arrays(path)

    def sums(name: str) -> Sums | None:
        if f"{name}_num" not in arrays:
            return None
        num, mean, scatter = (arrays[f"{name}_{field}"] for field in Sums._fields)
        return Sums(int(num), mean, scatter)

    size = hashlib.sha256().digest_size
    digests = [row.tobytes() for row in arrays["digests"].reshape(-1, size)]
    return Share(
        sums("pooled"), sums("spatial"), arrays["kept"], arrays["numbers"], digests
    )
