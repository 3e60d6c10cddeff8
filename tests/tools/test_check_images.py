"""A folder of images: `ldm check-images`, the contact sheet and training on it."""

import dataclasses
import json
import logging
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from ldm_jax.build import open_iterator, open_split
from ldm_jax.cli import check_images
from ldm_jax.cli.exit_codes import run_main
from ldm_jax.config import ConditionConfig, DataConfig, TextConfig
from ldm_jax.data.byte_pair_tokenizer import train_byte_pairs, write_byte_pairs
from ldm_jax.data.pipeline import to_batch
from ldm_jax.parallel.make_layout import make_layout
from ldm_jax.tools.check_images.contact_sheet import TILE, choose, draw_sheet
from ldm_jax.training.train_tokenizer import keep_tokenizer
from ldm_jax.types import InputError
from tests.support.commands import succeeded, train
from tests.support.tiny import get_config

SIDE = 8
NUM_CLASSES = 10


@pytest.fixture(scope="module")
def good_folder(tmp_path_factory):
    """Write ten classes of four images each, all with captions and without faults."""
    root = tmp_path_factory.mktemp("pictures") / "whole"
    random = np.random.RandomState(0)
    for label in range(NUM_CLASSES):
        folder = root / f"class {label}"
        folder.mkdir(parents=True)
        for i in range(4):
            pixels = random.randint(0, 256, (SIDE + label, SIDE, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
            (folder / f"{i}.txt").write_text(f"picture {i} of class {label}")
    return root


@pytest.fixture
def faulty_folder(good_folder, tmp_path):
    """Copy the good folder and add one fault of each kind."""
    root = shutil.copytree(good_folder, tmp_path / "odd")
    shutil.copy(root / "class 0" / "1.png", root / "class 1" / "copy.png")
    (root / "class 2" / "0.txt").unlink()
    (root / "class 3" / "notes.txt").write_text("x")
    (root / "class 4" / "broken.png").write_bytes(b"\x89PNG")
    (root / "class 5" / "a.heic").write_bytes(b"x")
    return root


def report(capsys, *args):
    """Run the command; return its exit code, stdout and stderr."""
    with pytest.raises(SystemExit) as stop:
        run_main(check_images.main, "ldm check-images", [str(arg) for arg in args])
    printed = capsys.readouterr()
    return stop.value.code, printed.out, printed.err


def test_good_folder_gets_a_report_and_a_contact_sheet(good_folder, tmp_path, capsys):
    code, out, _ = report(capsys, good_folder, "--out", tmp_path / "sheet.png")
    assert code == 0
    for words in (
        "40 images (train ",
        "    9  class 9",
        "height           8      12      17",
        "formats   PNG 40",
        "modes     RGB 40",
        "captions  40, of 5 to 5 words",
        "no image is broken",
        f"contact sheet: {tmp_path / 'sheet.png'}",
    ):
        assert words in out, out
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 8 * TILE and sheet.height > 5 * TILE


def test_report_counts_and_names_faulty_files(faulty_folder, tmp_path, capsys):
    arguments = (faulty_folder, "--out", tmp_path / "sheet.png", "--image-size", 10)
    code, out, _ = report(capsys, *arguments, "--json")
    assert code == 1
    tree = json.loads(out)
    assert list(tree["broken"]) == ["class 4/broken.png"]
    assert tree["num_images"] == 42
    assert tree["classes"]["class 1"]["train"] + tree["classes"]["class 1"]["test"] == 5
    assert tree["duplicates"] == [["class 0/1.png", "class 1/copy.png"]]
    assert "class 2/0.png" in tree["without_caption"]
    assert tree["captions_without_image"] == ["class 3/notes.txt"]
    assert tree["other_files"] == {".heic": 1, ".txt": 1}
    assert tree["smaller"]["than"] == 10 and len(tree["smaller"]["files"]) == 41
    code, out, _ = report(capsys, *arguments)
    assert code == 1
    assert "broken: 1\n  class 4/broken.png: " in out
    assert "smaller than 10 pixels: 41\n" in out
    assert "and 31 more (--json names all)" in out


def test_report_counts_duplicates_in_both_splits(good_folder, tmp_path, capsys):
    root = tmp_path / "split"
    for split in ("train", "test"):
        shutil.copytree(good_folder / "class 0", root / split / "class 0")
    Image.new("L", (SIDE, SIDE)).save(root / "train" / "class 0" / "new.png")
    code, out, _ = report(capsys, root, "--out", tmp_path / "sheet.png")
    assert code == 0
    assert "of these, in both splits: 4" in out
    assert "test/class 0/0.png = train/class 0/0.png" in out
    _, out, _ = report(
        capsys, root, "--out", tmp_path / "sheet.png", "--test-split", "train"
    )
    assert "in both splits" not in out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["gone"], "gone is not there, wanted a folder of images"),
        (["{}", "--out", "{}/sheet.png"], "where it would count as one of its images"),
        (["{}", "--out", "sheet.jpg"], "wanted a name that ends in .png"),
        (["{}", "--out", "nowhere/sheet.png"], "no folder nowhere"),
        (["{}", "--image-size", "0"], "--image-size: got 0, wanted at least 1"),
        (["{}", "--test-split", "val"], "no split 'val', wanted one of train, test"),
        ([], "PATH: not given"),
    ],
)
def test_bad_check_images_arguments_are_refused_in_one_line(
    good_folder, capsys, args, words
):
    code, out, err = report(capsys, *(arg.format(good_folder) for arg in args))
    assert code == 2 and not out
    assert words in err and "Traceback" not in err
    assert len(err.strip().splitlines()) == 1


def test_contact_sheet_images_are_spread_over_the_folder():
    names = [str(i) for i in range(1000)]
    chosen = list(map(int, choose(names)))
    assert (len(chosen), chosen[0], chosen[-1]) == (64, 0, 999)
    assert set(np.diff(chosen)) <= {15, 16}
    assert choose(names[:5]) == names[:5]


def test_thumbnail_dims_the_area_outside_the_centre_crop(tmp_path):
    Image.new("RGB", (3 * TILE, TILE), (0, 0, 0)).save(tmp_path / "a.png")
    page = draw_sheet(tmp_path, ["a.png"], title="one", labels={"a.png": "long " * 99})
    row = page[page.shape[0] // 2 - 20]
    black = np.flatnonzero((row == 0).all(axis=-1))
    assert black.size == TILE // 3
    assert page.shape[1] < 2 * TILE


def folder_config(root, **changed):
    tiny = get_config()
    data = dataclasses.replace(
        tiny.data, source=f"folder:{root}", num_train_examples=0, **changed
    )
    return dataclasses.replace(tiny, data=data)


def test_wrong_num_classes_is_refused_with_the_flag_to_change(good_folder):
    with pytest.raises(InputError, match=r"has 10; try --data.num-classes 10"):
        open_split(folder_config(good_folder, num_classes=3), "train")


def test_crop_and_flip_change_training_images_but_not_labels(good_folder):
    plain, varied = (
        folder_config(good_folder, crop=crop, flip=flip)
        for crop, flip in (("center", False), ("random", True))
    )
    layout = make_layout(plain.parallel)
    batches = [
        to_batch(next(open_iterator(config, batch_size=8, layout=layout)))
        for config in (plain, varied)
    ]
    assert np.array_equal(batches[0].label, batches[1].label)
    assert not np.array_equal(batches[0].image, batches[1].image)


@pytest.fixture
def text_config(good_folder):
    text = TextConfig(
        vocab_size=300, length=6, width=16, depth=1, num_heads=2, head_width=8
    )
    config = folder_config(good_folder)
    condition = ConditionConfig(context="text", text=text, tokenizer="captions")
    diffusion = dataclasses.replace(
        config.diffusion, transformer_depth=1, condition=condition
    )
    return dataclasses.replace(config, diffusion=diffusion)


def test_tokenizer_is_trained_from_the_captions_of_a_folder(
    text_config, tmp_path, caplog
):
    with caplog.at_level(logging.WARNING):
        keep_tokenizer(text_config, tmp_path)
    (warning,) = caplog.messages
    assert warning.startswith("39 of 39 captions are longer than the 6 tokens")
    assert (tmp_path / "tokenizer" / "tokenizer.json").exists()


def test_captions_cut_by_a_given_tokenizer_are_warned_of_once(
    text_config, tmp_path, caplog
):
    text = train_byte_pairs(["picture of class", "picture of class"], vocab_size=280)
    write_byte_pairs(text, tmp_path / "given")
    condition = dataclasses.replace(
        text_config.diffusion.condition, tokenizer=str(tmp_path / "given")
    )
    diffusion = dataclasses.replace(text_config.diffusion, condition=condition)
    config = dataclasses.replace(text_config, diffusion=diffusion)
    assert open_split(config, "train").examples[0]["tokens"].shape == (6,)
    run = tmp_path / "run"
    run.mkdir()
    with caplog.at_level(logging.WARNING):
        keep_tokenizer(config, run)
        (run / "metrics.jsonl").write_text("")
        keep_tokenizer(config, run)
    (warning,) = caplog.messages
    assert (
        "captions are longer than the 6 tokens of the context, and are cut" in warning
    )


@pytest.mark.skipif("LDM_JAX_SLOW" not in os.environ, reason="trains both stages")
def test_a_run_trains_on_a_folder(good_folder, tmp_path):
    folder = ("--data.source", f"folder:{good_folder}", "--data.num-train-examples", 0)
    varied = ("--data.crop", "random", "--data.flip")
    out = succeeded(train(tmp_path / "run", *folder, *varied))
    assert "finished" in out
    assert (tmp_path / "run" / "final.json").exists()
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert DataConfig(**config["data"]).flip
