"""Statistics of a run's real images, measured by all processes together, or read."""

import hashlib
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from ldm_jax.config import DataConfig
from ldm_jax.data.pipeline import shuffled_order
from ldm_jax.data.sources import Examples
from ldm_jax.evaluation.adm_reference import is_batch, reference_of_batch
from ldm_jax.evaluation.dataset import Dataset, data_digest, read_block
from ldm_jax.evaluation.extractors import Extractor
from ldm_jax.evaluation.features import (
    MAX_FEATURES,
    Provenance,
    Reference,
    check_comparable,
    read_arrays,
    read_reference,
    reference_of,
    write_arrays,
    write_reference,
)
from ldm_jax.evaluation.fid import Sums, merge_all, sums_of
from ldm_jax.evaluation.protocols import Protocol
from ldm_jax.evaluation.scores import check_enough
from ldm_jax.parallel.multihost import first_alone, from_first, is_first, together
from ldm_jax.training.latent_shards import file_digest
from ldm_jax.types import InputError

ROWS = 256
"""Real images that are in memory at once."""
LANES = 8
"""Sums that a pass keeps apart, block by block in turn, and joins at its end. Their
order, and so every bit, is one on 1, 2, 4 and 8 processes."""


def real_statistics(
    dataset: Dataset,
    protocol: Protocol,
    extractor: Extractor,
    *,
    given: Path | None,
    folder: Path,
) -> Reference:
    """Read statistics from a file or from an earlier call, or measure them.

    Every process calls this; all share the measuring.

    Args:
      given: File to compare with, statistics of ours or a reference batch of ADM's;
        None for the run's own data.
      folder: Where statistics of the run's own data are kept.

    Raises:
      InputError: If the file is of another protocol or network, or cannot be read.
      OSError: If the statistics cannot be written.
    """
    data = dataset.data
    wanted = Provenance(
        protocol.name, extractor.digest, data.source, data.train_split, 0, 0, ""
    )
    if given is not None:
        path = first_alone(
            lambda: _path_of_given(given, protocol, extractor, folder=folder)
        )
        path = Path(from_first(str(path)))
        reference = read_reference(path)
        check_comparable(wanted, reference.provenance, path=path)
        return reference
    of = f"{extractor.digest[:12]}_{data_digest(data)[:12]}"
    path = folder / f"real_{protocol.name}_{of}.npz"
    if not from_first(path.exists()):
        measured = measure_real(dataset, protocol, extractor, folder=folder)
        with together():
            if measured is not None:
                write_reference(path, measured)
    reference = read_reference(path)
    check_comparable(wanted, reference.provenance, path=path)
    return reference


def _path_of_given(
    given: Path, protocol: Protocol, extractor: Extractor, *, folder: Path
) -> Path:
    """Return a file of statistics, or the one made from a reference batch of ADM."""
    arrays = read_arrays(given)
    if not is_batch(arrays):
        return given
    digest = file_digest(given).sha256
    of = f"{extractor.digest[:12]}_{digest[:12]}"
    path = folder / f"real_{protocol.name}_{of}.npz"
    if not path.exists():
        made = reference_of_batch(given, arrays, protocol, extractor, digest=digest)
        write_reference(path, made)
    return path


class Share(NamedTuple):
    """Statistics of the image blocks of one process."""

    pooled: dict[int, Sums]
    """Sums of features by lane, in the order of its blocks."""
    spatial: dict[int, Sums]
    """Sums of sFID's features; empty where the network has none."""
    features: Float[np.ndarray, "n d"]
    """Single features, of some of the images."""
    indices: Int[np.ndarray, " n"]
    """Indices of those images."""
    digests: list[bytes]
    """sha256 of the images of each of its blocks."""


def measure_real(
    dataset: Dataset, protocol: Protocol, extractor: Extractor, *, folder: Path
) -> Reference | None:
    """Measure the training split, in one pass that all processes share.

    Each process reads every n-th block of images, extracts features on its own devices,
    and keeps sums. The shares are exchanged as files in the folder.

    Args:
      folder: A folder that all processes see; one process writes nothing there.

    Returns:
      The statistics; None on all processes but the first.

    Raises:
      InputError: If the data cannot be read, or are too few.
      OSError: If a share cannot be written.
    """
    data, processes = dataset.data, jax.process_count()
    paths = [folder / f"share_{i}_of_{processes}.npz" for i in range(processes)]
    with together():
        examples = dataset.open_split("train").examples
        if not len(examples):
            raise InputError(f"--data.source: {data.source} holds no images")
        mine = _measure_share(data, examples, extractor)
        if not is_first():
            _write_share(paths[jax.process_index()], mine)

    def joined() -> Reference:
        shares = [mine, *map(_read_share, paths[1:])]
        for path in paths[1:]:
            path.unlink()
        return _join(data, protocol, extractor, shares, num=len(examples))

    return first_alone(joined)


def _join(
    data: DataConfig,
    protocol: Protocol,
    extractor: Extractor,
    shares: list[Share],
    *,
    num: int,
) -> Reference:
    """Join the shares of all processes."""
    pooled = merge_all(_in_order(share.pooled for share in shares))
    spatial = _in_order(share.spatial for share in shares)
    check_enough(pooled.num, len(pooled.mean), what=f"{data.source}")
    # Block by block in order, whichever process read them.
    rounds = itertools.zip_longest(*(share.digests for share in shares), fillvalue=b"")
    digest = hashlib.sha256(b"".join(itertools.chain.from_iterable(rounds)))
    provenance = Provenance(
        protocol=protocol.name,
        network=extractor.digest,
        source=data.source,
        split=data.train_split,
        num_images=pooled.num,
        image_size=data.image_size,
        data=digest.hexdigest(),
    )
    # In an order in which every prefix represents all images.
    rank = np.argsort(shuffled_order(num))
    indices = np.concatenate([share.indices for share in shares])
    features = [share.features for share in shares if len(share.features)]
    return reference_of(
        provenance,
        pooled,
        merge_all(spatial) if spatial else None,
        np.concatenate(features)[np.argsort(rank[indices])],
    )


def _measure_share(data: DataConfig, examples: Examples, extractor: Extractor) -> Share:
    """Measure this process' blocks."""
    is_kept = np.zeros(len(examples), bool)
    is_kept[shuffled_order(len(examples))[:MAX_FEATURES]] = True
    pooled: dict[int, Sums] = {}
    spatial: dict[int, Sums] = {}
    features: list[np.ndarray] = []
    indices: list[np.ndarray] = [np.zeros(0, np.int64)]
    digests: list[bytes] = []
    processes, blocks = jax.process_count(), range(0, len(examples), ROWS)
    lanes = LANES if LANES % processes == 0 else processes
    for block in range(jax.process_index(), len(blocks), processes):
        start, lane = blocks[block], block % lanes
        images = read_block(data, examples, start, start + ROWS)
        digests.append(hashlib.sha256(images.tobytes()).digest())
        found = extractor.extract(images)
        _add(pooled, lane, found.pooled)
        if found.spatial is not None:
            _add(spatial, lane, found.spatial)
        which = np.flatnonzero(is_kept[start : start + len(images)])
        features.append(found.pooled[which])
        indices.append(start + which)
    return Share(
        pooled,
        spatial,
        np.concatenate(features) if features else np.zeros((0, 0), np.float32),
        np.concatenate(indices),
        digests,
    )


def _add(lanes: dict[int, Sums], lane: int, features: np.ndarray) -> None:
    before, new = lanes.get(lane), sums_of(features)
    lanes[lane] = new if before is None else merge_all([before, new])


def _in_order(shares: Iterable[dict[int, Sums]]) -> list[Sums]:
    """Return the sums of all lanes, which are of one process each."""
    found = {lane: sums for share in shares for lane, sums in share.items()}
    return [found[lane] for lane in sorted(found)]


def _write_share(path: Path, share: Share) -> None:
    arrays = {"indices": share.indices, "features": share.features}
    arrays["digests"] = np.frombuffer(b"".join(share.digests), np.uint8)
    for name, lanes in (("pooled", share.pooled), ("spatial", share.spatial)):
        for lane, sums in lanes.items():
            found = sums._asdict().items()
            arrays |= {f"{name} {lane} {field}": np.asarray(x) for field, x in found}
    write_arrays(path, arrays)


def _read_share(path: Path) -> Share:
    arrays = read_arrays(path)

    def sums(name: str) -> dict[int, Sums]:
        keys = [key.split() for key in arrays if key.startswith(f"{name} ")]
        found = {}
        for lane in {int(lane) for _, lane, _ in keys}:
            num, mean, scatter = (arrays[f"{name} {lane} {f}"] for f in Sums._fields)
            found[lane] = Sums(int(num), mean, scatter)
        return found

    size = hashlib.sha256().digest_size
    digests = [row.tobytes() for row in arrays["digests"].reshape(-1, size)]
    return Share(
        sums("pooled"), sums("spatial"), arrays["features"], arrays["indices"], digests
    )
