"""A folder of images as a data set: splits, classes, captions and errors."""

import functools
import hashlib
import itertools
import json
import logging

import numpy as np
import pytest
from PIL import Image

from ldm_jax.data.folder import FolderExamples, open_folder
from ldm_jax.data.folder_listing import MAX_PLACES, list_folder, select
from ldm_jax.data.pipeline import load_all, make_iterator, prepare_example, to_batch
from ldm_jax.data.sources import open_source, read_captions
from ldm_jax.tools.check_images.check import in_words
from ldm_jax.tools.check_images.survey import survey, to_tree
from ldm_jax.types import InputError, RunError

SIDE = 8


def level(i):
    return (37 * i) % 251


def write(path, i=0, *, size=(SIDE, SIDE), colour=None):
    """Write a flat image whose grey level is a function of its number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mode, value = ("L", level(i)) if colour is None else ("RGB", colour)
    Image.new(mode, size, value).save(path)
    return path


@pytest.fixture
def pool(tmp_path):
    """Write forty images of two classes, without folders for splits."""
    for i in range(40):
        write(tmp_path / "pool" / ("bird", "cat")[i % 2] / f"{i:02d}.png", i)
    return tmp_path / "pool"


@pytest.fixture
def captioned(tmp_path):
    folder = tmp_path / "captioned"
    for i in range(6):
        path = write(folder / f"{i}.png", i)
        path.with_suffix(".txt").write_text(f"image number {i}\n")
    return folder


def examples_of(folder, split="all", **options):
    return open_source(f"folder:{folder}", split, directory=None, **options)


def error_message(call, *args, **kwargs):
    with pytest.raises(InputError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def digest(name):
    return int(hashlib.sha256(name.encode()).hexdigest(), 16)


def test_test_split_is_a_twentieth_chosen_by_file_name(pool):
    listing = list_folder(pool)
    train, test = select(listing, "train"), select(listing, "test")
    assert set(test) == {x for x in listing.images if digest(x) < 2**256 // 20}
    assert sorted(train + test) == list(listing.images) == list(select(listing, "all"))
    for i in range(40, 400):
        write(pool / "cat" / f"{i}.png")
    listing = list_folder(pool)
    assert set(test) <= set(select(listing, "test"))
    assert set(train) <= set(select(listing, "train"))
    assert 10 < len(select(listing, "test")) < 30


def test_slices_partition_a_split_and_keep_every_class(pool):
    listing = list_folder(pool)
    train = set(select(listing, "train"))
    for cut in ("90%", "-4", "7", "50%"):
        parts = [set(select(listing, f"train[{x}]")) for x in (f":{cut}", f"{cut}:")]
        assert parts[0] | parts[1] == train and not parts[0] & parts[1]
    assert len(select(listing, "all[:25%]")) == 10
    assert {listing.class_of(x) for x in select(listing, "all[:25%]")} == {
        "bird",
        "cat",
    }
    assert len(select(listing, "all[10%:-10%]")) == 32


def test_two_images_give_one_test_image_and_one_image_gives_none(tmp_path):
    write(tmp_path / "a.png")
    listing = list_folder(tmp_path)
    assert select(listing, "train") == select(listing, "all") == ("a.png",)
    assert "try --data.train-split all" in error_message(select, listing, "test")
    write(tmp_path / "b.png")
    listing = list_folder(tmp_path)
    assert len(select(listing, "train")) == len(select(listing, "test")) == 1


def test_folders_named_as_splits_are_the_splits(tmp_path):
    for i, split in enumerate(("train", "train", "train", "val")):
        write(tmp_path / split / ("dog", "ant")[i % 2] / f"{i}.png", i)
    source = examples_of(tmp_path, "train")
    assert source.class_names == ("ant", "dog")
    assert [source.examples[i]["label"] for i in range(3)] == [0, 1, 1]
    assert len(examples_of(tmp_path, "val").examples) == 1
    assert len(examples_of(tmp_path, "all[:50%]").examples) == 2
    message = error_message(examples_of, tmp_path, "test")
    assert "wanted one of train, val, all" in message
    assert message.endswith("try --data.test-split val")


def test_train_folder_is_a_split_alone_and_a_class_beside_others(tmp_path):
    write(tmp_path / "one" / "train" / "a.png")
    message = error_message(examples_of, tmp_path / "one", "test")
    assert "--data.train-split 'train[5%:]' --data.test-split 'train[:5%]'" in message
    for name in ("bus", "train"):
        write(tmp_path / "two" / name / "a.png")
    assert examples_of(tmp_path / "two").class_names == ("bus", "train")


def test_examples_are_sorted_by_path_and_have_their_labels(pool):
    examples = examples_of(pool).examples
    found = [examples[i] for i in range(40)]
    wanted = [*range(0, 40, 2), *range(1, 40, 2)]
    assert [x["image"].shape for x in found] == [(SIDE, SIDE, 1)] * 40
    assert [x["image"][0, 0, 0] for x in found] == [level(i) for i in wanted]
    assert [x["label"] for x in found] == [0] * 20 + [1] * 20
    assert "caption" not in found[0]
    assert examples_of(pool).channels == 1


def test_listing_follows_links_without_cycles_and_skips_hidden_files(pool):
    (pool / "cat" / "again").symlink_to(pool)
    (pool / "bird" / "link.png").symlink_to(pool / "bird" / "00.png")
    write(pool / ".cache" / "a.png")
    write(pool / "bird" / "._00.png")
    (pool / "cat" / "self.png").symlink_to("self.png")
    assert len(list_folder(pool).images) == 41


def link_all(root, count):
    """Make folders of one image each that all hold links to the others."""
    names = [f"{i:03d}" for i in range(count)]
    for name in names:
        write(root / name / "a.png")
        for other in names:
            if other != name:
                (root / name / other).symlink_to(root / other)
    return names


def test_folders_that_all_link_to_each_other_are_listed_in_few_places(tmp_path, caplog):
    names = link_all(tmp_path, 20)
    found = list_folder(tmp_path)
    assert len(found.images) == 20 * MAX_PLACES
    assert {f"{name}/a.png" for name in names} <= set(found.images)
    assert found.images == list_folder(tmp_path).images
    assert f"in at most {MAX_PLACES} places; links to it" in caplog.text


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda x: None, ["is not there, wanted a folder of images"]),
        (lambda x: x.write_text(""), ["is a file, wanted a folder"]),
        (lambda x: x.mkdir(), ["holds no images but nothing", ".webp"]),
        (
            lambda x: write(x / "a.png").rename(x / "a.heic"),
            ["holds no images but 1 other files (a.heic)"],
        ),
    ],
)
def test_path_without_images_is_refused(tmp_path, make, words):
    make(tmp_path / "x")
    message = error_message(examples_of, tmp_path / "x")
    assert all(word in message for word in words), message


@pytest.mark.parametrize("split", ["tset", "train[", "train[:x]", "train[90%]", ""])
def test_unknown_split_is_refused(pool, split):
    message = error_message(examples_of, pool, split)
    assert f"no split {split!r}, wanted one of train, test, all" in message


def test_missing_classes_are_refused_only_where_labels_are_needed(tmp_path):
    flat, one, mixed = (tmp_path / name for name in ("flat", "one", "mixed"))
    write(flat / "a.png")
    write(one / "cat" / "a.png")
    for name in ("cat/a.png", "dog/b.png", "c.png"):
        write(mixed / name)
    assert examples_of(flat).class_names == examples_of(mixed).class_names == ()
    assert examples_of(one).class_names == ("cat",)
    for folder, words in (
        (flat, "lie in no sub-folders"),
        (one, "has one class only, cat, wanted two or more"),
        (mixed, "1 of 3 images in"),
        (mixed, "lie in none of the folders of its 2 classes (cat, dog): c.png"),
    ):
        message = error_message(examples_of, folder, needs=("label",))
        assert words in message and "--diffusion.condition.no-label" in message


def test_broken_files_are_skipped_up_to_max_broken_files(pool, caplog):
    (pool / "cat" / "01.png").write_bytes(b"")
    torn = pool / "bird" / "02.png"
    torn.write_bytes(torn.read_bytes()[:-30])
    with pytest.raises(InputError) as caught:
        examples_of(pool, max_broken_files=1)
    for word in (
        "2 of 40 images",
        "wanted at most 1: ",
        "bird/02.png (",
        "cat/01.png (an empty file)",
        "--data.max-broken-files 2",
    ):
        assert word in str(caught.value)
    with caplog.at_level(logging.WARNING):
        assert len(examples_of(pool, max_broken_files=2).examples) == 38
        assert len(examples_of(pool, "train", max_broken_files=2).examples) < 38
    (warning,) = caplog.messages
    assert "2 of 40 images cannot be read and are skipped" in warning


def damage(path):
    """Corrupt the pixel data of a PNG file; its header and end stay intact."""
    content = bytearray(path.read_bytes())
    middle = content.index(b"IDAT") + 4
    content[middle : middle + 4] = b"\xff\xff\xff\xff"
    path.write_bytes(content)


def test_corrupt_pixel_data_in_a_small_folder_is_refused_on_opening(pool):
    damage(pool / "cat" / "07.png")
    assert "1 of 40 images" in error_message(examples_of, pool)


def test_corrupt_pixel_data_in_a_large_folder_stops_the_stream(pool):
    damage(pool / "cat" / "07.png")
    options = {"needs": (), "image_size": 0, "max_broken_files": 0}
    examples, _ = open_folder(pool, "all", **options, max_bytes_in_memory=0)
    assert isinstance(examples, FolderExamples) and len(examples) == 40
    with pytest.raises(
        RunError, match=r"cat/07.png: cannot be decoded \(.*check-images"
    ):
        list(itertools.islice(stream(examples, batch_size=8), 5))


def stream(examples, *, batch_size, process=(0, 1), **options):
    prepare = functools.partial(prepare_example, image_size=SIDE, image_channels=1)
    return make_iterator(
        examples,
        prepare,
        batch_size=batch_size,
        seed=3,
        process_index=process[0],
        process_count=process[1],
        **options,
    )


def test_folder_batches_are_the_same_on_any_number_of_threads_and_processes(pool):
    examples = examples_of(pool).examples

    def images(**options):
        rows = itertools.islice(stream(examples, **options), 12)
        return np.stack([to_batch(row).image for row in rows])

    expected = images(batch_size=8)
    assert np.array_equal(images(batch_size=8, num_threads=4), expected)
    halves = [images(batch_size=8, process=(i, 2)) for i in range(2)]
    assert all(np.array_equal(halves[i], expected[:, i::2]) for i in range(2))
    assert set(expected[:5].reshape(40, -1)[:, 0]) == {level(i) for i in range(40)}


def test_small_images_are_enlarged_with_one_warning(tmp_path, caplog):
    write(tmp_path / "a.png", size=(40, 20))
    write(tmp_path / "b.png", size=(64, 64))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            examples = examples_of(tmp_path, image_size=32).examples
    (warning,) = caplog.messages
    assert warning.endswith(
        "1 of 2 images are smaller than 32 pixels and are enlarged: a.png (40x20)"
    )
    batch = load_all(examples, image_size=32, image_channels=3)
    assert batch.image.shape == (2, 32, 32, 3)


def captions_of(folder):
    examples = examples_of(folder, needs=("caption",)).examples
    found = [examples[i]["caption"] for i in range(len(examples))]
    assert read_captions(f"folder:{folder}", "all", directory=None) == found
    return found


def test_captions_are_read_from_text_files_beside_the_images(captioned):
    assert captions_of(captioned) == [f"image number {i}" for i in range(6)]


def test_captions_are_read_from_json_lines_files(tmp_path):
    for name in ("a.png", "train/b.png", "train/deep/c.png"):
        write(tmp_path / "x" / name)
    rows = [
        {"file": "a.png", "caption": "größer"},
        {"file_name": "./train/b.png", "text": ["the first", "another"]},
    ]
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "x" / "captions.jsonl").write_text(f"\ufeff{lines}\n", encoding="utf-8")
    others = [{"file_name": "c.png", "text": " c "}, {"file_name": "c.png", "box": 3}]
    text = "\r\n".join(map(json.dumps, others))
    (tmp_path / "x" / "train" / "deep" / "metadata.jsonl").write_text(text)
    write(tmp_path / "x" / "bus" / "d.png").with_suffix(".txt").write_text("")
    assert captions_of(tmp_path / "x") == ["größer", "", "the first", "c"]


def test_missing_captions_are_refused_and_unmatched_captions_are_warned_of(
    captioned, caplog
):
    (captioned / "readme.txt").write_text("x")
    (captioned / "captions.jsonl").write_text('{"file": "9.png", "caption": "nine"}')
    with caplog.at_level(logging.WARNING):
        assert len(captions_of(captioned)) == 6
    (warning,) = caplog.messages
    assert (
        "2 captions have no image: captions.jsonl line 1 (9.png), readme.txt" in warning
    )
    for i in range(5):
        (captioned / f"{i}.txt").unlink()
    message = error_message(captions_of, captioned)
    assert "5 of 6 images in" in message
    assert "have no caption: 0.png, 1.png, 2.png and 2 more" in message
    assert "2 captions have no image" in message
    assert "caption" not in examples_of(captioned).examples[0]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"file": "0.png", "caption": "a"}\n{"file"', "line 2: not JSON"),
        (b'\n{"file": "0.png", "caption": "\xff"}', "line 2: not UTF-8"),
        (b'{"file": "0.png", "caption": 3}', 'got {"file": "0.png", "caption": 3}'),
        (b'{"file": "0.png"}', 'wanted {"file": "IMAGE", "caption": "TEXT"}'),
        (b'{"file": "0.png", "caption": []}', "wanted"),
        (b'["0.png", "a"]', "line 1: got"),
        (b'{"file": "0.png", "caption": "\\ud800"}', "not Unicode"),
        (
            b'{"file": "0.png", "caption": "a"}\n{"file": "0.png", "caption": "b"}',
            "0.png has two captions, in captions.jsonl line 1 and in captions.jsonl "
            "line 2",
        ),
    ],
)
def test_broken_captions_line_is_refused_with_its_file(tmp_path, content, words):
    write(tmp_path / "0.png")
    (tmp_path / "captions.jsonl").write_bytes(content)
    message = error_message(captions_of, tmp_path)
    assert words in message and "captions.jsonl" in message, message


def test_captions_that_are_not_utf8_or_given_twice_are_refused(captioned):
    (captioned / "3.txt").write_bytes("groß".encode("latin-1"))
    message = error_message(captions_of, captioned)
    assert "3.txt: not UTF-8" in message and "at byte 3" in message
    (captioned / "3.txt").write_text("now it is")
    assert captions_of(captioned)[3] == "now it is"
    (captioned / "captions.jsonl").write_text('{"file": "3.png", "caption": "b"}')
    assert (
        "3.png has two captions, in captions.jsonl line 1 and in 3.txt"
        in error_message(captions_of, captioned)
    )


def lines(file, key="text"):
    """Lines of metadata.jsonl for four images."""
    rows = ({"file_name": file.format(i), key: "a cat"} for i in range(4))
    return {"metadata.jsonl": "\n".join(map(json.dumps, rows))}


TABLE = "file_name,text\n" + "".join(f"{i}.png,a cat\n" for i in range(4))
UNREAD = {  # files, and the words of what is wrong with them and what is nearest
    "backslashes": (
        lines(".\\{}.png"),
        ["4 captions have no image", ".\\0.png, wanted slashes; the nearest is 0.png"],
    ),
    "another folder": (
        lines("images/{}.png"),
        ["(images/0.png; the nearest is 0.png)"],
    ),
    "a folder of Windows": (
        lines("C:\\data\\{}.png"),
        ["wanted slashes; the nearest is 0.png"],
    ),
    "another suffix": (lines("{}.jpg"), ["(0.jpg; the nearest is 0.png)"]),
    "capitals": (lines("{}.PNG"), ["(0.PNG; the nearest is 0.png)"]),
    "nothing near": (lines("cat {}.png"), ["metadata.jsonl line 1 (cat 0.png), "]),
    "a column prompt": (
        lines("{}.png", "prompt"),
        ["4 texts are not read", "line 1 (has prompt, wanted caption or text)"],
    ),
    "metadata.csv": (
        {"metadata.csv": TABLE},
        ["metadata.csv (wanted captions.jsonl or metadata.jsonl)"],
    ),
    "captions.json": (
        {"captions.json": "{}"},
        ["captions.json (wanted captions.jsonl"],
    ),
    "a table in a folder": ({"sub/prompts.tsv": "x"}, ["sub/prompts.tsv (wanted"]),
    "TXT": ({f"{i}.TXT": "x" for i in range(4)}, ["0.TXT (wanted 0.txt beside 0.png)"]),
    "caption": (
        {f"{i}.caption": "x" for i in range(4)},
        ["0.caption (wanted 0.txt beside 0.png)"],
    ),
    "after the suffix": (
        {f"{i}.png.txt": "x" for i in range(4)},
        ["0.png.txt (wanted 0.txt beside 0.png)"],
    ),
    "another name": ({"1.text": "x"}, ["1.text (wanted 1.txt beside 1.png)"]),
}


@pytest.mark.parametrize("kind", UNREAD)
def test_captions_that_match_nothing_are_told_with_the_nearest(tmp_path, kind):
    files, words = UNREAD[kind]
    for i in range(4):
        write(tmp_path / f"{i}.png", i)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    message = error_message(captions_of, tmp_path)
    assert all(word in message for word in ["4 of 4 images in", *words]), message
    tree = to_tree(
        survey(tmp_path, train_split="all", test_split=None), image_size=None
    )
    told = "\n".join(in_words({**tree, "contact_sheet": None}))
    assert "no image is broken" not in told
    assert words[-1].rstrip(", ") in told, told


def test_other_files_of_images_that_have_captions_are_not_told_of(captioned, caplog):
    (captioned / "0.json").write_text("{}")
    (captioned / "metadata.csv").write_text(TABLE)
    (captioned / "metadata.jsonl").write_text('{"file_name": "0.png", "box": 3}')
    with caplog.at_level(logging.WARNING):
        assert len(captions_of(captioned)) == 6
    assert not caplog.messages
    tree = to_tree(survey(captioned, train_split="all", test_split=None), image_size=0)
    assert tree["texts_not_read"] == () and tree["captions_without_image"] == ()


def test_a_line_of_captions_too_deep_to_read_is_told(tmp_path):
    write(tmp_path / "0.png")
    (tmp_path / "captions.jsonl").write_text("[" * 10**5)
    assert "line 1: not JSON" in error_message(captions_of, tmp_path)


@pytest.mark.parametrize("suffix", [".jfif", ".JPE", ".avif"])
def test_a_file_of_every_name_of_its_format_is_an_image(tmp_path, suffix):
    kind = "AVIF" if suffix == ".avif" else "JPEG"
    Image.new("L", (SIDE, SIDE)).save(tmp_path / f"a{suffix}", format=kind)
    assert len(examples_of(tmp_path).examples) == 1
