"""A run scored during training, as `ldm evaluate` scores it afterwards.

WORKDIR/evaluation/            the trained classifier and statistics of real images
WORKDIR/diffusion/scoring/     features of the samples, until they are scored
"""

import shutil
from pathlib import Path

from ldm_jax.config import Config, ScoresConfig
from ldm_jax.evaluation.classifier import WIDTH
from ldm_jax.evaluation.dataset import dataset_of
from ldm_jax.evaluation.evaluate import FOLDER, make_scorer
from ldm_jax.evaluation.protocols import protocol_of
from ldm_jax.evaluation.request import check_network
from ldm_jax.evaluation.samples import extract_samples, read_features
from ldm_jax.evaluation.scores import check_enough, score
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.models.inception import NUM_FEATURES
from ldm_jax.parallel.multihost import first_alone, from_first, together
from ldm_jax.pretrained.load_run import Run
from ldm_jax.sampling.pipeline import make_fn, make_pipeline
from ldm_jax.sampling.sampling_config import SamplingConfig
from ldm_jax.training.diffusion_stage import sample_params
from ldm_jax.training.diffusion_step import DiffusionParams, FrozenParams
from ldm_jax.training.digest import tree_digest
from ldm_jax.training.metrics import HOW, Measure, ScoreRecord
from ldm_jax.types import InputError

FEATURES = "scoring"
HELD_OUT = "held_out_fid"


def check_scores(scores: ScoresConfig, *, num_classes: int) -> None:
    """Check before a run begins that it can be scored.

    Args:
      num_classes: Classes of the data set; 0 if it has none.

    Raises:
      InputError: If the network's weights are missing, the classifier has no labels to
        be trained on, or there are too few images for a covariance.
    """
    if not scores.every:
        return
    protocol = protocol_of(scores.protocol)
    inception = None if scores.inception is None else Path(scores.inception)
    check_network(protocol, inception, flag="--scores.inception")
    if inception is not None and not inception.is_file():
        raise InputError(f"--scores.inception: no file {inception}")
    if protocol.network == "classifier" and num_classes < 2:
        raise InputError(
            f"scores.protocol: got {scores.protocol}, which wants labels of two "
            f"classes or more, but data.num_classes is {num_classes}; try adm with "
            "--scores.inception FILE"
        )
    width = WIDTH if protocol.network == "classifier" else NUM_FEATURES
    check_enough(scores.images, width, what="scores.images")


def make_measure(
    config: Config, model: LatentDiffusion, frozen: FrozenParams, workdir: Path
) -> Measure:
    """Make a function that scores averaged weights; every process calls it.

    The classifier is trained and real images are measured here, so that errors come
    before the first step.

    Args:
      config: Config of the run, with its own tokenizer.
      frozen: What the diffusion stage does not train.
      workdir: Folder of the run.

    Returns:
      A function that all processes call, which shares the samples among them.

    Raises:
      InputError: If weights or data cannot be read, or settings have no meaning for the
        model.
      OSError: If something cannot be written.
    """
    scores, protocol = config.scores, protocol_of(config.scores.protocol)
    scorer = make_scorer(
        dataset_of(config),
        protocol,
        inception=None if scores.inception is None else Path(scores.inception),
        reference=None,
        folder=workdir / FOLDER,
        num_images=scores.images,
        what="scores.images",
    )
    settings = SamplingConfig(
        workdir=str(workdir),
        sampler=scores.sampler,
        steps=scores.steps,
        guidance_scale=(scores.guidance_scale,),
    )
    condition = config.diffusion.condition
    model = model._replace(condition=condition)  # with a trained tokenizer
    nothing = sample_params(frozen, DiffusionParams({}, {}))
    pipeline = make_pipeline(Run(config, model, nothing, "", 0), settings)
    guided = condition.uses_classes or condition.uses_tokens
    # Made and compiled once, for all weights.
    sample_fn = make_fn(pipeline, guided=guided, num_frames=0)
    features = workdir / "diffusion" / FEATURES

    how = (
        f"{protocol.name}, {scores.images:,} samples, {scores.sampler} {scores.steps}, "
        f"guidance {scores.guidance_scale:g}"
    )

    def measure(trained: DiffusionParams, step: int) -> ScoreRecord:
        run = pipeline.run._replace(params=sample_params(frozen, trained), step=step)
        # The name has a digest of the weights: a killed run may resume elsewhere, with
        # other weights at the same step.
        of = from_first(tree_digest(trained)[:12])
        folder = features / f"{step:06d}_{of}"
        first_alone(lambda: folder.mkdir(parents=True, exist_ok=True))
        with together():
            extract_samples(
                pipeline._replace(run=run, sample_fn=sample_fn),
                scorer.extractor,
                folder,
                num_images=scores.images,
                shows_progress=False,
            )

        def scored() -> ScoreRecord:
            made = read_features(folder, num_images=scores.images)
            found = score(protocol, made, scorer.reference)
            if scorer.held_out is not None:
                found[HELD_OUT] = scorer.held_out["fid"]
            shutil.rmtree(features)
            numbers = {k: float(v) for k, v in found.items() if v is not None}
            return {**numbers, HOW: how}

        return first_alone(scored) or {}

    return measure
