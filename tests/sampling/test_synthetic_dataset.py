"""Samples as a labelled data set: read as TFDS and as a folder, resumed, checked."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from ldm_jax.build import build_model
from ldm_jax.config import ClipConfig, ConditionConfig
from ldm_jax.data import tfds_writer as writing
from ldm_jax.data.sources import find_class_names, open_source
from ldm_jax.images import read_png
from ldm_jax.sampling import synthetic_dataset as synthetic
from ldm_jax.sampling.request import SampleRequest
from ldm_jax.sampling.sampling_config import SamplingConfig
from ldm_jax.types import InputError
from tests.data.test_tokenizer import write_clip
from tests.support.commands import refusal, sample_here, write_run
from tests.support.pngs import read_texts
from tests.support.stand_ins import config_with, no_networks, picture

LABELS = ("7", "3", "0")
NUM_SEEDS = 3
REQUEST = ["--labels", ",".join(LABELS), "--seeds", "0-2", "--steps", 2]
PLACES = [
    f"images/train/{label}/{NUM_SEEDS * row + seed:06d}.png"
    for row, label in enumerate(LABELS)
    for seed in range(NUM_SEEDS)
]
TFDS = "tfds/synthetic/1.0.0"
WORDS = ("a cat", 'häßlich,\n"quoted"')


@pytest.fixture(scope="module", autouse=True)
def formulas():
    with no_networks():
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(config_with(), tmp_path_factory.mktemp("runs") / "run")


def make(run, out, *args):
    sample_here("--workdir", run, "--as-dataset", out, *(args or REQUEST))
    return out


def error_line(capsys, run, out, *args):
    return refusal(capsys, "--workdir", run, "--as-dataset", out, *(args or REQUEST))


@pytest.fixture(scope="module")
def complete(run, tmp_path_factory):
    return make(run, tmp_path_factory.mktemp("data") / "out")


@pytest.fixture
def out(complete, tmp_path):
    """Copy the complete data set, to be damaged."""
    return shutil.copytree(complete, tmp_path / "out")


def files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def stamps(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def opened(out, split="train"):
    return open_source("tfds:synthetic", split, directory=str(out / "tfds"))


# Reading the data set back.


def test_tfds_reads_every_image_and_label_in_file_order(complete):
    source = opened(complete)
    assert source.class_names == tuple("0123456789") and source.channels == 1
    assert len(source.examples) == len(PLACES)
    for i, place in enumerate(PLACES):
        example = source.examples[i]
        assert np.array_equal(example["image"], read_png(complete / place))
        assert str(example["label"]) == read_texts(complete / place)["label"]
        assert place.split("/")[2] == str(example["label"])


def test_split_slice_of_a_synthetic_data_set_reads_its_rows(complete):
    rows = opened(complete, "train[2:5]").examples
    images = [read_png(complete / place) for place in PLACES[2:5]]
    assert np.array_equal([row["image"] for row in rows], images)


def test_synthetic_data_set_reads_as_a_folder_of_images(complete):
    source = open_source(
        f"folder:{complete / 'images'}", "train", directory=None, needs=("label",)
    )
    assert source.class_names == tuple(sorted(LABELS))
    condition_texts = [
        (source.class_names[row["label"]], row["image"].tobytes())
        for row in (source.examples[i] for i in range(len(source.examples)))
    ]
    wanted = [
        (place.split("/")[2], read_png(complete / place).tobytes()) for place in PLACES
    ]
    assert sorted(condition_texts) == sorted(wanted)


def test_as_dataset_writes_the_images_of_out(run, complete, tmp_path):
    sample_here("--workdir", run, "--out", tmp_path, *REQUEST)
    for i, place in enumerate(PLACES):
        assert (tmp_path / f"{i:06d}.png").read_bytes() == (
            complete / place
        ).read_bytes()
    grids = [folder / "grid.png" for folder in (tmp_path, complete)]
    assert grids[0].read_bytes() == grids[1].read_bytes()


def test_as_dataset_writes_images_tfds_and_a_grid_only(complete):
    in_tfds = {name for name in files(complete) if name.startswith("tfds/")}
    assert files(complete).keys() - in_tfds == {*PLACES, "grid.png"}
    assert all(name.startswith(TFDS) for name in in_tfds)
    assert sorted(path.name for path in complete.iterdir()) == [
        *("grid.png", "images", "tfds")
    ]


def test_prompts_become_captions_in_folder_and_tfds(tmp_path):
    clip = ClipConfig(
        vocab_size=521, width=8, depth=1, num_heads=2, mlp_width=8, eos_token_id=520
    )
    condition = ConditionConfig(label=True, context="clip", clip=clip)
    run = write_run(config_with(condition, transformer_depth=1), tmp_path / "run")
    (tmp_path / "tokenizer").mkdir()
    write_clip(tmp_path / "tokenizer", "sd1")
    args = ["--tokenizer", tmp_path / "tokenizer", "--steps", 1, "--seeds", "0"]
    args += ["--labels", "1,2", "--prompt", *WORDS]
    out = make(run, tmp_path / "out", *args)
    rows = opened(out).examples
    assert [bytes(row["caption"]).decode() for row in rows] == [*WORDS, *WORDS]
    assert [int(row["label"]) for row in rows] == [1, 1, 2, 2]
    folder = open_source(
        f"folder:{out / 'images'}", "train", directory=None, needs=("caption",)
    )
    assert [row["caption"] for row in folder.examples] == [*WORDS, *WORDS]
    lines = (out / "images/train/captions.jsonl").read_text().splitlines()
    assert json.loads(lines[3]) == {"file": "2/000003.png", "caption": WORDS[1]}


def test_data_set_of_an_unconditional_model_has_images_only(tmp_path):
    run = write_run(config_with(ConditionConfig()), tmp_path / "run")
    out = make(run, tmp_path / "out", "--seeds", "4,5", "--steps", 1)
    assert {name for name in files(out) if name.startswith("images/")} == {
        *("images/train/000000.png", "images/train/000001.png")
    }
    source = opened(out)
    assert source.class_names == ()
    assert set(source.examples[0]) == {"image"}


def test_colour_images_are_written_to_several_shards(monkeypatch, tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(7)]
    for i, path in enumerate(paths):
        picture(path, seed=i)
    monkeypatch.setattr(writing, "MAX_SHARD_BYTES", 2 * paths[0].stat().st_size)
    records = [writing.Record(path, None, None) for path in paths]
    contents = writing.Contents(records, (), (8, 8, 1))
    root, digest = tmp_path / "tfds", writing.digest_of(contents)
    writing.write_data_set(
        contents, root, name="synthetic", description="Noise.", digest=digest
    )
    assert writing.written_digest(tmp_path / TFDS) == digest
    assert len(list((tmp_path / TFDS).glob("*array_record*"))) == 4
    images = [row["image"] for row in opened(tmp_path).examples]
    assert np.array_equal(images, [read_png(path) for path in paths])


# The same command again.


def test_same_as_dataset_command_writes_the_same_bytes(run, complete, tmp_path):
    assert files(make(run, tmp_path / "again")) == files(complete)


def test_repeated_as_dataset_command_changes_nothing(run, out, capsys):
    before = stamps(out)
    make(run, out)
    assert stamps(out) == before
    assert "nothing was changed" in capsys.readouterr().out


@pytest.mark.parametrize("lost", [PLACES[4], "grid.png", "tfds"])
def test_missing_data_set_files_are_written_again(run, complete, out, lost):
    path = out / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    make(run, out)
    assert files(out) == files(complete)


def test_partial_files_of_an_interrupted_process_are_completed(run, complete, out):
    shutil.rmtree(out / "tfds")
    half = out / "tfds.part" / "synthetic"
    half.mkdir(parents=True)
    (half / "half").write_bytes(b"half")
    (out / PLACES[0]).unlink()
    (out / f"{PLACES[0]}.part").write_bytes(b"half an image")
    make(run, out)
    assert files(out) == files(complete)


def test_first_process_writes_the_data_set_after_all_images(
    run, complete, capsys, tmp_path
):
    make(run, tmp_path, *REQUEST, "--process", "0/2")
    assert "4 images are still to be made" in capsys.readouterr().out
    assert not (tmp_path / "tfds").exists()
    make(run, tmp_path, *REQUEST, "--process", "1/2")
    assert not (tmp_path / "tfds").exists()
    make(run, tmp_path, *REQUEST, "--process", "0/2")
    assert files(tmp_path) == files(complete)


# Files that differ from the request.


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("--steps 1", ["--as-dataset:", "made differently (steps: 2 there, 1 here)"]),
        ("--labels 7,3", ["--as-dataset:", "3 files of another request"]),
        ("--seeds 0-1", ["--as-dataset:", "of another request"]),
    ],
)
def test_data_set_of_another_request_is_refused_or_overwritten(
    run, out, capsys, tmp_path, change, words
):
    args, before = [*REQUEST, *change.split()], stamps(out)
    message = error_line(capsys, run, out, *args)
    assert all(word in message for word in (*words, "--overwrite")), message
    assert stamps(out) == before
    make(run, out, *args, "--overwrite")
    assert files(out) == files(make(run, tmp_path / "anew", *args))


def test_records_that_differ_are_refused_or_overwritten(run, complete, out, capsys):
    metadata = out / TFDS / "metadata.json"
    metadata.write_text(metadata.read_text().replace("a", "b"))
    before = stamps(out)
    message = error_line(capsys, run, out)
    assert f"{TFDS} holds a data set that was made differently" in message
    assert stamps(out) == before
    make(run, out, *REQUEST, "--overwrite")
    assert files(out) == files(complete)


@pytest.mark.parametrize("name", ["notes.txt", "3/000009.png", "3/000010.png"])
def test_foreign_file_is_refused_and_never_removed(run, out, capsys, name):
    foreign = out / "images" / "train" / name
    foreign.write_text("mine")
    if name == "3/000010.png":
        picture(foreign)
    before = stamps(out)
    for also in ([], ["--overwrite"]):
        message = error_line(capsys, run, out, *REQUEST, *also)
        assert f"{name} does not belong to the data set" in message
    assert stamps(out) == before


def test_changed_captions_file_is_refused(tmp_path):
    path = tmp_path / "captions.jsonl"
    path.write_text("mine\n")
    request = SampleRequest(as_dataset=tmp_path)
    with pytest.raises(InputError, match=r"captions\.jsonl was made differently"):
        synthetic.check_captions(request, path, "ours\n")
    synthetic.check_captions(request, path, "mine\n")


# Class names and class folders.


@pytest.mark.parametrize(
    ("names", "folders"),
    [
        (("ant", "bee"), ("ant", "bee")),
        (("bee", "ant"), ("0_bee", "1_ant")),
        (("red circle", "red square"), ("red circle", "red square")),
        (("a/b", "a:b"), ("0_a_b", "1_a_b")),
        (("Ant", "ant"), ("0_Ant", "1_ant")),
        ((".", "..", "x"), ("0", "1", "2_x")),
        ((".hidden", "x "), ("hidden", "x")),
        (tuple(map(str, range(10))), tuple(map(str, range(10)))),
        (tuple(map(str, range(12))), tuple(f"{i:02d}" for i in range(12))),
        (("é" * 200,), ("é" * 80,)),
    ],
)
def test_class_folders_are_safe_distinct_and_sort_as_the_classes(names, folders):
    found = synthetic.class_folders(names)
    assert found == folders
    assert list(found) == sorted(set(found))
    assert all(len(name.encode()) < 256 and name[0] != "." for name in found)


def test_class_names_are_read_without_preparing_a_data_set(tmp_path):
    nowhere = str(tmp_path / "nowhere")
    assert find_class_names("tfds:digits", directory=nowhere) == tuple("0123456789")
    for absent in ("tfds:mnist", "folder:/nowhere", "builder:/nowhere.py"):
        assert find_class_names(absent, directory=nowhere) == ()
    assert list(tmp_path.iterdir()) == []
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
        picture(tmp_path / name / "x.png")
    assert find_class_names(f"folder:{tmp_path}", directory=None) == ("a", "b")


def test_class_names_are_those_of_the_data_set_or_numbers(monkeypatch):
    config, of_run = config_with(), SamplingConfig(workdir="run")
    ten, numbers = tuple(f"name {i}" for i in range(10)), tuple("0123456789")

    def names(*found, settings=of_run):
        monkeypatch.setattr(synthetic, "find_class_names", lambda *a, **k: found)
        return synthetic.class_names_of(build_model(config), config.data, settings)

    assert names(*ten) == ten
    assert names(*(f" name\n{i}" for i in range(10))) == ten
    for unfit in ((), ten[:9], ("",) * 10, ("x",) * 10):
        assert names(*unfit) == numbers
    assert names(*ten, settings=SamplingConfig(weights="w")) == numbers


def test_the_names_of_classes_run_no_file_that_a_run_names(tmp_path):
    path = tmp_path / "squares.py"
    path.write_text("raise AssertionError('imported')")
    data = dataclasses.replace(config_with().data, source=f"builder:{path}")
    settings = SamplingConfig(workdir="run")
    names = synthetic.class_names_of(build_model(config_with()), data, settings)
    assert names == tuple("0123456789")


# Flags that conflict with --as-dataset.


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--out there", "--out: got it beside --as-dataset, wanted one of the two"),
        ("--interpolate 3 --labels 1,2 --seeds 0", "--interpolate: got it beside"),
        ("--image PICTURE", "--image: got it beside --as-dataset"),
        ("--replay PICTURE", "--as-dataset: got it beside --replay"),
    ],
)
def test_flags_that_conflict_with_as_dataset_are_refused(
    run, capsys, tmp_path, flags, words
):
    arguments = [
        str(picture(tmp_path / "p.png")) if word == "PICTURE" else word
        for word in flags.split()
    ]
    message = error_line(capsys, run, tmp_path / "out", *arguments)
    assert words in message
    assert not (tmp_path / "out").exists()


def test_as_dataset_path_that_is_a_file_is_refused(run, capsys, tmp_path):
    path = picture(tmp_path / "p.png")
    assert "--as-dataset:" in (line := error_line(capsys, run, path))
    assert "is a file, wanted a folder" in line
