"""A run and its folder: train what is not finished, seal it, load it again."""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

from ldm_jax import config as config_lib
from ldm_jax.build import build_model, load_split, open_iterator, open_split
from ldm_jax.config import OWN_LATENTS, Config
from ldm_jax.evaluation.online import check_scores, make_measure
from ldm_jax.files import write_json
from ldm_jax.parallel.make_layout import Layout, PmapLayout, make_layout
from ldm_jax.parallel.multihost import (
    StopSignal,
    check_same,
    first_alone,
    gather_texts,
    stop_signal,
    together,
)
from ldm_jax.pretrained.frozen import open_encoders, read_frozen, save_frozen
from ldm_jax.pretrained.load_run import (
    Run,
    load_run,
    load_weights,
    run_digest,
    run_weights,
)
from ldm_jax.rng import root_key
from ldm_jax.sampling.pipeline import platform_text
from ldm_jax.sampling.preview import make_preview
from ldm_jax.training.autoencoder_stage import autoencoder_stage, latent_scale
from ldm_jax.training.diffusion_stage import diffusion_stage
from ldm_jax.training.diffusion_step import FrozenParams
from ldm_jax.training.digest import tree_digest
from ldm_jax.training.dry_run import check_batches
from ldm_jax.training.encode_latents import keep_latents
from ldm_jax.training.latent_cache import Cache, check_cache, open_cache, open_latents
from ldm_jax.training.loop import (
    Finished,
    LoopConfig,
    Stage,
    run_stage,
)
from ldm_jax.training.train_tokenizer import (
    keep_tokenizer,
    notes_of_words,
    with_own_tokenizer,
)
from ldm_jax.training.workdir import check_workdir, facts_of, open_workdir

__all__ = [
    "Outcome",
    "Run",
    "StageOutcome",
    "load_run",
    "load_weights",
    "run_digest",
    "run_weights",
    "train",
]

FINAL_FILE = "final.json"


class Outcome(NamedTuple):
    """How a run ended."""

    final: dict[str, Any]
    """The content of `final.json`."""
    trained: bool
    """False if nothing was left to do."""


def train(
    config: Config, workdir: Path, *, profile: tuple[int, int] | None = None
) -> Outcome:
    """Run the stages of a run that are not finished, and write `final.json`.

    On several processes, each calls this, with the same arguments and a folder that
    all of them see.

    Args:
      config: Of the run; must equal the one the folder was made with, `parallel` aside.
      workdir: Its folder; made if it is not there.
      profile: Steps of each stage between which a trace is written; None for none.

    Returns:
      How it ended.

    Raises:
      InputError: If the folder belongs to another config or another process, a batch
        does not divide by the devices, the data cannot be read, or the processes
        differ.
      Preempted: If this process was told to stop (SIGTERM), once the state is saved.
      RunError: If a loss is not finite, or no checkpoint is intact.
      OSError: If something cannot be written.
    """
    layout = make_layout(config.parallel)
    check_same(facts_of(config, layout))
    final_path = workdir / FINAL_FILE
    # Before the folder is taken: what is missing must not leave a run behind.
    with together():
        check_batches(config, layout)
        check_scores(config.scores, num_classes=config.data.num_classes)
        check_workdir(config, workdir)
        model = build_model(config)
    if gather_texts(str(final_path.exists()))[0] == str(True):
        return Outcome(json.loads(final_path.read_text()), trained=False)
    with together():
        frozen_weights = read_frozen(config, model, workdir)
        for split in ("test", "train"):
            open_split(config, split)
        first_stage = frozen_weights.first_stage
        note = check_cache(
            config,
            workdir,
            first_stage=None if first_stage is None else first_stage[0],
            conditioner=frozen_weights.conditioner,
        )
    with open_workdir(config, workdir), stop_signal() as stop:
        first_alone(lambda: save_frozen(frozen_weights, workdir))
        first_alone(lambda: keep_tokenizer(config, workdir))
        opened = with_own_tokenizer(config, workdir)
        run = functools.partial(
            _run,
            config=config,
            workdir=workdir,
            layout=layout,
            profile=profile,
            stop=stop,
        )
        done: dict[str, StageOutcome] = {}
        if frozen_weights.first_stage is None:
            stage = autoencoder_stage(
                opened, model, workdir, perceptual=frozen_weights.perceptual
            )
            finished = run(stage)
            done["autoencoder"] = StageOutcome(finished.digest, finished.seconds)
            params = finished.ema
            scale = latent_scale(opened, model, params, layout, workdir)
        else:
            params, scale = frozen_weights.first_stage
            done["autoencoder"] = StageOutcome(tree_digest(frozen_weights[1:]), 0.0)
        if "diffusion" in config.stages:
            frozen = FrozenParams(params, scale, frozen_weights.conditioner)
            if config.data.latents == OWN_LATENTS:
                with stop.at_once(f"{OWN_LATENTS} latents are not all made"):
                    opened, note = keep_latents(
                        opened, workdir, open_encoders=open_encoders
                    )
            with together():
                cache = open_cache(opened, params, note)
            null_state = None if cache is None else cache.null_state
            stage = diffusion_stage(
                opened, model, frozen, workdir, null_state=null_state
            )
            draw = make_preview(
                model,
                frozen,
                workdir,
                preview=config.sampling,
                load_test=lambda num: load_split(opened, "test", limit=num),
                seed=config.seed,
            )
            stage = stage._replace(draw=draw)
            if config.scores.every:
                measure = make_measure(opened, model, frozen, workdir)
                stage = stage._replace(measure=measure)
            finished = run(stage, cache=cache)
            done["diffusion"] = StageOutcome(finished.digest, finished.seconds)
        final = {
            "digest": run_digest({k: v.digest for k, v in done.items()}),
            "digest_by_stage": {k: v.digest for k, v in done.items()},
            "seconds_by_stage": {k: round(v.seconds, 1) for k, v in done.items()},
            "latent_scale": float(scale),
            "config_digest": config_lib.digest(config),
            "trained_on": f"{layout.num_devices} x {platform_text(PmapLayout())}",
        }
        first_alone(lambda: write_json(final_path, final))
        return Outcome(final, trained=True)


class StageOutcome(NamedTuple):
    """How a stage ended."""

    digest: str
    """sha256 over its state."""
    seconds: float
    """It took; 0 if it was taken from elsewhere."""


def _run(
    stage: Stage,
    *,
    config: Config,
    workdir: Path,
    layout: Layout,
    profile: tuple[int, int] | None,
    stop: StopSignal,
    cache: Cache | None = None,
) -> Finished:
    iterator_of = functools.partial(open_iterator, with_own_tokenizer(config, workdir))
    if cache is not None:
        iterator_of = functools.partial(open_latents, config, cache)
    return run_stage(
        stage,
        loop_config=LoopConfig(
            workdir,
            config.checkpoint,
            config.log,
            config.parallel,
            config.max_skipped_steps,
            profile,
            config.scores.every,
        ),
        layout=layout,
        iterator=iterator_of(batch_size=stage.batch_size, layout=layout),
        root_key=root_key(config.seed),
        notes={
            "config": json.loads(config_lib.to_json(config)),
            **(notes_of_words(config, workdir) if stage.name == "diffusion" else {}),
        },
        stop=stop,
    )
