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

from ldm_jax.evaluation.request import EvaluationRequest
from ldm_jax.evaluation.scores import Scores, score
from ldm_jax.recipes import versions
from ldm_jax.scoring.extractors import Extractor
from ldm_jax.scoring.judging import Judged, judge, load_network
from ldm_jax.scoring.real import extractor_of
from ldm_jax.scoring.reconstructions import (
    Likeness,
    first_stage_of,
    score_reconstructions,
    write_likeness,
)
from ldm_jax.scoring.samples import draw_shards, read_shards
from ldm_jax.settings import Settings
from ldm_jax.studio import Studio, open_studio
from ldm_jax.training.files import write_json
from ldm_jax.training.hosts import gather_texts, is_first, together

METRICS_FILE = "metrics.json"


class Outcome(NamedTuple):
    """What was found of samples made in one way.

    Attributes:
      path: Of `metrics.json`.
      settings: How they were made.
      scores: Theirs.
      held_out: Of real images that the run has not seen; None where they are too few.
    """

    path: Path
    settings: Settings
    scores: Scores
    held_out: Scores | None


class Reconstructed(NamedTuple):
    """What was found of a first stage.

    Attributes:
      path: Of the file of scores.
      likeness: The scores.
    """

    path: Path
    likeness: Likeness


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
    config = open_studio(request.settings[0]).run.config
    judged = judge(
        config,
        request.protocol,
        inception=request.inception,
        reference=request.reference,
        folder=request.out,
        num_images=request.num_images,
        what="--num-images",
    )
    found = (_evaluate(request, settings, judged) for settings in request.settings)
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
    write_likeness(path, found, config, request.protocol, extractor)
    return Reconstructed(path, found)


def _evaluate(
    request: EvaluationRequest, settings: Settings, judged: Judged
) -> Outcome | None:
    studio = open_studio(settings)
    facts = _facts(request, studio, judged.extractor)
    # The first one's name: it tells of the processor, which may differ among machines.
    folder = request.out / gather_texts(_name(request, settings, facts))[0]
    folder.mkdir(exist_ok=True)
    with together():  # one that cannot write leaves no other waiting
        drawn = draw_shards(
            studio, judged.extractor, folder, num_images=request.num_images
        )
    if not is_first():
        return None
    made = read_shards(folder, num_images=request.num_images)
    scores = score(request.protocol, made, judged.reference)
    path = folder / METRICS_FILE
    report = {
        "scores": scores,
        "held_out_scores": judged.held_out,
        "num_held_out": judged.num_held_out,
        **facts,
        "real": judged.reference.provenance._asdict(),
        "classifier_accuracy": judged.accuracy,
        # Of this command: a part of them where it went on.
        "images_drawn": drawn.num_images,
        "seconds_of_sampling": drawn.seconds,
        "devices": studio.layout.num_devices,
        "versions": json.loads(versions()),
    }
    write_json(path, report)
    return Outcome(path, settings, scores, judged.held_out)


def _facts(
    request: EvaluationRequest, studio: Studio, extractor: Extractor
) -> dict[str, Any]:
    """Collect what decides the features, as strict JSON."""
    settings = dataclasses.asdict(studio.settings)
    given = {k: v for k, v in settings.items() if v not in (None, False, "")}
    given.pop("workdir", None)
    return {
        "protocol": request.protocol._asdict(),
        "network": extractor.digest,
        "settings": given,
        "made_with": dict(studio.made_with),
        "seeds": f"0-{request.num_images - 1}",
        "shows": "classes in turn, or the held-out captions in order",
    }


def _name(request: EvaluationRequest, settings: Settings, facts: dict[str, Any]) -> str:
    """Name the folder of samples made in one way; their number may grow."""
    kept = {k: v for k, v in facts.items() if k != "seeds"}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
    scale = ",".join(f"{value:g}" for value in settings.guidance_scale)
    parts = [request.protocol.name, f"{settings.sampler}{settings.steps}", f"g{scale}"]
    if settings.ema_length is not None:
        parts.append(f"ema{settings.ema_length:g}")
    return "_".join([*parts, digest[:8]])
