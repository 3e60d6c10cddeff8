"""The real images of a run: as it sees them, and their statistics under a protocol."""

import hashlib
import json
from pathlib import Path
from typing import Any

from ldm_jax.build import load_split, open_split
from ldm_jax.config import Config
from ldm_jax.data.pipeline import load_all
from ldm_jax.data.sources import folder_digest
from ldm_jax.evaluation.adm_reference import is_batch, reference_of_batch
from ldm_jax.evaluation.classifier import MOST_BYTES, accuracy, train_classifier
from ldm_jax.evaluation.extractors import (
    Extractor,
    classifier_extractor,
    inception_extractor,
)
from ldm_jax.evaluation.features import (
    MOST_KEPT,
    Provenance,
    Reference,
    check_comparable,
    read_arrays,
    read_reference,
    write_reference,
)
from ldm_jax.evaluation.measure_dataset import measure_real
from ldm_jax.evaluation.protocols import Protocol
from ldm_jax.parallel.multihost import first_alone, gather_texts, together
from ldm_jax.training.latent_shards import file_digest
from ldm_jax.types import InputError, PyTree


def data_digest(config: Config) -> str:
    """Tell data sets apart as a run sees them, without reading them.

    Raises:
      InputError: If a folder of images is not there.
    """
    data = config.data
    facts: list[Any] = [data.source, data.directory, data.train_split, data.image_size]
    facts += [data.image_channels, data.crop, data.num_train_examples]
    if (folder := folder_digest(data.source)) is not None:
        facts.append(folder)
    return hashlib.sha256(repr(tuple(facts)).encode()).hexdigest()


def real_statistics(
    config: Config,
    protocol: Protocol,
    extractor: Extractor,
    *,
    given: Path | None,
    folder: Path,
) -> Reference:
    """Take statistics from a file, or from an earlier call, or measure them.

    Every process calls this; all share the measuring.

    Args:
      protocol: How.
      given: File that is to be compared with, statistics of ours or a reference batch
        of ADM's; None for the run's own data.
      folder: Where statistics of the run's own data are kept.

    Raises:
      InputError: If the file is of another protocol or network, or cannot be read.
      OSError: If what was measured cannot be written.
    """
    data = config.data
    wanted = Provenance(
        protocol.name, extractor.digest, data.source, data.train_split, 0, 0, ""
    )
    if given is not None:
        path = first_alone(
            lambda: _path_of_given(given, protocol, extractor, folder=folder)
        )
        path = Path(gather_texts(str(path))[0])
        reference = read_reference(path)
        check_comparable(wanted, reference.provenance, path=path)
        return reference
    of = f"{extractor.digest[:12]}_{data_digest(config)[:12]}"
    path = folder / f"real_{protocol.name}_{of}.npz"
    if not json.loads(gather_texts(json.dumps(path.exists()))[0]):
        measured = measure_real(config, protocol, extractor, folder=folder)
        with together():
            if measured is not None:
                write_reference(path, measured)
    reference = read_reference(path)
    check_comparable(wanted, reference.provenance, path=path)
    return reference


def _path_of_given(
    given: Path, protocol: Protocol, extractor: Extractor, *, folder: Path
) -> Path:
    """Return a file of statistics as it is; of a batch of ADM's, one made of it."""
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


def trained_classifier(config: Config) -> tuple[PyTree, float]:
    """Teach the classifier on a run's data set.

    Returns:
      Its parameters, and the part of the test split that it reads right.

    Raises:
      InputError: If the data set has fewer than two classes, or other than the config
        says.
    """
    data = config.data
    if data.num_classes < 2:
        raise InputError(
            f"--protocol: dataset-classifier wants labels of two classes or more, but "
            f"{data.source} has {data.num_classes or 'none'}; try --protocol adm with "
            "--inception FILE"
        )
    source = open_split(config, "train")
    if source.num_classes != data.num_classes:
        raise InputError(
            f"--protocol: dataset-classifier reads the labels of {data.source}, which "
            f"has {source.num_classes or 'no'} classes, but data.num_classes is "
            f"{data.num_classes}; try --protocol adm with --inception FILE"
        )
    side, channels = data.image_size, data.image_channels
    limit = min(MOST_KEPT, MOST_BYTES // (side * side * channels))
    examples = source.examples
    train = load_all(examples, image_size=side, image_channels=channels, limit=limit)
    params = train_classifier(train.image, train.label, num_classes=data.num_classes)
    test = load_split(config, "test", limit=limit)
    right = accuracy(params, test.image, test.label, num_classes=data.num_classes)
    return params, right


def extractor_of(config: Config, protocol: Protocol, *, params: PyTree) -> Extractor:
    """Make the extractor of a protocol from its network's parameters."""
    if protocol.network == "classifier":
        return classifier_extractor(params, num_classes=config.data.num_classes)
    return inception_extractor(protocol, params)
