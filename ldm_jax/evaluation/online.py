"""A run scored while it is trained, as `ldm evaluate` scores it after.

WORKDIR/evaluation/            the taught classifier and statistics of real images
WORKDIR/diffusion/scoring/     features of the samples, until they are scored
"""

import shutil
from pathlib import Path

from ldm_jax.config import Config
from ldm_jax.evaluation.classifier import WIDTH
from ldm_jax.evaluation.evaluate import FOLDER, score_samples
from ldm_jax.evaluation.protocols import protocol_of
from ldm_jax.evaluation.request import check_network
from ldm_jax.evaluation.samples import draw_shards, read_shards
from ldm_jax.evaluation.scores import check_enough, score
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.models.inception import NUM_FEATURES
from ldm_jax.parallel.multihost import first_alone, gather_texts, together
from ldm_jax.pretrained.load_run import Run
from ldm_jax.sampling.pipeline import make_fn, make_pipeline
from ldm_jax.sampling.sampling_config import SamplingConfig
from ldm_jax.training.diffusion_stage import sample_params
from ldm_jax.training.diffusion_step import Denoising, Frozen
from ldm_jax.training.digest import tree_digest
from ldm_jax.training.metrics import HOW, Measure, ScoreRecord
from ldm_jax.types import InputError

FEATURES = "scoring"
HELD_OUT = "held_out_fid"


def check_scores(config: Config) -> None:
    """Refuse what cannot be measured before a run is begun.

    Raises:
      InputError: If the network's weights are missing, there is nothing to teach a
        classifier, or there are too few images for a covariance.
    """
    asked = config.scores
    if not asked.every:
        return
    protocol = protocol_of(asked.protocol)
    inception = None if asked.inception is None else Path(asked.inception)
    check_network(protocol, inception, flag="--scores.inception")
    if inception is not None and not inception.is_file():
        raise InputError(f"--scores.inception: no file {inception}")
    if protocol.network == "classifier" and config.data.num_classes < 2:
        raise InputError(
            f"scores.protocol: got {asked.protocol}, which wants labels of two classes "
            f"or more, but data.num_classes is {config.data.num_classes}; try adm with "
            "--scores.inception FILE"
        )
    width = WIDTH if protocol.network == "classifier" else NUM_FEATURES
    check_enough(asked.images, width, what="scores.images")


def make_measure(
    config: Config, model: LatentDiffusion, frozen: Frozen, workdir: Path
) -> Measure:
    """Make what scores averaged weights during training; every process calls it.

    The classifier is taught, and real images are looked at, here: what fails does so
    before the first step.

    Args:
      config: Of the run, with its own tokenizer.
      frozen: What stage 2 does not train.
      workdir: Of the run, with its config in it.

    Returns:
      A function that all processes call, which shares the samples among them.

    Raises:
      InputError: If weights or data cannot be read, or settings have no meaning for the
        model.
      OSError: If something cannot be written.
    """
    asked, protocol = config.scores, protocol_of(config.scores.protocol)
    measured = score_samples(
        config,
        protocol,
        inception=None if asked.inception is None else Path(asked.inception),
        reference=None,
        folder=workdir / FOLDER,
        num_images=asked.images,
        what="scores.images",
    )
    nothing = sample_params(frozen, Denoising({}, {}))
    settings = SamplingConfig(
        workdir=str(workdir),
        sampler=asked.sampler,
        steps=asked.steps,
        guidance_scale=(asked.guidance_scale,),
    )
    pipeline = make_pipeline(Run(config, model, nothing, "", 0), settings)
    condition = config.diffusion.condition
    guided = condition.uses_classes or condition.uses_tokens
    # Made once, so that it is compiled once for all the weights to come.
    sample_fn = make_fn(pipeline, guided=guided, num_frames=0)
    kept = workdir / "diffusion" / FEATURES

    how = (
        f"{protocol.name}, {asked.images:,} samples, {asked.sampler} {asked.steps}, "
        f"guidance {asked.guidance_scale:g}"
    )

    def measure(trained: Denoising, step: int) -> ScoreRecord:
        run = pipeline.run._replace(params=sample_params(frozen, trained), step=step)
        # Features of other weights, as of a run that was killed and went on elsewhere,
        # are never taken for these.
        of = gather_texts(tree_digest(trained)[:12])[0]
        folder = kept / f"{step:06d}_{of}"
        first_alone(lambda: folder.mkdir(parents=True, exist_ok=True))
        with together():
            draw_shards(
                pipeline._replace(run=run, sample_fn=sample_fn),
                measured.extractor,
                folder,
                num_images=asked.images,
                shows_progress=False,
            )

        def scored() -> ScoreRecord:
            made = read_shards(folder, num_images=asked.images)
            found = score(protocol, made, measured.reference)
            if measured.held_out is not None:
                found[HELD_OUT] = measured.held_out["fid"]
            shutil.rmtree(kept)
            numbers = {k: float(v) for k, v in found.items() if v is not None}
            return {**numbers, HOW: how}

        return first_alone(scored) or {}

    return measure
