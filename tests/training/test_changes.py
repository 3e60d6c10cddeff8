"""A run that goes on with other values: what may change, and what is recorded."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from ldm_jax.cli.train import parse
from ldm_jax.config import CONFIG_FILE, read_config
from ldm_jax.files import json_digest, read_changes, read_record
from ldm_jax.parallel.make_layout import make_layout
from ldm_jax.pretrained.load_run import load_run
from ldm_jax.run import train
from ldm_jax.tools.report.run_summary import read_run_summary
from ldm_jax.tools.report.writing import write_report
from ldm_jax.training import workdir as workdir_lib
from ldm_jax.training.digest import run_digest
from ldm_jax.training.workdir import (
    Change,
    check_changed,
    check_workdir,
    facts_of,
    open_workdir,
)
from ldm_jax.types import InputError, RunError
from tests.support.tiny import get_config

STEPS = "diffusion.steps"


def with_values(config, **values):
    """Return a config with other values, by dotted names with _ for the dots."""
    for name, value in values.items():
        config = replaced(config, name.split("__"), value)
    return config


def replaced(part, names, value):
    first, *rest = names
    inner = replaced(getattr(part, first), rest, value) if rest else value
    return dataclasses.replace(part, **{first: inner})


TINY = get_config()
LONGER = with_values(TINY, diffusion__steps=12)
CHANGE = Change({STEPS: [8, 12]}, {"autoencoder": 6, "diffusion": 8})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    train(TINY, workdir)
    return workdir


@pytest.fixture
def run(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


@pytest.fixture(scope="module")
def extended(whole, tmp_path_factory):
    """The same run with four more steps."""
    workdir = tmp_path_factory.mktemp("extended") / "run"
    shutil.copytree(whole, workdir)
    assert train(LONGER, workdir, changes=[STEPS]).trained
    return workdir


def content(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def final_of(run):
    return json.loads((run / "final.json").read_text())


def test_an_extended_run_has_the_weights_of_a_run_that_was_never_shorter(
    extended, tmp_path
):
    unbroken = train(LONGER, tmp_path / "run").final
    final = final_of(extended)
    assert final["digest_by_stage"] == unbroken["digest_by_stage"]
    assert final["config_digest"] == unbroken["config_digest"]
    # What happened is a part of the digest.
    assert final["digest"] != unbroken["digest"] and "changes" not in unbroken
    assert final["changes"] == [CHANGE._asdict()]
    by_stage = final["digest_by_stage"]
    assert final["digest"] == run_digest(by_stage, changes=[CHANGE._asdict()])


def test_an_extended_run_is_a_run_as_any_other(whole, extended, tmp_path):
    run, final = shutil.copytree(extended, tmp_path / "run"), final_of(extended)
    assert read_config(run) == LONGER
    loaded = load_run(run)
    assert (loaded.digest, loaded.step) == (final["digest"], 12)
    for changes in ([STEPS], []):  # the same command, or one with the value
        outcome = train(LONGER, run, changes=changes)
        assert not outcome.trained and outcome.final == final
    assert read_changes(run) == [CHANGE._asdict()]
    # What its last checkpoint was made with is compared as before.
    shutil.rmtree(run / "diffusion/checkpoints/12")
    with pytest.raises(RunError, match="wanted the last one"):
        load_run(run)
    assert train(LONGER, run).final["digest"] == final["digest"]


def test_a_report_says_what_was_changed_and_how_to_do_it_again(extended, tmp_path):
    summary = read_run_summary(extended)
    write_report(summary, tmp_path / "report.html", with_samples=False)
    page = (tmp_path / "report.html").read_text()
    told = "diffusion.steps from 8 to 12, at step 6 of autoencoder and step 8 of diff"
    assert told in page
    first, second = (line for line in page.splitlines() if "ldm train" in line)
    assert first.endswith("--diffusion.steps 8  # to step 8 of diffusion")
    assert second.endswith("--change diffusion.steps=12")


def test_a_value_that_is_not_named_is_refused_with_what_names_it(run):
    before = content(run)
    with pytest.raises(InputError, match=r"or --change diffusion\.steps=12 to go on"):
        train(LONGER, run)
    both = with_values(LONGER, diffusion__optim__lr=1e-4)
    with pytest.raises(InputError, match=r"--change diffusion\.optim\.lr=0\.0001 to"):
        train(both, run, changes=[STEPS])
    with pytest.raises(InputError, match=r"seed \(0 there, 3 here\).*same values$"):
        train(with_values(LONGER, seed=3), run, changes=[STEPS])
    assert content(run) == before


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"seed": 3}, "got seed, wanted steps, "),
        ({"diffusion__channels": 12}, r"got diffusion\.channels, wanted "),
        ({"diffusion__prediction": "v"}, r"got diffusion\.prediction, wanted "),
        ({"diffusion__batch_size": 16}, r"got diffusion\.batch_size, wanted "),
        ({"autoencoder__steps": 8}, r"got autoencoder\.steps, but the diffusion"),
        ({"autoencoder__optim__lr": 1.0}, r"got autoencoder\.optim\.lr, but the diff"),
        ({"data__source": "tfds:mnist"}, r"got data\.source, .*try data\.directory"),
        ({"diffusion__steps": 7}, r"got diffusion\.steps=7, wanted at least the 8 "),
    ],
)
def test_a_change_that_makes_another_run_is_refused(values, words, run):
    before, config = content(run), with_values(TINY, **values)
    changes = [name.replace("__", ".") for name in values]
    with pytest.raises(InputError, match=f"--change: {words}"):
        train(config, run, changes=changes)
    assert content(run) == before


def test_a_change_needs_a_run_with_a_record(run, tmp_path):
    with pytest.raises(InputError, match="new is not a run yet"):
        train(LONGER, tmp_path / "new", changes=[STEPS])
    assert not (tmp_path / "new").exists()
    (run / "digests.json").unlink()
    (run / "final.json").unlink()
    with pytest.raises(InputError, match=r"kept no digests\.json"):
        check_workdir(LONGER, run, [STEPS])


def test_processes_that_change_other_fields_are_told_apart():
    layout = make_layout(TINY.parallel)
    assert facts_of(TINY, layout, [STEPS]) != facts_of(TINY, layout)


@pytest.mark.parametrize("call", range(4))
def test_an_interrupted_change_is_finished_by_the_same_command(call, run, monkeypatch):
    reference = shutil.copytree(run, run.with_name("reference"))
    with open_workdir(LONGER, reference, CHANGE):
        pass
    calls = []

    def counted(real):
        def write(*args, **kwargs):
            calls.append(real)
            if len(calls) == call + 1:
                raise KeyboardInterrupt
            real(*args, **kwargs)

        return write

    with monkeypatch.context() as patched:
        for name in ("write_record", "_write_config", "write_text"):
            patched.setattr(workdir_lib, name, counted(getattr(workdir_lib, name)))
        if call < 3:
            with pytest.raises(KeyboardInterrupt), open_workdir(LONGER, run, CHANGE):
                pass
            with pytest.raises(InputError):
                check_workdir(with_values(TINY, diffusion__steps=10), run, ())
        else:
            with open_workdir(LONGER, run, CHANGE):
                assert len(calls) == 3
    fields = check_workdir(LONGER, run, [STEPS])
    assert fields == (CHANGE.fields if call == 0 else {})
    with open_workdir(LONGER, run, CHANGE if fields else None):
        pass
    assert content(run) == content(reference)
    assert (run / CONFIG_FILE).read_text().count('"steps": 12') == 1
    assert not (run / "final.json").exists()


def test_a_run_does_not_go_on_from_before_its_change(run):
    with open_workdir(LONGER, run, CHANGE):
        pass
    check_changed(run, "autoencoder", 4)  # the change is none of its own
    shutil.rmtree(run / "diffusion/checkpoints/8")
    with pytest.raises(RunError) as caught:
        train(LONGER, run)
    told = (
        "got the checkpoint of step 6, wanted that of step 8, at which diffusion.steps"
    )
    assert told in str(caught.value)


def test_a_checkpoint_that_had_no_part_in_a_change_is_not_of_the_run(
    run, extended, caplog
):
    # Step 10 without the change; and one with a change that the record lacks.
    shutil.copytree(
        extended / "diffusion/checkpoints/10", run / "diffusion/checkpoints/10"
    )
    with pytest.raises(RunError, match=r"after a change that digests\.json does not"):
        load_run(run, step=10)
    (run / "digests.json").write_bytes((extended / "digests.json").read_bytes())
    (run / "config.json").write_bytes((extended / "config.json").read_bytes())
    (run / "final.json").unlink()
    notes = run / "diffusion/checkpoints/10/notes/metadata"
    values = json.loads(notes.read_text())
    values["record"].pop("changes")
    values.pop("sha256")
    notes.write_text(json.dumps({**values, "sha256": json_digest(values)}))
    with pytest.raises(RunError, match=r"without the change of diffusion\.steps at st"):
        load_run(run, step=10)


def test_an_autoencoder_alone_is_extended_and_its_scale_measured_again(tmp_path):
    alone = with_values(TINY, stages=("autoencoder",))
    longer = with_values(alone, autoencoder__steps=8)
    before = train(alone, tmp_path / "run").final
    found = train(longer, tmp_path / "run", changes=["autoencoder.steps"]).final
    unbroken = train(longer, tmp_path / "one").final
    assert found["digest_by_stage"] == unbroken["digest_by_stage"]
    assert found["latent_scale"] == unbroken["latent_scale"] != before["latent_scale"]


def test_a_changed_learning_rate_acts_from_its_step_on(whole, extended, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    slower = with_values(LONGER, diffusion__optim__lr=1e-5)
    final = train(slower, run, changes=[STEPS, "diffusion.optim.lr"]).final
    assert list(final["changes"][0]["fields"]) == [STEPS, "diffusion.optim.lr"]
    rates = {
        record["step"]: record["learning_rate"]
        for record in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if record["stage"] == "diffusion"
    }
    assert np.allclose([rates[n] for n in range(1, 9)], 1e-3)
    assert np.allclose([rates[n] for n in range(10, 13)], 1e-5)
    assert (
        final["digest_by_stage"]["diffusion"]
        != (final_of(extended)["digest_by_stage"]["diffusion"])
    )


def test_data_moves_with_a_run_if_it_is_the_same_data(tmp_path):
    for place in ("there", "here"):
        (tmp_path / place).mkdir()
        for number in range(3):
            picture = Image.new("L", (8, 8), 10 * number)
            picture.save(tmp_path / place / f"{number}.png")
    moved = {
        place: with_values(TINY, data__source=f"folder:{tmp_path / place}")
        for place in ("there", "here")
    }
    run = tmp_path / "run"
    with open_workdir(moved["there"], run):
        pass
    shutil.rmtree(tmp_path / "there")
    fields = check_workdir(moved["here"], run, ["data.source"])
    with open_workdir(moved["here"], run, Change(fields, {})):
        pass
    assert read_config(run) == moved["here"]
    assert len(read_record(run)["configs"]) == 2
    Image.new("L", (8, 8), 40).save(tmp_path / "here/3.png")
    other = with_values(moved["here"], log__every=2)
    with (
        pytest.raises(InputError, match=r"holds other files than when the run"),
        open_workdir(other, run, Change({"log.every": [1, 2]}, {})),
    ):
        pass


def test_the_command_line_names_a_field_and_its_value():
    args = ["--config", "digits", "--workdir", "run"]
    changes = ["--change", "diffusion.steps=4000", "--change=diffusion.optim.lr=1e-5"]
    flags = parse([*args, *changes])
    assert flags.config.diffusion.steps == 4000
    assert flags.config.diffusion.optim.lr == 1e-5
    assert flags.changes == (STEPS, "diffusion.optim.lr")
    assert flags.config.seed == parse(args).config.seed


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("seed=3", "--change: got 'seed', wanted FIELD=VALUE, with steps, cond"),
        ("workdir=x", "--change: got 'workdir', wanted FIELD=VALUE, with steps"),
        ("diffusion.steps", "--diffusion.steps: got no value, wanted a whole num"),
        ("diffusion.steps=x", "--diffusion.steps: got 'x', wanted a whole number"),
        ("diffusion.step=4", "--change: got 'diffusion.step', wanted FIELD=VALUE"),
        ("optim=4", "--change: got 'optim', wanted FIELD=VALUE, with steps"),
    ],
)
def test_a_wrong_change_is_one_line(change, words):
    with pytest.raises(InputError) as caught:
        parse(["--config", "digits", "--workdir", "run", "--change", change])
    assert str(caught.value).startswith(words)
