"""A whole run: train the stages that are not finished, and record the result."""

import functools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ldm_jax import config as config_lib
from ldm_jax.build import build_model, load_split, open_iterator, open_split
from ldm_jax.config import OWN_LATENTS, Config
from ldm_jax.evaluation.online import check_scores, make_measure
from ldm_jax.files import ANEW, write_json
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.parallel.make_layout import Layout, PmapLayout, make_layout
from ldm_jax.parallel.multihost import (
    StopSignal,
    check_same,
    first_alone,
    gather_texts,
    stop_signal,
    together,
)
from ldm_jax.pretrained.first_stage import load_first_stage
from ldm_jax.pretrained.frozen import (
    PretrainedWeights,
    load_frozen,
    open_encoders,
    read_frozen,
    save_frozen,
)
from ldm_jax.pretrained.load_run import (
    Run,
    load_run,
    load_weights,
    run_weights,
)
from ldm_jax.pretrained.load_stage import load_second_stage
from ldm_jax.rng import root_key
from ldm_jax.sampling.pipeline import platform_text
from ldm_jax.sampling.preview import make_preview
from ldm_jax.training.autoencoder_stage import autoencoder_stage, latent_scale
from ldm_jax.training.diffusion_stage import diffusion_stage
from ldm_jax.training.diffusion_step import FrozenParams
from ldm_jax.training.digest import run_digest, tree_digest
from ldm_jax.training.dry_run import check_batches
from ldm_jax.training.encode_latents import keep_latents
from ldm_jax.training.latent_cache import Cache, check_cache, open_cache, open_latents
from ldm_jax.training.loop import Finished, LoopConfig, Stage, run_stage
from ldm_jax.training.train_tokenizer import (
    keep_tokenizer,
    tokenizer_notes,
    with_own_tokenizer,
)
from ldm_jax.training.workdir import (
    FINAL_FILE,
    check_files,
    check_workdir,
    facts_of,
    open_workdir,
    read_final,
    record_stage,
    restore_record,
)
from ldm_jax.types import RunError

__all__ = [
    "Outcome",
    "Run",
    "load_run",
    "load_weights",
    "run_digest",
    "run_weights",
    "train",
]


class Outcome(NamedTuple):
    """The result of a run."""

    final: dict[str, Any]
    """The content of `final.json`."""
    trained: bool
    """False if the run was finished already."""


class StageOutcome(NamedTuple):
    """The result of a stage, as `final.json` records it."""

    digest: str
    """sha256 over its state, or over the parameters that were read."""
    seconds: float
    """Training time; 0 if the stage was not trained."""


class FirstStage(NamedTuple):
    """A finished first stage."""

    params: Any
    """Averaged parameters of the autoencoder."""
    latent_scale: Any
    """Factor from its latents to scaled latents."""
    outcome: StageOutcome
    """For `final.json`."""


def train(
    config: Config, workdir: Path, *, profile: tuple[int, int] | None = None
) -> Outcome:
    """Train the stages of a run that are not finished, and write `final.json`.

    On several processes, each calls this with the same arguments and a shared folder.

    Args:
      config: Equals the config in the folder, except `parallel`.
      workdir: Folder of the run; created if it does not exist.
      profile: First and last step of a trace of each stage; None traces nothing.

    Raises:
      InputError: If the folder belongs to another config or another process, a batch
        does not divide by the devices, the data cannot be read, or the processes
        differ.
      Preempted: If the process was asked to stop (SIGTERM); the state is saved.
      RunError: If a loss is not finite, or no checkpoint is intact.
      OSError: If a file cannot be written.
    """
    layout = make_layout(config.parallel)
    check_same(facts_of(config, layout))
    # Before the folder is created: a run that cannot start leaves nothing behind.
    first_alone(lambda: restore_record(workdir))
    with together():
        check_batches(config, layout)
        check_scores(config.scores, num_classes=config.data.num_classes)
        check_workdir(config, workdir)
        model = build_model(config)
    final_path = workdir / FINAL_FILE
    if gather_texts(str(final_path.exists()))[0] == str(True):
        with together():
            final = read_final(workdir)
        reading = {"autoencoder": lambda: load_first_stage(config, workdir).digest}
        if config.first_stage is not None:
            copied = functools.partial(load_frozen, config, model, workdir)
            reading["autoencoder"] = lambda: tree_digest(copied()[1:])
        if "diffusion" in config.stages:
            second = functools.partial(load_second_stage, config, model, workdir)
            reading["diffusion"] = lambda: second().digest
        if final is not None and _is_intact(workdir, final, reading=reading):
            return Outcome(final, trained=False)
    with together():
        weights = read_frozen(config, model, workdir)
        for split in ("test", "train"):
            open_split(config, split)
        note = check_cache(
            config,
            model,
            workdir,
            first_stage=weights.first_stage and weights.first_stage[0],
            conditioner=weights.conditioner,
        )

    with open_workdir(config, workdir), stop_signal() as stop:
        first_alone(lambda: save_frozen(weights, workdir))
        first_alone(lambda: keep_tokenizer(config, workdir))
        opened = with_own_tokenizer(config, workdir)
        run = functools.partial(
            _run_stage,
            config=config,
            workdir=workdir,
            layout=layout,
            profile=profile,
            stop=stop,
        )
        first = _first_stage(opened, model, workdir, layout, weights=weights, run=run)
        outcomes = {"autoencoder": first.outcome}
        if "diffusion" in config.stages:
            frozen = FrozenParams(first.params, first.latent_scale, weights.conditioner)
            if config.data.latents == OWN_LATENTS:
                with stop.at_once(f"{OWN_LATENTS} latents are not all made"):
                    opened, note = keep_latents(
                        opened, workdir, open_encoders=open_encoders
                    )
            with together():
                cache = open_cache(opened, frozen.autoencoder, note)
            stage = _diffusion_stage(opened, model, workdir, frozen, cache=cache)
            finished = run(stage, cache=cache)
            first_alone(lambda: record_stage(workdir, stage.name, finished.digest))
            outcomes["diffusion"] = StageOutcome(finished.digest, finished.seconds)
        digests = {name: outcome.digest for name, outcome in outcomes.items()}
        final = {
            "digest": run_digest(digests),
            "digest_by_stage": digests,
            "seconds_by_stage": {k: round(v.seconds, 1) for k, v in outcomes.items()},
            "latent_scale": float(first.latent_scale),
            "config_digest": config_lib.digest(config),
            "trained_on": f"{layout.num_devices} x {platform_text(PmapLayout())}",
        }
        first_alone(lambda: write_json(final_path, final, run=workdir))
        return Outcome(final, trained=True)


def _is_intact(
    workdir: Path, final: dict[str, Any], *, reading: dict[str, Callable[[], str]]
) -> bool:
    """Return whether a finished run is still what `final.json` says; reads it all.

    Args:
      reading: Reads a stage and returns its digest, by the stage's name.

    Raises:
      InputError: If a file of the run is damaged.
      RunError: If `final.json` is of another run.
    """
    with together():
        if not check_files(workdir):
            return False
    try:
        digests = {name: read() for name, read in reading.items()}
    except RunError as error:
        logging.getLogger(__name__).warning("trained again from there: %s", error)
        return False
    if digests != final.get("digest_by_stage", digests):
        raise RunError(
            f"{workdir / FINAL_FILE}: got digests that are not those of the run's "
            f"checkpoints; {ANEW}"
        )
    return True


def _first_stage(
    config: Config,
    model: LatentDiffusion,
    workdir: Path,
    layout: Layout,
    *,
    weights: PretrainedWeights,
    run: Any,
) -> FirstStage:
    """Train the first stage and measure its latent scale, unless both were read."""
    if weights.first_stage is not None:
        outcome = StageOutcome(tree_digest(weights[1:]), 0.0)
        return FirstStage(*weights.first_stage, outcome)
    stage = autoencoder_stage(config, model, workdir, perceptual=weights.perceptual)
    finished = run(stage)
    first_alone(lambda: record_stage(workdir, stage.name, finished.digest))
    scale = latent_scale(config, model, finished.ema, layout, workdir)
    outcome = StageOutcome(finished.digest, finished.seconds)
    return FirstStage(finished.ema, scale, outcome)


def _diffusion_stage(
    config: Config,
    model: LatentDiffusion,
    workdir: Path,
    frozen: FrozenParams,
    *,
    cache: Cache | None,
) -> Stage:
    """Build the diffusion stage with its previews and scores."""
    stage = diffusion_stage(
        config,
        model,
        frozen,
        workdir,
        null_embedding=None if cache is None else cache.null_embedding,
    )
    draw = make_preview(
        model,
        frozen,
        workdir,
        preview=config.sampling,
        load_test=lambda num: load_split(config, "test", limit=num),
        seed=config.seed,
    )
    stage = stage._replace(draw=draw)
    if config.scores.every:
        measure = make_measure(config, model, frozen, workdir)
        stage = stage._replace(measure=measure)
    return stage


def _run_stage(
    stage: Stage,
    *,
    config: Config,
    workdir: Path,
    layout: Layout,
    profile: tuple[int, int] | None,
    stop: StopSignal,
    cache: Cache | None = None,
) -> Finished:
    batch_size = stage.batch_size
    if cache is None:
        opened = with_own_tokenizer(config, workdir)
        iterator = open_iterator(opened, batch_size=batch_size, layout=layout)
    else:
        iterator = open_latents(
            cache, seed=config.seed, batch_size=batch_size, layout=layout
        )
    notes = {"config": json.loads(config_lib.to_json(config))}
    if stage.name == "diffusion":
        notes |= tokenizer_notes(config, workdir)
    return run_stage(
        stage,
        loop_config=LoopConfig(
            workdir,
            config.checkpoint,
            config.log,
            config.parallel,
            max_skipped=config.max_skipped_steps,
            profile=profile,
            scores_every=config.scores.every,
        ),
        layout=layout,
        iterator=iterator,
        root_key=root_key(config.seed),
        notes=notes,
        stop=stop,
    )
