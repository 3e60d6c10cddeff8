"""`ldm train` and `ldm sample`, run as a user runs them."""

import json
import os

import numpy as np
import pytest

from ldm_jax.files import LOCK_FILE, locked
from ldm_jax.images import read_png, to_uint8
from tests.support.commands import (
    ROOT,
    error_line,
    ldm,
    refusal,
    sample,
    succeeded,
    train,
)
from tests.support.pngs import read_texts


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run trained without interruption."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    assert "finished" in succeeded(train(workdir))
    return workdir


def final(workdir):
    return json.loads((workdir / "final.json").read_text())


def records(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def snapshot(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_training_writes_its_files_and_metrics(finished):
    names = {str(path.relative_to(finished)) for path in finished.rglob("*.*")}
    wanted = {
        "config.json",
        "metrics.jsonl",
        "loss.png",
        "final.json",
        "autoencoder/reconstructions_000006.png",
        "diffusion/samples_000008.png",
    }
    assert wanted <= names
    assert len(final(finished)["digest"]) == 64
    assert set(final(finished)["seconds_by_stage"]) == {"autoencoder", "diffusion"}
    rows = records(finished)
    stages = [(row["stage"], row["step"]) for row in rows]
    assert stages == [("autoencoder", i) for i in range(1, 7)] + [
        ("diffusion", i) for i in range(1, 9)
    ]
    common = {"loss", "learning_rate", "gradient_norm", "images_per_second"}
    assert all(common <= row.keys() for row in rows)
    assert {"reconstruction", "kl"} <= rows[0].keys()


def test_training_a_finished_run_changes_no_file(finished):
    before = snapshot(finished)
    assert "finished" in succeeded(train(finished))
    assert snapshot(finished) == before


def test_the_same_command_twice_gives_the_same_digest(finished, tmp_path):
    succeeded(train(tmp_path / "again", "--checkpoint.every", 5, "--log.every", 3))
    assert final(tmp_path / "again")["digest"] == final(finished)["digest"]


def test_another_seed_gives_another_digest(finished, tmp_path):
    succeeded(train(tmp_path / "other", "--seed", 1, "--stages", "autoencoder"))
    ours, theirs = (
        final(workdir)["digest_by_stage"]["autoencoder"]
        for workdir in (finished, tmp_path / "other")
    )
    assert ours != theirs


def test_a_dry_run_ends_with_one_line_of_json_and_writes_nothing(tmp_path):
    result = ldm("train", "--config", "digits", "--dry-run", devices=2)
    report = json.loads(succeeded(result).splitlines()[-1])
    assert set(report["parameters"]) == {"autoencoder", "unet"}
    assert report["batch_per_device"] == {"autoencoder": 8, "diffusion": 16}
    # Two moments of Adam and one EMA: four times the parameters, and counters.
    for stage, network in (("autoencoder", "autoencoder"), ("diffusion", "unet")):
        size = 16 * report["parameters"][network]
        assert 0 < report["state_bytes"][stage] - size < 100
    assert len(report["digest"]) == 64
    assert report["steps_per_epoch"] == {"autoencoder": 93, "diffusion": 46}


def test_help_names_every_kind_of_flag():
    text = succeeded(ldm("train", "--help"))
    for flag in ("--config", "--workdir", "--dry-run", "--diffusion.optim.lr"):
        assert flag in text


@pytest.fixture(scope="module")
def samples(finished, tmp_path_factory):
    out = tmp_path_factory.mktemp("samples")
    args = ["--labels", "2,0", "--seeds", "0-4", "--steps", 3, "--eta", 0.7]
    succeeded(sample(finished, out, *args))
    return out


def test_samples_are_ordered_by_label_and_carry_their_metadata(finished, samples):
    paths = sorted(samples.glob("0*.png"))
    assert [path.name for path in paths] == [f"{i:06d}.png" for i in range(10)]
    texts = [read_texts(path) for path in paths]
    assert [(t["label"], t["seed"]) for t in texts] == [
        (label, seed) for label in "20" for seed in "01234"
    ]
    first = texts[0]
    assert first["checkpoint"] == final(finished)["digest"]
    assert (first["sampler"], first["steps"], first["eta"]) == ("ddim", "3", "0.7")
    assert first["guidance_scale"] == "2.0"
    assert "jax" in json.loads(first["versions"])
    assert read_png(paths[0]).shape == (8, 8, 1)
    assert (samples / "grid.png").exists()


def test_an_image_has_equal_bytes_alone_and_in_a_batch(finished, samples, tmp_path):
    args = ["--labels", 0, "--seeds", 3, "--steps", 3, "--eta", 0.7]
    succeeded(sample(finished, tmp_path, *args))
    alone = (tmp_path / "000000.png").read_bytes()
    assert alone == (samples / "000008.png").read_bytes()


def test_replay_reproduces_an_image_in_another_process(samples):
    path = samples / "000007.png"
    assert f"{path}: every one of 64 pixels is the same" in succeeded(
        ldm("sample", "--replay", path)
    )


# Bad input: one line, a non-zero exit code, and no existing file is changed.


def test_another_config_in_the_same_workdir_is_refused_by_field(finished):
    before = snapshot(finished)
    result = train(finished, "--diffusion.steps", 9, "--seed", 3)
    line = error_line(result)
    assert "diffusion.steps (8 there, 9 here)" in line and "seed (0 there, 3" in line
    assert snapshot(finished) == before


def test_a_misspelt_flag_is_refused_with_the_nearest(tmp_path):
    line = error_line(train(tmp_path / "x", "--diffusion.stepps", 3))
    assert "did you mean --diffusion.steps?" in line
    assert not (tmp_path / "x").exists()


def test_an_indivisible_batch_size_is_refused_before_writing(tmp_path):
    line = error_line(train(tmp_path / "x", devices=3))
    assert "autoencoder.batch_size: got 8" in line and "3 devices" in line
    assert not (tmp_path / "x").exists()


def test_a_workdir_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "x").write_text("mine")
    assert "is a file" in error_line(train(tmp_path / "x"))
    assert (tmp_path / "x").read_text() == "mine"


def test_a_workdir_that_cannot_be_created_is_refused():
    line = error_line(train("/proc/ldm"))
    assert "/proc/ldm" in line


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_workdir_without_write_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    assert "Permission denied" in error_line(train(tmp_path / "x"))


def test_a_non_finite_loss_ends_training_and_keeps_earlier_checkpoints(tmp_path):
    workdir = tmp_path / "run"
    line = error_line(train(workdir, "--diffusion.optim.lr", 1e38))
    assert "diffusion step" in line and "not finite" in line, line
    assert not (workdir / "final.json").exists()
    assert (workdir / "autoencoder/checkpoints/6").exists()


def test_sampling_an_unfinished_run_is_refused(finished, capsys, tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "config.json").write_bytes((finished / "config.json").read_bytes())
    line = refusal(capsys, "--workdir", workdir, "--out", tmp_path / "out")
    assert "no finished checkpoint" in line
    assert not (tmp_path / "out").exists()


def test_two_trainings_in_one_workdir_are_refused(tmp_path):
    # This process holds the lock, as a training does to its end.
    workdir = tmp_path / "run"
    workdir.mkdir()
    with locked(workdir, busy=""):
        assert "another process is training" in error_line(train(workdir))
    assert [path.name for path in workdir.iterdir()] == [LOCK_FILE]


def test_the_python_example_of_the_readme_gives_the_images_of_the_command(
    finished, tmp_path
):
    text = (ROOT / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    assert "steps=50" in code
    code = code.replace("steps=50", "steps=3")
    code = code.replace("runs/digits", str(finished))
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    images = to_uint8(np.asarray(names["images"]))
    args = ["--labels", "1,3,4", "--seeds", "0-2", "--steps", 3]
    succeeded(sample(finished, tmp_path, *args))
    for place, image in zip((3, 1, 8), images, strict=True):
        assert np.array_equal(read_png(tmp_path / f"{place:06d}.png"), image)
