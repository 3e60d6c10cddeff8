"""A run scored: its seeds drawn, looked at and compared with real images.

OUT/NAME/features_000000.npz    what the network says of 256 samples
OUT/NAME/samples.png            the first of them, to look at
OUT/NAME/metrics.json           the scores, and all that it takes to repeat them
OUT/real_PROTOCOL_....npz       statistics of the run's own data
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from ldm_jax.build import load_split
from ldm_jax.config import Config
from ldm_jax.evaluation.dataset_statistics import (
    data_digest,
    extractor_of,
    real_statistics,
    trained_classifier,
)
from ldm_jax.evaluation.extractors import Extractor, extract_all
from ldm_jax.evaluation.features import Reference, read_arrays, write_arrays
from ldm_jax.evaluation.measure_dataset import ROWS
from ldm_jax.evaluation.protocols import Protocol
from ldm_jax.evaluation.reconstruction import (
    ImageQuality,
    first_stage_of,
    score_reconstructions,
    write_image_quality,
)
from ldm_jax.evaluation.request import EvaluationRequest
from ldm_jax.evaluation.samples import draw_shards, read_shards
from ldm_jax.evaluation.scores import Scores, check_enough, score
from ldm_jax.files import write_json
from ldm_jax.parallel.multihost import first_alone, gather_texts, is_first, together
from ldm_jax.pretrained.layouts import flatten, unflatten
from ldm_jax.pretrained.metric_networks import load_inception
from ldm_jax.sampling.metadata import versions
from ldm_jax.sampling.pipeline import Pipeline, open_pipeline
from ldm_jax.sampling.sampling_config import SamplingConfig
from ldm_jax.types import InputError, PyTree

FOLDER = "evaluation"
"""Of a run, where what is measured is kept."""
ACCURACY = "accuracy"


class Network(NamedTuple):
    """What looks at images."""

    params: PyTree
    """Of the protocol's network."""
    accuracy: float | None
    """Part of the held-out images that the classifier reads right; None of
    Inception."""


class Measured(NamedTuple):
    """What samples are measured by, the same for all ways of making them."""

    extractor: Extractor
    """Looks at images."""
    reference: Reference
    """Statistics of real ones."""
    accuracy: float | None
    """Of the classifier, as in `Network`."""
    held_out: Scores | None
    """Scores of held-out images; None where they are too few."""
    num_held_out: int
    """How many they are."""


def score_samples(
    config: Config,
    protocol: Protocol,
    *,
    inception: Path | None,
    reference: Path | None,
    folder: Path,
    num_images: int,
    what: str,
) -> Measured:
    """Take what measures a run, or make it, once; every process calls this.

    Args:
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
    return Measured(extractor, real, network.accuracy, held_out, len(images))


def load_network(config: Config, inception: Path | None, folder: Path) -> Network:
    """Read Inception, or the classifier; teach that first if it is not there.

    Args:
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
        params, right = trained_classifier(config)
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


METRICS_FILE = "metrics.json"


class Outcome(NamedTuple):
    """What was found of samples made in one way."""

    path: Path
    """Of `metrics.json`."""
    settings: SamplingConfig
    """How they were made."""
    scores: Scores
    """Theirs."""
    held_out: Scores | None
    """Of real images that the run has not seen; None where they are too few."""


class Reconstructed(NamedTuple):
    """What was found of a first stage."""

    path: Path
    """Of the file of scores."""
    quality: ImageQuality
    """The scores."""


def evaluate(request: EvaluationRequest) -> list[Outcome]:
    """Draw what is missing, and score all; one way of making samples after the other.

    Several processes share the samples; the first one scores.

    Args:
      request: What to measure, and how.

    Returns:
      What was found of each; nothing on all processes but the first.

    Raises:
      InputError: If the run, the weights or the statistics cannot be read or do not fit
        each other, or there are too few images.
      RunError: If no checkpoint is intact.
      OSError: If something cannot be written; features made before it stay.
    """
    config = open_pipeline(request.settings[0]).run.config
    measured = score_samples(
        config,
        request.protocol,
        inception=request.inception,
        reference=request.reference,
        folder=request.out,
        num_images=request.num_images,
        what="--num-images",
    )
    found = (_evaluate(request, settings, measured) for settings in request.settings)
    return [outcome for outcome in found if outcome is not None]


def evaluate_first_stage(request: EvaluationRequest) -> Reconstructed | None:
    """Measure the first stage of a run on held-out images.

    Args:
      request: What to measure, and how.

    Returns:
      What was found; None on all processes but the first.

    Raises:
      InputError: If the run, the data or the weights cannot be read.
      RunError: If no checkpoint is intact.
      OSError: If something cannot be written.
    """
    if not is_first():
        return None
    config, params = first_stage_of(request.workdir)
    request.out.mkdir(parents=True, exist_ok=True)
    extractor = None
    if request.inception is not None or config.data.num_classes > 1:
        network = load_network(config, request.inception, request.out)
        extractor = extractor_of(config, request.protocol, params=network.params)
    found = score_reconstructions(
        config,
        params,
        extractor=extractor,
        lpips_files=request.lpips,
        num_images=request.num_images,
    )
    path = request.out / f"reconstructions_{request.protocol.name}.json"
    write_image_quality(path, found, config, request.protocol, extractor)
    return Reconstructed(path, found)


def _evaluate(
    request: EvaluationRequest, settings: SamplingConfig, measured: Measured
) -> Outcome | None:
    pipeline = open_pipeline(settings)
    facts = _facts(request, pipeline, measured.extractor)
    # The first one's name: it tells of the processor, which may differ among machines.
    folder = request.out / gather_texts(_name(request, settings, facts))[0]
    folder.mkdir(exist_ok=True)
    with together():  # one that cannot write leaves no other waiting
        drawn = draw_shards(
            pipeline, measured.extractor, folder, num_images=request.num_images
        )
    if not is_first():
        return None
    made = read_shards(folder, num_images=request.num_images)
    scores = score(request.protocol, made, measured.reference)
    path = folder / METRICS_FILE
    report = {
        "scores": scores,
        "held_out_scores": measured.held_out,
        "num_held_out": measured.num_held_out,
        **facts,
        "real": measured.reference.provenance._asdict(),
        "classifier_accuracy": measured.accuracy,
        # Of this command: a part of them where it went on.
        "images_drawn": drawn.num_images,
        "seconds_of_sampling": drawn.seconds,
        "devices": pipeline.layout.num_devices,
        "versions": json.loads(versions()),
    }
    write_json(path, report)
    return Outcome(path, settings, scores, measured.held_out)


def _facts(
    request: EvaluationRequest, pipeline: Pipeline, extractor: Extractor
) -> dict[str, Any]:
    """Collect what decides the features, as strict JSON."""
    settings = dataclasses.asdict(pipeline.settings)
    given = {k: v for k, v in settings.items() if v not in (None, False, "")}
    given.pop("workdir", None)
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
    """Name the folder of samples made in one way; their number may grow."""
    kept = {k: v for k, v in facts.items() if k != "seeds"}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
    scale = ",".join(f"{value:g}" for value in settings.guidance_scale)
    parts = [request.protocol.name, f"{settings.sampler}{settings.steps}", f"g{scale}"]
    if settings.ema_length is not None:
        parts.append(f"ema{settings.ema_length:g}")
    return "_".join([*parts, digest[:8]])
