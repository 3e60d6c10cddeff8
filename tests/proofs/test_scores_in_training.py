"""Scores during training equal the evaluation's and do not change training."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from ldm_jax import run
from ldm_jax.cli.evaluate import main
from ldm_jax.config import ScoresConfig, digest, from_json, to_json
from ldm_jax.evaluation import classifier as classifiers
from ldm_jax.evaluation import extractors, online, samples
from ldm_jax.evaluation.classifier import train_classifier
from ldm_jax.parallel.make_layout import PmapLayout
from ldm_jax.pretrained.layouts import flatten
from ldm_jax.pretrained.load_run import load_run
from ldm_jax.pretrained.tensors import open_tensors
from ldm_jax.run import train
from ldm_jax.sampling import pipeline as pipeline
from ldm_jax.tools.report.run_summary import read_run_summary
from ldm_jax.tools.report.scores import score_curves, scores_section
from ldm_jax.training.diffusion_step import DiffusionParams, FrozenParams
from ldm_jax.training.metrics import read_metrics
from ldm_jax.types import InputError, Preempted
from tests.parallel.test_layouts import StopAfter
from tests.support import tiny
from tests.support.commands import sample_here
from tests.support.toys import run_toy, toy_stage

SCORES = ScoresConfig(every=4, images=66, steps=2, guidance_scale=2.0)


def one_device():
    return PmapLayout(jax.devices()[:1])


def config_of(scores=SCORES, **fields):
    """Return the tiny config with one autoencoder step, two averages, and scores."""
    config = tiny.get_config()
    first = dataclasses.replace(config.autoencoder, steps=1)
    second = dataclasses.replace(
        config.diffusion, average_lengths=(0.05, 0.1), average_snapshots=4
    )
    return dataclasses.replace(
        config, autoencoder=first, diffusion=second, scores=scores, **fields
    )


@pytest.fixture(scope="module", autouse=True)
def one_device_and_short_classifier_training():
    """One device compiles fastest; the classifier trains for 5 steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "make_layout", lambda config: one_device())
        for room in (pipeline, extractors):
            patch.setattr(room, "PmapLayout", one_device)
        short = functools.partial(train_classifier, num_steps=5)
        patch.setattr(classifiers, "train_classifier", short)
        patch.setattr(samples, "SHARD", 32)
        yield


@pytest.fixture(scope="module")
def scored(one_device_and_short_classifier_training, tmp_path_factory):
    """A run scored at steps 4 and 8."""
    workdir = tmp_path_factory.mktemp("scored") / "run"
    return workdir, train(config_of(), workdir).final


def read_json(path):
    return json.loads(path.read_text())


def curve(workdir):
    return [r for r in read_metrics(Path(workdir) / "metrics.jsonl") if "fid" in r]


def test_the_last_training_score_equals_the_evaluation(scored):
    workdir, _ = scored
    args = ["--workdir", workdir, "--steps", 2, "--num-images", 66]
    args += ["--guidance-scale", 2, "--compilation-cache", "none"]
    main([str(arg) for arg in args])
    (path,) = workdir.glob("evaluation/*/metrics.json")
    report = read_json(path)
    last = curve(workdir)[-1]
    assert last["step"] == 8
    names = {name for name, value in report["scores"].items() if value is not None}
    assert {"fid", "kid", "precision", "inception_score"} <= names
    for name in names:
        assert last[name] == pytest.approx(report["scores"][name], rel=1e-5), name
    assert last["held_out_fid"] == pytest.approx(report["held_out_scores"]["fid"])
    # The evaluation reuses the classifier and the statistics of training.
    assert len(list(workdir.glob("evaluation/*.npz"))) == 2


def test_averages_of_any_length_are_evaluated_and_sampled(scored, tmp_path, capsys):
    workdir, out = scored[0], scored[0] / "evaluation"
    lengths = [0.05, 0.08, 0.1]
    args = ["--workdir", workdir, "--steps", 1, "--num-images", 66]
    args += ["--ema-lengths", *lengths, "--compilation-cache", "none"]
    main([str(arg) for arg in args])
    assert "| ddim 1, guidance 1, EMA 0.08 |" in capsys.readouterr().out
    paths = out.glob("*_ema*/metrics.json")
    found = {r["settings"]["ema_length"]: r for r in map(read_json, paths)}
    assert sorted(found) == lengths
    assert len({one["scores"]["fid"] for one in found.values()}) == 3
    assert len({one["made_with"]["checkpoint"] for one in found.values()}) == 3
    assert "FID against EMA length" in scores_section(read_run_summary(workdir))
    # The snapshot of the last step equals the average at that step.
    last = open_tensors(workdir / "diffusion" / "averages" / "000008.safetensors")
    unet = flatten(load_run(workdir, ema_length=0.1).params.unet)
    for name, leaf in unet.items():
        np.testing.assert_allclose(leaf, last[f"0.1/unet/{name}"], atol=1e-7)
    images = tmp_path / "images"
    flags = ("--labels", 3, "--seeds", 0, "--steps", 1, "--compilation-cache", "none")
    sample_here("--workdir", workdir, "--ema-length", 0.08, *flags, "--out", images)
    sample_here("--replay", images / "000000.png")


def test_scores_do_not_change_training(scored, tmp_path):
    workdir, final = scored
    config = config_of(ScoresConfig(), first_stage=str(workdir))
    plain = train(config, tmp_path / "plain").final
    name = "diffusion"
    assert plain["digest_by_stage"][name] == final["digest_by_stage"][name]
    assert not curve(tmp_path / "plain")
    assert [record["step"] for record in curve(workdir)] == [4, 8]
    assert not (workdir / "diffusion" / "scoring").exists()


def measured_toy(killed_at=(), **fields):
    """Return a toy stage with scores, and the list of its scored steps."""
    measured, killed = [], set(killed_at)

    def measure(ema, step):
        measured.append(step)
        if step in killed:
            killed.remove(step)
            raise KeyboardInterrupt
        return {"fid": 1.0 + abs(float(np.asarray(ema["b"])[0])), "how": "toy"}

    return toy_stage(**fields)._replace(measure=measure), measured


def run_scored(workdir, stage, **fields):
    every = fields.pop("scores_every", 2)
    return run_toy(workdir, stage, scores_every=every, devices=jax.devices()[:1])


@pytest.mark.parametrize("killed_at", [2, 4, 6, 12])
def test_an_interrupted_score_is_computed_when_the_run_resumes(tmp_path, killed_at):
    whole, steps = measured_toy()
    unbroken = run_scored(tmp_path / "whole", whole)
    assert steps == [2, 4, 6, 8, 10, 12]
    stage, measured = measured_toy([killed_at])
    with pytest.raises(KeyboardInterrupt):
        run_scored(tmp_path / "cut", stage)
    found = run_scored(tmp_path / "cut", stage)
    assert found.digest == unbroken.digest
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    # Every fourth step is saved before it is scored: the scores of earlier steps are
    # not computed again.
    assert measured.count(killed_at) == 2
    assert sum(measured.count(step) for step in (4, 8, 12) if step < killed_at) <= 2
    # A finished stage is not scored again.
    measured.clear()
    run_scored(tmp_path / "cut", stage)
    assert not measured


def test_scores_may_start_when_a_run_resumes(tmp_path):
    stage, measured = measured_toy()
    with pytest.raises(Preempted):
        run_toy(tmp_path, stage._replace(measure=None), stop=StopAfter(5))
    run_scored(tmp_path, stage, scores_every=5)
    assert measured == [5, 10, 12]


def test_the_second_score_compiles_nothing(scored):
    config, programs = config_of(), []
    loaded = load_run(scored[0])
    frozen = FrozenParams(loaded.params.autoencoder, loaded.params.latent_scale, {})
    trained = DiffusionParams(loaded.params.unet, loaded.params.conditioner)
    measure = online.make_measure(config, loaded.model, frozen, scored[0])
    worse = jax.tree.map(lambda leaf: 0.5 * leaf, trained)
    first = measure(trained, 8)

    def listen(event, duration, **kwargs):
        if event == "/jax/core/compile/jaxpr_to_mlir_module_duration":
            programs.append(kwargs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        second = measure(worse, 9)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert first == {k: v for k, v in curve(scored[0])[-1].items() if k in first}
    assert second["fid"] != first["fid"]
    assert not programs


def test_the_report_draws_the_score_curve(scored):
    workdir, _ = scored
    (_, stage) = read_run_summary(workdir).stages
    drawn = score_curves(stage)
    assert "FID of the averaged weights over training" in drawn
    assert "dataset-classifier, 66 samples, ddim 2, guidance 2" in drawn
    assert "held-out real images" in drawn
    assert (workdir / "loss.png").stat().st_size > 10_000


def test_the_config_digest_ignores_scores():
    plain, with_scores = config_of(ScoresConfig()), config_of()
    assert digest(plain) == digest(with_scores)
    tree = json.loads(to_json(plain))
    del tree["scores"]
    assert from_json(json.dumps(tree)) == plain


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"images": 64}, ["scores.images", "got 64", "more than the 64 components"]),
        ({"protocol": "adm"}, ["--scores.inception: not given", "adm"]),
        ({"inception": "w.pth"}, ["--scores.inception", "reads none"]),
        (
            {"protocol": "adm", "inception": "no.pth"},
            ["--scores.inception: no file no.pth"],
        ),
    ],
)
def test_unusable_score_settings_are_refused_before_training(tmp_path, fields, words):
    config = config_of(dataclasses.replace(SCORES, **fields))
    with pytest.raises(InputError) as caught:
        train(config, tmp_path / "run")
    assert all(word in str(caught.value) for word in words), caught.value
    assert not (tmp_path / "run").exists()
    online.check_scores(ScoresConfig(protocol="adm"), num_classes=0)  # scores are off


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: config_of(stages=("autoencoder",)),
            ["scores.every", "got 4", "stage 1 alone"],
        ),
        (
            lambda: config_of(dataclasses.replace(SCORES, steps=1001)),
            ["scores.steps", "1001", "1000"],
        ),
        (lambda: ScoresConfig(images=1), ["images", "1", "at least 2"]),
        (lambda: ScoresConfig(protocol="fid"), ["protocol", "'fid'", "adm"]),
    ],
)
def test_bad_score_settings_are_refused_in_one_line(make, words):
    with pytest.raises(InputError) as caught:
        make()
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_scores_every_must_be_a_multiple_of_log_every():
    config = config_of(ScoresConfig())
    log = dataclasses.replace(config.log, every=3)
    with pytest.raises(InputError, match=r"got 4, wanted a multiple of log\.every, 3"):
        config_of(log=log)
