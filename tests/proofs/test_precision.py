"""Every program that commands compile has the precision of the run.

JAX writes each program before it is compiled (`JAX_DUMP_IR_TO`): both stages, the
latent cache, grids, scores during training, samples and their evaluation.
"""

import json

import pytest

from tests.support.commands import error_line, ldm, sample, succeeded, train
from tests.support.products import precisions

NAMES = ("default", "highest")
HIGHEST = "HIGHEST HIGHEST"
OF_METRICS = ("jit__step", "jit_classify", "jit_features_of", "jit__kth", "jit__inside")
"""Programs of the classifier, features and neighbours, the highest in any run."""
FLAGS = (
    *("--autoencoder.steps", 2, "--diffusion.steps", 2, "--log.every", 1),
    *("--data.latents", "own", "--scores.every", 2, "--scores.images", 140),
    *("--scores.steps", 2),
)
EVALUATE = ("--num-images", 140, "--steps", 2)


def products(folder):
    """Return the precisions of all products of the programs that were written."""
    return {
        path.name: set(made)
        for path in folder.glob("*.mlir")
        if (made := precisions(path.read_text()))
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Train, sample and evaluate a run of each precision."""
    folder = tmp_path_factory.mktemp("runs")
    for name in NAMES:
        run = folder / name
        flags = () if name == "default" else ("--precision", name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("JAX_DUMP_IR_TO", str(folder / f"{name}_programs"))
            succeeded(train(run, *FLAGS, *flags))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("JAX_DUMP_IR_TO", str(folder / f"{name}_samples"))
            few = ("--seeds", "0", "--labels", "1", "--steps", 2)
            succeeded(sample(run, folder / f"{name}_images", *few))
            succeeded(ldm("evaluate", "--workdir", run, *EVALUATE))
    return folder


@pytest.mark.parametrize("kind", ["programs", "samples"])
def test_every_product_of_a_run_has_its_precision(runs, kind):
    highest = products(runs / f"highest_{kind}")
    assert any("sample_chunk" in name for name in highest)
    assert set.union(*highest.values()) == {HIGHEST}
    for name, found in products(runs / f"default_{kind}").items():
        wanted = HIGHEST if any(word in name for word in OF_METRICS) else "DEFAULT "
        assert all(one.startswith(wanted) for one in found), name


def test_both_precisions_give_the_same_bits_on_a_cpu(runs):
    finals = [json.loads((runs / n / "final.json").read_text()) for n in NAMES]
    assert finals[0]["digest"] == finals[1]["digest"]
    assert finals[0]["config_digest"] != finals[1]["config_digest"]
    images = [(runs / f"{n}_images" / "grid.png").read_bytes() for n in NAMES]
    assert images[0] == images[1]


def test_scores_name_the_precision_and_do_not_mix_samples_of_two(runs):
    before = scores(runs / "default")
    assert set(before) == {"default"}
    precise = ("--precision", "highest")
    succeeded(ldm("evaluate", "--workdir", runs / "default", *EVALUATE, *precise))
    after = scores(runs / "default")
    assert set(after) == set(NAMES)
    assert after["highest"]["images_drawn"] == 140
    assert after["highest"]["scores"] == after["default"]["scores"]
    assert set(scores(runs / "highest")) == {"highest"}


def scores(run):
    """Return the scores of a run by the precision of the samples."""
    paths = run.glob("evaluation/*/metrics.json")
    found = [json.loads(path.read_text()) for path in paths]
    return {one["precision"]: one for one in found}


def test_a_run_does_not_resume_in_another_precision(runs):
    line = error_line(train(runs / "default", *FLAGS, "--precision", "highest"))
    assert "precision ('default' there, 'highest' here)" in line
