"""The state of a run: every file and value that enters a result is compared."""

import dataclasses
import json
import shutil
import tarfile
from pathlib import Path

import pytest

from ldm_jax import files
from ldm_jax.config import from_json, read_config, to_json
from ldm_jax.pretrained.first_stage import read_first_stage
from ldm_jax.pretrained.load_run import load_run, run_weights
from ldm_jax.run import train
from ldm_jax.tools.report.run_summary import read_run_summary
from ldm_jax.training.workdir import open_workdir, read_scale
from ldm_jax.types import InputError, RunError
from tests.data.test_folder import write
from tests.support.tiny import get_config

OLD = Path(__file__).parents[1] / "fixtures/old_run/run.tar.xz"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    train(get_config(), workdir)
    return workdir


@pytest.fixture
def run(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


CHANGES = {
    "added": lambda pictures: write(pictures / "ant/new.png"),
    "added deep down": lambda pictures: write(pictures / "bee/one/two/new.png"),
    "removed": lambda pictures: (pictures / "bee/3.png").unlink(),
    "renamed": lambda pictures: (pictures / "bee/3.png").rename(
        pictures / "bee/03.png"
    ),
    "changed": lambda pictures: write(pictures / "bee/3.png", 3, size=(32, 32)),
    "caption added": lambda pictures: (pictures / "bee/3.txt").write_text("three"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_resumes_on_the_files_that_it_began_with_alone(tmp_path, change):
    pictures, workdir = tmp_path / "pictures", tmp_path / "run"
    for i in range(8):
        write(pictures / ("ant", "bee")[i % 2] / f"{i}.png", i)
    before = shutil.copytree(pictures, tmp_path / "before")
    config = get_config()
    data = {"source": f"folder:{pictures}", "num_classes": 2, "num_train_examples": 0}
    data = dataclasses.replace(config.data, **data)
    config = dataclasses.replace(config, data=data)
    with open_workdir(config, workdir):
        pass
    CHANGES[change](pictures)
    left = sorted(path.name for path in workdir.iterdir())
    for again in (
        open_workdir(config, workdir).__enter__,
        lambda: train(config, workdir),
    ):
        with pytest.raises(
            InputError, match=r"data\.source: .* holds other files than"
        ):
            again()
    assert sorted(path.name for path in workdir.iterdir()) == left
    shutil.rmtree(pictures)
    before.rename(pictures)
    with open_workdir(config, workdir):
        pass


def edit(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def damage(step):
    """Cut the arrays of a checkpoint."""
    for path in step.rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def go_on(run):
    return train(get_config(), run)


def final_of(run):
    return json.loads((run / "final.json").read_text())


def test_a_new_run_records_its_files_and_stages(whole):
    record = json.loads((whole / "digests.json").read_text())
    assert set(record["files"]) == {"autoencoder/latent_scale.json", "final.json"}
    assert record["stages"] == final_of(whole)["digest_by_stage"]
    assert load_run(whole).digest == final_of(whole)["digest"]


@pytest.mark.parametrize("scale", [0.5, -3.0])
def test_another_latent_scale_is_neither_trained_nor_sampled_with(run, scale):
    edit(run / "autoencoder/latent_scale.json", latent_scale=scale)
    for use in (load_run, run_weights, go_on):
        with pytest.raises(InputError, match=r"latent_scale\.json: got .*delete it"):
            use(run)


def test_a_config_of_another_seed_is_not_that_of_the_run(run):
    edit(run / "config.json", seed=7)
    with pytest.raises(InputError, match=r"config\.json: got another config"):
        load_run(run)


@pytest.mark.parametrize("name", ["digest", "config_digest", "seconds_by_stage"])
def test_a_changed_final_file_is_not_told_as_true(run, name):
    edit(run / "final.json", **{name: {} if name.startswith("s") else "0" * 64})
    for use in (read_run_summary, go_on):
        with pytest.raises(InputError, match=r"final\.json: got .*delete it"):
            use(run)
    (run / "final.json").unlink()
    with pytest.raises(InputError, match=r"final\.json: missing, and the run is fin"):
        read_run_summary(run)
    before = json.loads((run / "digests.json").read_text())["stages"]
    assert train(get_config(), run).final["digest_by_stage"] == before
    assert read_run_summary(run).is_finished


@pytest.mark.parametrize("stage, last", [("autoencoder", 6), ("diffusion", 8)])
def test_of_a_finished_stage_only_the_last_step_counts(run, stage, last, caplog):
    final = final_of(run)
    damage(run / stage / "checkpoints" / str(last))
    for use in (load_run, run_weights):
        with pytest.raises(RunError) as caught:
            use(run)
        assert f"of step {last}, and no earlier one; give the ldm" in str(caught.value)
    outcome = train(get_config(), run)  # what the message says mends it
    assert outcome.final["digest"] == final["digest"]
    assert any("trained again" in text for text in caplog.messages)
    assert load_run(run).digest == final["digest"]
    assert not train(get_config(), run).trained


def test_a_finished_run_without_checkpoints_is_not_trained_from_its_start(run):
    shutil.rmtree(run / "autoencoder/checkpoints")
    for use in (load_run, go_on):
        with pytest.raises(InputError, match=r"got no checkpoints, and the auto"):
            use(run)


def test_an_older_first_stage_is_not_taken_by_another_run(run):
    shutil.rmtree(run / "autoencoder/checkpoints/6")
    config = from_json(
        to_json(get_config()).replace(
            '"first_stage": null', f'"first_stage": {json.dumps(str(run))}'
        )
    )
    with pytest.raises(RunError, match=r"got the checkpoints 4; wanted the last one"):
        read_first_stage(config)


def test_an_unfinished_stage_is_read_from_its_newest_intact_step(run, caplog):
    (run / "final.json").unlink()
    record = json.loads((run / "digests.json").read_text())
    record["files"].pop("final.json")
    record["stages"].pop("diffusion")
    record.pop("sha256")
    files.write_record(run, record)
    shutil.rmtree(run / "diffusion/checkpoints/8")
    assert load_run(run).step == 6


def test_a_step_under_another_name_is_not_that_step(run):
    checkpoints = run / "diffusion/checkpoints"
    shutil.rmtree(checkpoints / "8")
    (checkpoints / "6").rename(checkpoints / "8")
    with pytest.raises(RunError, match="it was saved as step 6"):
        load_run(run)


def other_run(run, **changes):
    """Make the checkpoints of a run look like those of one of another config."""
    for path in run.glob("*/checkpoints/*/notes/metadata"):
        notes = json.loads(path.read_text())
        notes["config"] |= changes
        notes.pop("sha256")
        path.write_text(json.dumps({**notes, "sha256": files.json_digest(notes)}))


def test_a_checkpoint_of_a_run_of_another_config_is_not_of_this_run(run):
    other_run(run, seed=3)
    with pytest.raises(RunError, match="it is of a run of another config"):
        load_run(run)


def test_a_checkpoint_of_a_run_of_another_seed_is_not_of_this_run(
    run, whole, tmp_path, monkeypatch
):
    edit(run / "config.json", seed=3)
    (run / "digests.json").unlink()
    for path in run.glob("*/checkpoints/*/notes/metadata"):
        notes = json.loads(path.read_text())
        notes = {k: v for k, v in notes.items() if k not in ("record", "config")}
        notes.pop("sha256")
        path.write_text(json.dumps({**notes, "sha256": files.json_digest(notes)}))
    with pytest.raises(RunError, match="it is of a run of another seed"):
        load_run(run)


def test_a_lost_record_is_missed_by_readers_and_restored_by_training(run):
    final = final_of(run)
    (run / "digests.json").unlink()
    with pytest.raises(RunError, match=r"digests\.json of its run is missing"):
        load_run(run)
    with pytest.raises(InputError, match=r"final\.json: got .* wanted none"):
        train(get_config(), run)  # it is later than the newest checkpoint
    (run / "final.json").unlink()
    assert train(get_config(), run).final["digest"] == final["digest"]
    assert load_run(run).digest == final["digest"]


def test_a_changed_record_is_refused(run):
    edit(run / "digests.json", configs=[])
    for use in (load_run, read_run_summary, go_on):
        with pytest.raises(InputError, match=r"digests\.json: got another content"):
            use(run)


HOSTILE = {
    "empty": b"",
    "binary": bytes(range(256)),
    "cut": b'{"digest": "ab',
    "list": b"[]",
    "null": b"null",
    "deep": b"[" * 10**5,
    "deep object": b'{"a":' * 10**5,
    "long number": b'{"latent_scale": ' + b"1" * 5000 + b"}",
    "other types": b'{"latent_scale": "x", "digest": 5, "seconds_by_stage": [1]}',
    "not Unicode": b'{"digest": "\xff\xfe"}',
}


READERS = {
    "final.json": (read_run_summary, go_on),
    "config.json": (read_config, read_run_summary, load_run, go_on),
    "digests.json": (read_config, read_run_summary, load_run, go_on),
    "autoencoder/latent_scale.json": (read_scale,),
}


def forget_digests(run):
    """Make a run as older versions left it."""
    (run / "digests.json").unlink()
    for path in run.glob("*/checkpoints/*/notes/metadata"):
        notes = json.loads(path.read_text())
        notes = {k: v for k, v in notes.items() if k not in ("record", "step")}
        notes.pop("sha256")
        path.write_text(json.dumps({**notes, "sha256": files.json_digest(notes)}))


@pytest.mark.parametrize("is_old", [False, True])
@pytest.mark.parametrize("name", READERS)
def test_a_damaged_text_file_is_one_error_that_names_it(run, name, is_old):
    if is_old:
        forget_digests(run)
    for content in HOSTILE.values():
        (run / name).write_bytes(content)
        for use in READERS[name]:
            with pytest.raises(InputError) as caught:
                use(run)
            (line,) = str(caught.value).splitlines()
            assert f"{name}: " in line
            mended = "delete it and give the same ldm train command" in line
            assert mended or "fields missing or unknown" in line


def test_a_damaged_log_does_not_make_a_run_unfinished(run, caplog):
    for content in HOSTILE.values():
        (run / "metrics.jsonl").write_bytes(content + b"\n")
        caplog.clear()
        assert read_run_summary(run).is_finished
        assert len(caplog.messages) == bool(content)
    assert not go_on(run).trained


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """A run of a version that kept no record, stopped in its second stage."""
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(OLD) as archive:
        members = [m for m in archive if m.name.startswith("runs/old")]
        archive.extractall(folder, members, filter="data")
    return folder / "runs/old"


def test_a_run_of_an_older_version_opens_and_says_what_is_not_compared(
    old, tmp_path, caplog
):
    run = shutil.copytree(old, tmp_path / "run")
    assert load_run(run).step == 300
    (line,) = caplog.messages
    assert "kept no digests.json" in line and "averages" in line
    assert not (run / "digests.json").exists()


def test_what_the_checkpoints_of_an_older_version_hold_is_compared(old, tmp_path):
    run = shutil.copytree(old, tmp_path / "run")
    scale = json.loads((run / "autoencoder/latent_scale.json").read_text())
    edit(run / "autoencoder/latent_scale.json", latent_scale=0.5)
    with pytest.raises(RunError, match=r"it was trained with the latent scale .*0\.5"):
        load_run(run)
    edit(run / "autoencoder/latent_scale.json", **scale)
    (run / "diffusion/checkpoints/300").rename(run / "diffusion/checkpoints/310")
    with pytest.raises(RunError, match="its state is of step 300"):
        load_run(run)
    (run / "diffusion/checkpoints/310").rename(run / "diffusion/checkpoints/300")
    edit(run / "config.json", seed=5)
    with pytest.raises(RunError, match="it is of a run of another"):
        load_run(run)
