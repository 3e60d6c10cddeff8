"""Samples as a labelled data set: read back as both forms, finished, and kept whole."""

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
ASKED = ["--labels", ",".join(LABELS), "--seeds", "0-2", "--steps", 2]
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
    sample_here("--workdir", run, "--as-dataset", out, *(args or ASKED))
    return out


def refused(capsys, run, out, *args):
    return refusal(capsys, "--workdir", run, "--as-dataset", out, *(args or ASKED))


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    return make(run, tmp_path_factory.mktemp("data") / "out")


@pytest.fixture
def out(whole, tmp_path):
    """A copy, to be harmed."""
    return shutil.copytree(whole, tmp_path / "out")


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


# What was written reads back.


def test_tfds_reads_every_image_with_its_label_in_the_order_of_the_files(whole):
    source = opened(whole)
    assert source.class_names == tuple("0123456789") and source.channels == 1
    assert len(source.examples) == len(PLACES)
    for i, place in enumerate(PLACES):
        example = source.examples[i]
        assert np.array_equal(example["image"], read_png(whole / place))
        assert str(example["label"]) == read_texts(whole / place)["label"]
        assert place.split("/")[2] == str(example["label"])


def test_a_slice_of_it_is_the_rows_it_names(whole):
    rows = opened(whole, "train[2:5]").examples
    images = [read_png(whole / place) for place in PLACES[2:5]]
    assert np.array_equal([row["image"] for row in rows], images)


def test_it_reads_as_a_folder_of_images_too(whole):
    source = open_source(
        f"folder:{whole / 'images'}", "train", directory=None, needs=("label",)
    )
    assert source.class_names == tuple(sorted(LABELS))
    condition_texts = [
        (source.class_names[row["label"]], row["image"].tobytes())
        for row in (source.examples[i] for i in range(len(source.examples)))
    ]
    wanted = [
        (place.split("/")[2], read_png(whole / place).tobytes()) for place in PLACES
    ]
    assert sorted(condition_texts) == sorted(wanted)


def test_an_image_is_the_one_that_out_writes(run, whole, tmp_path):
    sample_here("--workdir", run, "--out", tmp_path, *ASKED)
    for i, place in enumerate(PLACES):
        assert (tmp_path / f"{i:06d}.png").read_bytes() == (whole / place).read_bytes()
    grids = [folder / "grid.png" for folder in (tmp_path, whole)]
    assert grids[0].read_bytes() == grids[1].read_bytes()


def test_nothing_but_the_two_forms_and_a_grid_is_written(whole):
    in_tfds = {name for name in files(whole) if name.startswith("tfds/")}
    assert files(whole).keys() - in_tfds == {*PLACES, "grid.png"}
    assert all(name.startswith(TFDS) for name in in_tfds)
    assert sorted(path.name for path in whole.iterdir()) == [
        *("grid.png", "images", "tfds")
    ]


def test_texts_are_captions_in_both_forms(tmp_path):
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


def test_a_model_of_nothing_makes_images_alone(tmp_path):
    run = write_run(config_with(ConditionConfig()), tmp_path / "run")
    out = make(run, tmp_path / "out", "--seeds", "4,5", "--steps", 1)
    assert {name for name in files(out) if name.startswith("images/")} == {
        *("images/train/000000.png", "images/train/000001.png")
    }
    source = opened(out)
    assert source.class_names == ()
    assert set(source.examples[0]) == {"image"}


def test_colours_and_several_files_of_records(monkeypatch, tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(7)]
    for i, path in enumerate(paths):
        picture(path, seed=i)
    monkeypatch.setattr(writing, "MAX_SHARD_BYTES", 2 * paths[0].stat().st_size)
    records = [writing.Record(path, None, None) for path in paths]
    contents = writing.Contents(records, (), (8, 8, 1))
    writing.write_data_set(
        contents, tmp_path / "tfds", name="synthetic", description="Noise."
    )
    assert len(list((tmp_path / TFDS).glob("*array_record*"))) == 4
    images = [row["image"] for row in opened(tmp_path).examples]
    assert np.array_equal(images, [read_png(path) for path in paths])


# The same command again.


def test_the_same_command_gives_the_same_bytes_of_every_file(run, whole, tmp_path):
    assert files(make(run, tmp_path / "again")) == files(whole)


def test_a_finished_command_changes_nothing_and_says_so(run, out, capsys):
    before = stamps(out)
    make(run, out)
    assert stamps(out) == before
    assert "nothing was changed" in capsys.readouterr().out


@pytest.mark.parametrize("lost", [PLACES[4], "grid.png", "tfds"])
def test_what_is_missing_is_made(run, whole, out, lost):
    path = out / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    make(run, out)
    assert files(out) == files(whole)


def test_what_an_interrupted_process_left_half_is_made_whole(run, whole, out):
    shutil.rmtree(out / "tfds")
    half = out / "tfds.part" / "synthetic"
    half.mkdir(parents=True)
    (half / "half").write_bytes(b"half")
    (out / PLACES[0]).unlink()
    (out / f"{PLACES[0]}.part").write_bytes(b"half an image")
    make(run, out)
    assert files(out) == files(whole)


def test_the_first_process_writes_the_data_set_once_all_images_are_there(
    run, whole, capsys, tmp_path
):
    make(run, tmp_path, *ASKED, "--process", "0/2")
    assert "4 images are still to be made" in capsys.readouterr().out
    assert not (tmp_path / "tfds").exists()
    make(run, tmp_path, *ASKED, "--process", "1/2")
    assert not (tmp_path / "tfds").exists()
    make(run, tmp_path, *ASKED, "--process", "0/2")
    assert files(tmp_path) == files(whole)


# What was made differently.


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("--steps 1", ["--as-dataset:", "made differently (steps: 2 there, 1 here)"]),
        ("--labels 7,3", ["--as-dataset:", "3 files of another request"]),
        ("--seeds 0-1", ["--as-dataset:", "of another request"]),
    ],
)
def test_a_data_set_that_was_made_otherwise_stops_the_command_or_is_replaced(
    run, out, capsys, tmp_path, change, words
):
    args, before = [*ASKED, *change.split()], stamps(out)
    message = refused(capsys, run, out, *args)
    assert all(word in message for word in (*words, "--overwrite")), message
    assert stamps(out) == before
    make(run, out, *args, "--overwrite")
    assert files(out) == files(make(run, tmp_path / "anew", *args))


def test_records_of_other_images_stop_the_command_or_are_replaced(
    run, whole, out, capsys
):
    metadata = out / TFDS / "metadata.json"
    metadata.write_text(metadata.read_text().replace("a", "b"))
    before = stamps(out)
    message = refused(capsys, run, out)
    assert f"{TFDS} holds a data set that was made differently" in message
    assert stamps(out) == before
    make(run, out, *ASKED, "--overwrite")
    assert files(out) == files(whole)


@pytest.mark.parametrize("name", ["notes.txt", "3/000009.png", "3/000010.png"])
def test_a_file_of_someone_else_stops_the_command_and_is_never_removed(
    run, out, capsys, name
):
    mine = out / "images" / "train" / name
    mine.write_text("mine")
    if name == "3/000010.png":
        picture(mine)
    before = stamps(out)
    for also in ([], ["--overwrite"]):
        message = refused(capsys, run, out, *ASKED, *also)
        assert f"{name} does not belong to the data set" in message
    assert stamps(out) == before


def test_captions_that_were_changed_stop_the_command(tmp_path):
    path = tmp_path / "captions.jsonl"
    path.write_text("mine\n")
    request = SampleRequest(as_dataset=tmp_path)
    with pytest.raises(InputError, match=r"captions\.jsonl was made differently"):
        synthetic.check_captions(request, path, "ours\n")
    synthetic.check_captions(request, path, "mine\n")


# What classes are called.


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


def test_names_are_found_where_a_data_set_is_and_nothing_is_prepared(tmp_path):
    nowhere = str(tmp_path / "nowhere")
    assert find_class_names("tfds:digits", directory=nowhere) == tuple("0123456789")
    for absent in ("tfds:mnist", "folder:/nowhere", "builder:/nowhere.py"):
        assert find_class_names(absent, directory=nowhere) == ()
    assert list(tmp_path.iterdir()) == []
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
        picture(tmp_path / name / "x.png")
    assert find_class_names(f"folder:{tmp_path}", directory=None) == ("a", "b")


def test_classes_have_the_names_of_the_data_set_or_numbers(monkeypatch):
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


# What it cannot be asked beside.


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--out there", "--out: got it beside --as-dataset, wanted one of the two"),
        ("--interpolate 3 --labels 1,2 --seeds 0", "--interpolate: got it beside"),
        ("--image PICTURE", "--image: got it beside --as-dataset"),
        ("--replay PICTURE", "--as-dataset: got it beside --replay"),
    ],
)
def test_what_has_no_meaning_for_a_data_set_is_one_line(
    run, capsys, tmp_path, flags, words
):
    given = [
        str(picture(tmp_path / "p.png")) if word == "PICTURE" else word
        for word in flags.split()
    ]
    message = refused(capsys, run, tmp_path / "out", *given)
    assert words in message
    assert not (tmp_path / "out").exists()


def test_a_place_that_is_a_file_is_named(run, capsys, tmp_path):
    path = picture(tmp_path / "p.png")
    assert "--as-dataset:" in (line := refused(capsys, run, path))
    assert "is a file, wanted a folder" in line
