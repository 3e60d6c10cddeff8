"""A run scored: samples of its seeds compared with real images.

OUT/NAME/features_000000.npz    features of 256 samples
OUT/NAME/samples.png            the first samples
OUT/NAME/metrics.json           the scores, and the settings that reproduce them
OUT/real_PROTOCOL_....npz       statistics of the run's own data
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from ldm_jax.build import build_model
from ldm_jax.config import read_config
from ldm_jax.evaluation.classifier import fit_classifier
from ldm_jax.evaluation.dataset import Dataset, data_digest, dataset_of, load_images
from ldm_jax.evaluation.dataset_statistics import real_statistics
from ldm_jax.evaluation.extractors import Extractor, extractor_of
from ldm_jax.evaluation.features import Reference, read_arrays, write_arrays
from ldm_jax.evaluation.protocols import Protocol
from ldm_jax.evaluation.reconstruction import (
    ImageQuality,
    score_reconstructions,
    write_image_quality,
)
from ldm_jax.evaluation.request import EvaluationRequest
from ldm_jax.evaluation.samples import extract_samples, read_features
from ldm_jax.evaluation.scores import Scores, check_enough, score
from ldm_jax.files import json_digest, write_json
from ldm_jax.parallel.multihost import first_alone, from_first, is_first, together
from ldm_jax.pretrained.frozen import first_stage_of, load_frozen
from ldm_jax.pretrained.layouts import flatten, unflatten
from ldm_jax.pretrained.metric_networks import load_inception
from ldm_jax.sampling.metadata import PRECISION, versions
from ldm_jax.sampling.pipeline import Pipeline, open_pipeline
from ldm_jax.sampling.sampling_config import SamplingConfig
from ldm_jax.types import InputError, PyTree

FOLDER = "evaluation"
"""Folder of a run for statistics, features and scores."""
ACCURACY = "accuracy"


class MetricNetwork(NamedTuple):
    """A protocol's network."""

    params: PyTree
    """Its parameters."""
    accuracy: float | None
    """Accuracy of the classifier on held-out images; None for Inception."""


class Scorer(NamedTuple):
    """Network and statistics that score samples, the same for all settings."""

    extractor: Extractor
    """Extracts features."""
    reference: Reference
    """Statistics of real images."""
    accuracy: float | None
    """As in `MetricNetwork`."""
    held_out: Scores | None
    """Scores of held-out images; None where they are too few."""
    num_held_out: int
    """Number of held-out images."""


def make_scorer(
    dataset: Dataset,
    protocol: Protocol,
    *,
    inception: Path | None,
    reference: Path | None,
    folder: Path,
    num_images: int,
    what: str,
) -> Scorer:
    """Load the network and the statistics, or make them; every process calls this.

    Args:
      inception: File of Inception's weights, or None for the classifier.
      reference: File of statistics to compare with; None for the run's own data.
      folder: Where both are kept; made if it does not exist.
      num_images: Number of samples to come; of held-out images as many are scored.
      what: Source of that number, for messages.

    Raises:
      InputError: If the weights or the statistics cannot be read or do not fit each
        other, or there are too few images.
      OSError: If something cannot be written.
    """
    first_alone(lambda: folder.mkdir(parents=True, exist_ok=True))
    first_alone(lambda: load_network(dataset, inception, folder))
    network = load_network(dataset, inception, folder)
    num_classes = dataset.data.num_classes
    extractor = extractor_of(protocol, network.params, num_classes=num_classes)
    real = real_statistics(dataset, protocol, extractor, given=reference, folder=folder)
    check_enough(num_images, len(real.pooled.mean), what=what)
    images = load_images(dataset, "test", limit=num_images).image
    held_out = None
    if is_first():
        held_out = _held_out(protocol, images, extractor, real)
    return Scorer(extractor, real, network.accuracy, held_out, len(images))


def load_network(
    dataset: Dataset, inception: Path | None, folder: Path
) -> MetricNetwork:
    """Read Inception, or the classifier, which is trained first if it does not exist.

    Args:
      inception: File of Inception's weights, or None for the classifier.
      folder: Where the classifier is kept.

    Raises:
      InputError: If the file cannot be read, or the data set has no classes.
      OSError: If the classifier cannot be written.
    """
    if inception is not None:
        return MetricNetwork(load_inception(inception), None)
    path = folder / f"classifier_{data_digest(dataset.data)[:12]}.npz"
    if not path.exists():
        made = fit_classifier(dataset)
        arrays = {name: np.asarray(x) for name, x in flatten(made.params).items()}
        write_arrays(path, {**arrays, ACCURACY: np.asarray(made.accuracy)})
    arrays = read_arrays(path)
    accuracy = float(arrays.pop(ACCURACY, np.nan))
    return MetricNetwork(unflatten(arrays), accuracy)


def _held_out(
    protocol: Protocol,
    images: UInt8[np.ndarray, "n h w c"],
    extractor: Extractor,
    reference: Reference,
) -> Scores | None:
    """Score held-out images as if they were samples; None where they are too few."""
    try:
        return score(protocol, extractor.extract(images), reference)
    except InputError:
        return None


METRICS_FILE = "metrics.json"


class Outcome(NamedTuple):
    """Scores of samples of one setting."""

    path: Path
    """Path of `metrics.json`."""
    settings: SamplingConfig
    """The setting."""
    scores: Scores
    """Scores of the samples."""
    held_out: Scores | None
    """Scores of held-out images; None where they are too few."""


class Reconstructed(NamedTuple):
    """Scores of a first stage."""

    path: Path
    """Path of the file of scores."""
    quality: ImageQuality
    """The scores."""


def evaluate(request: EvaluationRequest) -> list[Outcome]:
    """Sample what is missing, and score, one setting after the other.

    Several processes share the sampling; the first one scores.

    Returns:
      An outcome for each setting; nothing on all processes but the first.

    Raises:
      InputError: If the run, the weights or the statistics cannot be read or do not fit
        each other, or there are too few images.
      RunError: If no checkpoint is intact.
      OSError: If something cannot be written; features made before it stay.
    """
    config = open_pipeline(request.settings[0]).run.config
    scorer = make_scorer(
        dataset_of(config),
        request.protocol,
        inception=request.inception,
        reference=request.reference,
        folder=request.out,
        num_images=request.num_images,
        what="--num-images",
    )
    found = (_evaluate(request, settings, scorer) for settings in request.settings)
    return [outcome for outcome in found if outcome is not None]


def evaluate_first_stage(request: EvaluationRequest) -> Reconstructed | None:
    """Score the first stage of a run on held-out images.

    Returns:
      The scores; None on all processes but the first.

    Raises:
      InputError: If the run, the data or the weights cannot be read.
      RunError: If no checkpoint is intact.
      OSError: If something cannot be written.
    """
    if not is_first():
        return None
    config = read_config(request.workdir)
    model = build_model(config)
    model = model._replace(precision=request.precision or model.precision)
    frozen_weights = load_frozen(config, model, request.workdir)
    params = first_stage_of(config, frozen_weights, request.workdir).params
    dataset, protocol = dataset_of(config), request.protocol
    request.out.mkdir(parents=True, exist_ok=True)
    extractor, num_classes = None, config.data.num_classes
    if request.inception is not None or num_classes > 1:
        network = load_network(dataset, request.inception, request.out)
        extractor = extractor_of(protocol, network.params, num_classes=num_classes)
    quality = score_reconstructions(
        model,
        params,
        load_images(dataset, "test", limit=request.num_images).image,
        extractor=extractor,
        lpips_files=request.lpips,
    )
    path = request.out / f"reconstructions_{protocol.name}.json"
    write_image_quality(
        path, quality, config.data, protocol, extractor, precision=model.precision
    )
    return Reconstructed(path, quality)


def _evaluate(
    request: EvaluationRequest, settings: SamplingConfig, scorer: Scorer
) -> Outcome | None:
    pipeline = open_pipeline(settings)
    facts = _facts(request, pipeline, scorer.extractor)
    # The first process' name: it depends on the processor, which may differ by host.
    folder = request.out / from_first(_name(request, settings, facts))
    folder.mkdir(exist_ok=True)
    with together():  # a process that fails to write does not leave others waiting
        made = extract_samples(
            pipeline, scorer.extractor, folder, num_images=request.num_images
        )
    if not is_first():
        return None
    features = read_features(folder, num_images=request.num_images)
    scores = score(request.protocol, features, scorer.reference)
    path = folder / METRICS_FILE
    report = {
        "scores": scores,
        "held_out_scores": scorer.held_out,
        "num_held_out": scorer.num_held_out,
        **facts,
        PRECISION: pipeline.model.precision,
        "real": scorer.reference.provenance._asdict(),
        "classifier_accuracy": scorer.accuracy,
        # Those of this command only, if it resumed another one.
        "images_drawn": made.num_images,
        "seconds_of_sampling": made.seconds,
        "devices": pipeline.layout.num_devices,
        "versions": json.loads(versions()),
    }
    write_json(path, report)
    return Outcome(path, settings, scores, scorer.held_out)


def _facts(
    request: EvaluationRequest, pipeline: Pipeline, extractor: Extractor
) -> dict[str, Any]:
    """Collect what determines the features, as strict JSON."""
    settings = dataclasses.asdict(pipeline.settings)
    given = {k: v for k, v in settings.items() if v not in (None, False, "")}
    for name in ("workdir", PRECISION):  # what is in `made_with`
        given.pop(name, None)
    return {
        "protocol": request.protocol._asdict(),
        "network": extractor.digest,
        "settings": given,
        "made_with": dict(pipeline.made_with),
        "seeds": f"0-{request.num_images - 1}",
        "shows": "classes in turn, or the held-out captions in order",
    }


def _name(
    request: EvaluationRequest, settings: SamplingConfig, facts: dict[str, Any]
) -> str:
    """Name the folder of a setting's samples, whose number may grow."""
    kept = {k: v for k, v in facts.items() if k != "seeds"}
    digest = json_digest(kept)
    scale = ",".join(f"{value:g}" for value in settings.guidance_scale)
    parts = [request.protocol.name, f"{settings.sampler}{settings.steps}", f"g{scale}"]
    if settings.ema_length is not None:
        parts.append(f"ema{settings.ema_length:g}")
    return "_".join([*parts, digest[:8]])
