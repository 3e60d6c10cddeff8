"""`ldm steps`: the choice of a number of steps, the features, and the command."""

import json

import numpy as np
import pytest

from ldm_jax.cli.steps import main, parse
from ldm_jax.config import to_json
from ldm_jax.evaluation.components import fit_projection, moments_of, small_images
from ldm_jax.evaluation.fid import frechet_distance
from ldm_jax.evaluation.trade_off import SweepRow, cheapest, in_words, to_table
from ldm_jax.images import read_png
from ldm_jax.types import InputError
from tests.support import tiny
from tests.support.commands import ldm, succeeded, write_run
from tests.support.models import config_of

ROWS = [
    SweepRow("ddim", 20, 20, 0.2, 1.04, 3.0),
    SweepRow("heun", 10, 19, 0.4, 1.04, 1.0),
    SweepRow("unipc", 19, 19, 0.3, 1.05, 1.0),
    SweepRow("ddpm", 100, 100, 1.0, 1.0, None),
    SweepRow("ddim", 5, 5, 0.1, 1.06, 9.0),
]


def test_cheapest_has_the_fewest_calls_then_the_fewest_seconds():
    assert cheapest(ROWS) == ROWS[2]
    assert cheapest(ROWS, tolerance=0.06) == ROWS[4]
    assert cheapest(ROWS, tolerance=0.0) == ROWS[3]
    assert cheapest(ROWS[:1]) == ROWS[0]


def test_the_table_has_a_row_per_setting_and_marks_the_cheapest():
    lines = to_table(ROWS, ROWS[2]).splitlines()
    assert len(lines) == 2 + len(ROWS)
    assert {line.count("|") for line in lines} == {7}
    assert lines[2] == "| ddim | 20 | 20 | 200 | 1.04 | 3.00 |"
    assert lines[4].startswith("| **unipc** | **19** |")
    assert lines[5] == "| ddpm | 100 | 100 | 1e+03 | 1 |  |"
    assert in_words(ROWS[2]).startswith("--sampler unipc --steps 19 (19 network calls")


def test_small_images_are_averages_of_blocks():
    images = np.zeros((2, 12, 12, 1), np.uint8)
    images[1, :2, :2] = 255
    small = small_images(images)
    assert small.shape == (2, 36)  # 6 divides 12, 8 does not
    assert small[0].max() == 0.0
    assert small[1, 0] == 1.0 and small[1, 1:].max() == 0.0


def test_components_keep_the_directions_of_most_variance():
    random = np.random.RandomState(0)
    rows = random.randn(500, 40) * np.linspace(0.1, 4.0, 40)
    projection = fit_projection(rows)
    assert projection.axes.shape == (40, 32)
    kept = (rows - rows.mean(0)) @ projection.axes
    assert kept.var(0).sum() > 0.99 * rows.var(0).sum()
    real = moments_of(projection, rows)
    shifted = moments_of(projection, rows + projection.axes[:, 0])
    assert frechet_distance(real, shifted) == pytest.approx(1.0)


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """A run folder with random parameters."""
    return write_run(tiny.get_config(), tmp_path_factory.mktemp("tiny"))


def test_the_command_compares_samplers_and_names_the_cheapest(tiny_run, tmp_path):
    out = tmp_path / "out"
    args = ["--samplers", "ddim", "euler_ancestral", "--steps", 2, 3, "--out", out]
    few = ["--num-images", 8, "--limit-steps", 9]
    done = ldm("steps", "--workdir", tiny_run, *few, *args)
    text = succeeded(done)
    report = json.loads((out / "steps.json").read_text())
    rows = [SweepRow(**row) for row in report["settings"]]
    assert [(row.sampler, row.steps) for row in rows] == [
        (sampler, steps) for sampler in ("ddim", "euler_ancestral") for steps in (2, 3)
    ]
    chosen = SweepRow(**report["cheapest"])
    assert to_table(rows, chosen) in text and in_words(chosen) in text
    assert [row.error is None for row in rows] == [False, False, True, True]
    assert all(row.seconds > 0 and row.distance > 0 for row in rows)
    assert rows[1].error < rows[0].error  # more steps are nearer to the limit
    assert report["held_out_distance"] < min(row.distance for row in rows)
    assert "euler_ancestral 3" in done.stderr  # progress
    assert read_png(out / "steps.png").size


def test_distances_of_a_protocol_equal_the_evaluation(tiny_run, tmp_path):
    args = ["--samplers", "ddim", "--steps", 2, "--limit-steps", 2]
    protocol = ["--protocol", "dataset-classifier", "--num-images", 160]
    out = tmp_path / "out"
    succeeded(ldm("steps", "--workdir", tiny_run, "--out", out, *args, *protocol))
    report = json.loads((out / "steps.json").read_text())
    assert report["protocol"] == "dataset-classifier"
    (row,) = report["settings"]
    # The evaluation draws the same seeds and has the same statistics of real images.
    flags = ("--steps", 2, "--num-images", 160)
    succeeded(ldm("evaluate", "--workdir", tiny_run, *flags))
    (path,) = (tiny_run / "evaluation").glob("*/metrics.json")
    scores = json.loads(path.read_text())
    assert row["distance"] == pytest.approx(scores["scores"]["fid"], rel=1e-4)
    floor = scores["held_out_scores"]["fid"]
    assert report["held_out_distance"] == pytest.approx(floor, rel=1e-4)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--samplers", "ddim", "dpmp_2m"], "--samplers: .*did you mean dpmpp_2m"),
        (["--spacing", "trail"], "--spacing: .*did you mean trailing"),
        (["--steps", "5", "0"], "--steps: got 0, wanted 1 to 1000"),
        (["--steps", "1001"], "--steps: got 1001, wanted 1 to 1000"),
        (["--steps", "many"], "--steps: got 'many', wanted whole"),
        (["--limit-steps", "0"], "--limit-steps: got 0"),
        (["--num-images", "1"], "--num-images: got 1"),
        (["--guidance-scale", "-1"], "--guidance-scale: got -1"),
        (["--guidance-scale", "nan"], "--guidance-scale: got nan"),
        (["--out", "README.md"], "--out: README.md is a file"),
        (["--workdir", "tests"], "--workdir: tests is not a run"),
        (["--sampler", "ddim"], "--sampler: no such flag; did you mean --samplers"),
        (["--protocol", "adn"], "--protocol: .*did you mean adm"),
        (["--protocol", "adm"], "--inception: not given"),
        (["--inception", "i.pth"], "--inception: got it without --protocol"),
    ],
)
def test_bad_flags_of_steps_are_refused(tiny_run, args, words):
    with pytest.raises(InputError, match=words):
        parse(["--workdir", str(tiny_run), *args])


@pytest.mark.parametrize(
    ("kind", "changes", "args", "words"),
    [
        ("label", {"stages": ("autoencoder",)}, [], "an autoencoder alone"),
        ("embedding", {}, [], "conditioned on vectors"),
        ("masked_image", {}, [], "conditioned on vectors or images"),
        ("none", {}, ["--guidance-scale", "2"], "no condition"),
    ],
)
def test_unsupported_runs_and_unusable_guidance_are_refused(
    kind, changes, args, words, tmp_path
):
    import dataclasses

    config = dataclasses.replace(config_of(kind), **changes)
    (tmp_path / "config.json").write_text(to_json(config))
    with pytest.raises(InputError, match=words):
        parse(["--workdir", str(tmp_path), *args])


def test_a_spacing_that_excludes_the_number_of_steps_is_refused(tiny_run, tmp_path):
    """The refusal comes before any image is drawn."""
    args = ["--workdir", tiny_run, "--steps", 3, "--spacing", "ldm", "--out", tmp_path]
    with pytest.raises(InputError, match="--steps: got 3, for which"):
        main([str(arg) for arg in args])
    assert not any(tmp_path.iterdir())
