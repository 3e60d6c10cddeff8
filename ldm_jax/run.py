"""A whole run: train the stages that are not finished, and record the result."""

import json
import logging
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

from ldm_jax import config as config_lib
from ldm_jax.build import build_model, load_split, open_iterator, open_split
from ldm_jax.config import OWN_LATENTS, Config, read_config
from ldm_jax.data.latent_cache import CacheNote
from ldm_jax.evaluation.online import check_scores, make_measure
from ldm_jax.files import ANEW, read_changes, write_json
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.parallel.make_layout import Layout, PmapLayout, make_layout
from ldm_jax.parallel.multihost import (
    StopSignal,
    check_same,
    first_alone,
    from_first,
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
from ldm_jax.pretrained.load_stage import load_second_stage, load_stage
from ldm_jax.rng import root_key
from ldm_jax.sampling.pipeline import platform_text
from ldm_jax.sampling.preview import make_preview
from ldm_jax.training.autoencoder_stage import autoencoder_stage, latent_scale
from ldm_jax.training.checkpoint import CHECKPOINTS, Checkpoint
from ldm_jax.training.diffusion_stage import diffusion_stage
from ldm_jax.training.diffusion_step import FrozenParams
from ldm_jax.training.digest import run_digest
from ldm_jax.training.dry_run import check_batches, check_memory
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
    Change,
    check_files,
    check_workdir,
    facts_of,
    open_workdir,
    read_final,
    record_stage,
    restore_record,
)
from ldm_jax.types import RunError


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


class TrainingRun(NamedTuple):
    """A run that trains."""

    config: Config
    """What it trains."""
    model: LatentDiffusion
    """The model that the config describes."""
    workdir: Path
    """Its folder."""
    layout: Layout
    """Its devices."""
    profile: tuple[int, int] | None
    """First and last step of a trace of each stage; None traces nothing."""
    notes: dict[str, Any]
    """Stored in every checkpoint."""


def train(
    config: Config,
    workdir: Path,
    *,
    changes: Collection[str] = (),
    profile: tuple[int, int] | None = None,
) -> Outcome:
    """Train the stages of a run that are not finished, and write `final.json`.

    On several processes, each calls this with the same arguments and a shared folder.

    Args:
      config: Equals the config in the folder, except `parallel` and `changes`.
      workdir: Folder of the run; created if it does not exist.
      changes: Names of fields, such as diffusion.steps, whose values replace those of
        the folder: the run goes on with them, and records the old ones.
      profile: First and last step of a trace of each stage; None traces nothing.

    Raises:
      InputError: If the folder belongs to another config or another process, a batch
        does not divide by the devices, the networks or a batch cannot fit them, the
        data cannot be read, or the processes differ.
      Preempted: If the process was asked to stop (SIGTERM); the state is saved.
      RunError: If a loss is not finite, or no checkpoint is intact.
      OSError: If a file cannot be written.
    """
    layout = make_layout(config.parallel)
    check_same(facts_of(config, layout, changes))
    # Before the folder is created: a run that cannot start leaves nothing behind.
    first_alone(lambda: restore_record(workdir))
    with together():
        check_batches(config, layout)
        check_scores(config.scores, num_classes=config.data.num_classes)
        fields = check_workdir(config, workdir, changes)
        model = build_model(config)
    notes = {"config": json.loads(config_lib.to_json(config))}
    run = TrainingRun(config, model, workdir, layout, profile, notes)
    final = None if fields else _finished_before(run)
    if final is not None:
        return Outcome(final, trained=False)
    with together():
        check_memory(config, model, layout)
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

    change = Change(fields, _steps_reached(run)) if fields else None
    with open_workdir(config, workdir, change), stop_signal() as stop:
        first_alone(lambda: save_frozen(weights, workdir))
        first_alone(lambda: keep_tokenizer(config, workdir))
        notes |= tokenizer_notes(config, workdir)
        run = run._replace(config=with_own_tokenizer(config, workdir), notes=notes)
        first = _first_stage(run, weights, stop)
        outcomes = {"autoencoder": first.outcome}
        if "diffusion" in config.stages:
            frozen = FrozenParams(first.params, first.latent_scale, weights.conditioner)
            outcomes["diffusion"] = _second_stage(run, frozen, note, stop)
        named = config_lib.digest(config)
        final = _to_final(run, first, outcomes, config_digest=named)
        first_alone(lambda: write_json(workdir / FINAL_FILE, final, run=workdir))
        return Outcome(final, trained=True)


def _steps_reached(run: TrainingRun) -> dict[str, int]:
    """Return the step of each stage's newest intact checkpoint, 0 without one.

    Raises:
      InputError: If a file of the run is damaged.
      RunError: If no checkpoint is intact, or not the last one of a finished stage.
    """
    workdir, steps = run.workdir, {}
    before = read_config(workdir)
    reading: dict[str, Callable[[], Checkpoint]] = {
        "autoencoder": lambda: load_stage(
            autoencoder_stage(before, run.model, workdir), workdir
        ),
        "diffusion": lambda: load_second_stage(before, run.model, workdir),
    }
    for name, read in reading.items():
        has_state = any((workdir / name / CHECKPOINTS).glob("[0-9]*"))
        steps[name] = read().step if has_state else 0
    return steps


def _finished_before(run: TrainingRun) -> dict[str, Any] | None:
    """Return `final.json` if the run is finished and all of it is still intact.

    Raises:
      InputError: If a file of the run is damaged.
      RunError: If `final.json` is of another run.
    """
    config, model, workdir = run[:3]
    if not from_first((workdir / FINAL_FILE).exists()):
        return None
    with together():
        final = read_final(workdir)
    reading: dict[str, Callable[[], str]] = {}
    if config.first_stage is None:
        reading["autoencoder"] = lambda: load_first_stage(config, workdir).digest
    else:
        reading["autoencoder"] = lambda: load_frozen(config, model, workdir).digest
    if "diffusion" in config.stages:
        reading["diffusion"] = lambda: load_second_stage(config, model, workdir).digest
    if final is not None and _is_intact(workdir, final, reading=reading):
        return final
    return None


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
    run: TrainingRun, weights: PretrainedWeights, stop: StopSignal
) -> FirstStage:
    """Train the first stage and measure its latent scale, unless both were read."""
    if weights.first_stage is not None:
        return FirstStage(*weights.first_stage, StageOutcome(weights.digest, 0.0))
    config, model, workdir, layout = run[:4]
    stage = autoencoder_stage(config, model, workdir, perceptual=weights.perceptual)
    finished = _train_stage(run, stage, stop)
    scale = latent_scale(config, model, finished.ema, layout, workdir)
    outcome = StageOutcome(finished.digest, finished.seconds)
    return FirstStage(finished.ema, scale, outcome)


def _second_stage(
    run: TrainingRun, frozen: FrozenParams, note: CacheNote | None, stop: StopSignal
) -> StageOutcome:
    """Train the diffusion stage, on a cache of latents if the run has one."""
    config, workdir = run.config, run.workdir
    if config.data.latents == OWN_LATENTS:
        with stop.at_once(f"{OWN_LATENTS} latents are not all made"):
            config, note = keep_latents(config, workdir, open_encoders=open_encoders)
    with together():
        cache = open_cache(config, frozen.autoencoder, note)
    run = run._replace(config=config)
    stage = _diffusion_stage(run, frozen, cache)
    finished = _train_stage(run, stage, stop, cache=cache)
    return StageOutcome(finished.digest, finished.seconds)


def _diffusion_stage(
    run: TrainingRun, frozen: FrozenParams, cache: Cache | None
) -> Stage:
    """Build the diffusion stage with its previews and scores."""
    config, model, workdir = run[:3]
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


def _train_stage(
    run: TrainingRun, stage: Stage, stop: StopSignal, *, cache: Cache | None = None
) -> Finished:
    """Train a stage on images or on cached latents, and record its digest."""
    config, layout, size = run.config, run.layout, stage.batch_size
    if cache is None:
        iterator = open_iterator(config, batch_size=size, layout=layout)
    else:
        iterator = open_latents(cache, seed=config.seed, batch_size=size, layout=layout)
    finished = run_stage(
        stage,
        loop_config=LoopConfig(
            run.workdir,
            config.checkpoint,
            config.log,
            config.parallel,
            max_skipped=config.max_skipped_steps,
            profile=run.profile,
            scores_every=config.scores.every,
        ),
        layout=layout,
        iterator=iterator,
        root_key=root_key(config.seed),
        notes=run.notes,
        stop=stop,
    )
    first_alone(lambda: record_stage(run.workdir, stage.name, finished.digest))
    return finished


def _to_final(
    run: TrainingRun,
    first: FirstStage,
    outcomes: dict[str, StageOutcome],
    *,
    config_digest: str,
) -> dict[str, Any]:
    """Return the content of `final.json`."""
    digests = {name: outcome.digest for name, outcome in outcomes.items()}
    changes = read_changes(run.workdir)
    return {
        "digest": run_digest(digests, changes=changes),
        "digest_by_stage": digests,
        "seconds_by_stage": {k: round(v.seconds, 1) for k, v in outcomes.items()},
        "latent_scale": float(first.latent_scale),
        "config_digest": config_digest,
        **({"changes": changes} if changes else {}),
        "trained_on": f"{run.layout.num_devices} x {platform_text(PmapLayout())}",
    }
