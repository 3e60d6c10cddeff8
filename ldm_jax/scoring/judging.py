"""What samples of a run are measured by: a network, real images, and held-out ones."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from ldm_jax.build import load_split
from ldm_jax.config import Config
from ldm_jax.evaluation.features import Reference, read_arrays, write_arrays
from ldm_jax.evaluation.protocols import Protocol
from ldm_jax.evaluation.scores import Scores, check_enough, score
from ldm_jax.interop.inception import load_inception
from ldm_jax.interop.names import flatten, unflatten
from ldm_jax.scoring.extractors import Extractor, extract_all
from ldm_jax.scoring.measuring import ROWS
from ldm_jax.scoring.real import data_digest, extractor_of, real_statistics, taught
from ldm_jax.training.hosts import first_alone, is_first
from ldm_jax.types import InputError, PyTree

FOLDER = "evaluation"
"""Of a run, where what is measured is kept."""
ACCURACY = "accuracy"


class Network(NamedTuple):
    """What looks at images.

    Attributes:
      params: Of the protocol's network.
      accuracy: Part of the held-out images that the classifier reads right; None of
        Inception.
    """

    params: PyTree
    accuracy: float | None


class Judged(NamedTuple):
    """What samples are measured by, the same for all ways of making them.

    Attributes:
      extractor: Looks at images.
      reference: Statistics of real ones.
      accuracy: Of the classifier, as in `Network`.
      held_out: Scores of held-out images; None where they are too few.
      num_held_out: How many they are.
    """

    extractor: Extractor
    reference: Reference
    accuracy: float | None
    held_out: Scores | None
    num_held_out: int


def judge(
    config: Config,
    protocol: Protocol,
    *,
    inception: Path | None,
    reference: Path | None,
    folder: Path,
    num_images: int,
    what: str,
) -> Judged:
    """Take what measures a run, or make it, once; every process calls this.

    Args:
      config: Of the run.
      protocol: How it is measured.
      inception: File of Inception's weights, or None for the classifier.
      reference: File of statistics to compare with; None for the run's own data.
      folder: Where what was made is kept; made if it is not there.
      num_images: Samples there are to be; of held-out images as many are measured.
      what: Where their number was given, for messages.

    Raises:
      InputError: If the weights or the statistics cannot be read or do not fit each
        other, or there are too few images.
      OSError: If something cannot be written.
    """
    first_alone(lambda: folder.mkdir(parents=True, exist_ok=True))
    first_alone(lambda: load_network(config, inception, folder))
    network = load_network(config, inception, folder)
    extractor = extractor_of(config, protocol, params=network.params)
    real = real_statistics(config, protocol, extractor, given=reference, folder=folder)
    check_enough(num_images, len(real.pooled.mean), what=what)
    images = load_split(config, "test", limit=num_images).image
    held_out = None
    if is_first():
        held_out = _held_out(protocol, images, extractor, real)
    return Judged(extractor, real, network.accuracy, held_out, len(images))


def load_network(config: Config, inception: Path | None, folder: Path) -> Network:
    """Read Inception, or the classifier; teach that first if it is not there.

    Args:
      config: Of the run.
      inception: File of Inception's weights, or None for the classifier.
      folder: Where the classifier is kept.

    Raises:
      InputError: If the file cannot be read, or the data set has no classes.
      OSError: If the classifier cannot be written.
    """
    if inception is not None:
        return Network(load_inception(inception), None)
    path = folder / f"classifier_{data_digest(config)[:12]}.npz"
    if not path.exists():
        params, right = taught(config)
        arrays = {name: np.asarray(leaf) for name, leaf in flatten(params).items()}
        write_arrays(path, {**arrays, ACCURACY: np.asarray(right)})
    arrays = read_arrays(path)
    right = float(arrays.pop(ACCURACY, np.nan))
    return Network(unflatten(arrays), right)


def _held_out(
    protocol: Protocol,
    images: UInt8[np.ndarray, "n h w c"],
    extractor: Extractor,
    reference: Reference,
) -> Scores | None:
    """Score held-out images as if they were samples; None where they are too few."""
    try:
        seen = extract_all(extractor, images, size=ROWS)
        return score(protocol, seen, reference)
    except InputError:
        return None
