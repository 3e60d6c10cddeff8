import functools
import itertools

import jax
import numpy as np
import pytest
from sklearn.datasets import load_digits

from ldm_jax.data.pipeline import (
    load_all,
    make_iterator,
    prepare_example,
    resize,
    to_batch,
)
from ldm_jax.data.sources import open_source
from ldm_jax.types import InputError


@pytest.fixture(scope="module")
def train():
    return open_source("tfds:digits", "train", directory=None).examples


@pytest.fixture(scope="module")
def test():
    return open_source("tfds:digits", "test", directory=None).examples


def stream(examples, *, batch_size=64, seed=0, process=(0, 1)):
    prepare = functools.partial(prepare_example, image_size=8, image_channels=1)
    return make_iterator(
        examples,
        prepare,
        batch_size=batch_size,
        seed=seed,
        process_index=process[0],
        process_count=process[1],
    )


def take(iterator, num):
    return [to_batch(element) for element in itertools.islice(iterator, num)]


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def rows(examples):
    return {examples[i]["image"].tobytes() for i in range(len(examples))}


def test_digits_splits_are_disjoint_and_hold_all_digits(train, test):
    assert (len(train), len(test)) == (1500, 297)
    real = np.rint(load_digits().images * (255 / 16)).astype(np.uint8)
    assert rows(train) | rows(test) == {image.tobytes() for image in real}
    assert len(rows(train)) + len(rows(test)) == len({i.tobytes() for i in real})


def test_digits_labels_belong_to_their_images(train):
    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    label = {i.tobytes(): t for i, t in zip(images, digits.target, strict=True)}
    assert all(
        label[train[i]["image"].tobytes()] == train[i]["label"] for i in range(1500)
    )


def test_both_digits_splits_hold_every_class(train, test):
    for examples in (train, test):
        labels = [examples[i]["label"] for i in range(len(examples))]
        assert np.bincount(labels, minlength=10).min() >= 20


def test_an_epoch_holds_every_example_once_and_the_next_has_another_order(train):
    batches = take(stream(train, batch_size=100), 30)
    images = [[image.tobytes() for image in batch.image] for batch in batches]
    first = list(itertools.chain(*images[:15]))
    second = list(itertools.chain(*images[15:]))
    assert sorted(first) == sorted(second)
    assert set(first) == rows(train)
    assert first != second


def test_stream_order_is_a_function_of_the_seed(train):
    assert equal(take(stream(train), 1)[0], take(stream(train), 1)[0])
    other = take(stream(train, seed=1), 1)[0]
    assert not np.array_equal(take(stream(train), 1)[0].label, other.label)


def test_example_index_counts_the_examples_of_the_stream(train):
    index = np.concatenate([batch.example_index for batch in take(stream(train), 40)])
    assert np.array_equal(index, np.arange(40 * 64))


@pytest.mark.parametrize("consumed", [0, 1, 23, 24, 47])
def test_a_restored_stream_continues_exactly(train, consumed):
    unbroken = take(stream(train), consumed + 3)[consumed:]
    first = stream(train)
    take(first, consumed)
    again = stream(train)
    again.set_state(first.get_state())
    assert all(equal(a, b) for a, b in zip(unbroken, take(again, 3), strict=True))


def test_two_processes_read_the_batches_of_one(train):
    expected = take(stream(train), 3)
    halves = [take(stream(train, process=(i, 2)), 3) for i in range(2)]
    for step in range(3):
        for i in range(2):
            part = jax.tree.map(lambda column, i=i: column[i::2], expected[step])
            assert equal(part, halves[i][step])


def test_a_batch_that_does_not_divide_by_the_processes_is_refused(train):
    with pytest.raises(ValueError, match="3 processes"):
        stream(train, process=(0, 3))


def test_resizing_keeps_a_flat_image_flat_and_makes_grey_colour():
    flat = np.full((8, 8, 1), 77, np.uint8)
    assert (resize(flat, 32, channels=3) == 77).all()
    assert resize(flat, 32, channels=3).shape == (32, 32, 3)
    assert resize(flat, 16, channels=1).shape == (16, 16, 1)


def test_load_all_reads_in_the_order_of_the_split(test):
    batch = load_all(test, image_size=8, image_channels=1)
    assert np.array_equal(batch.example_index, np.arange(297))
    assert all(np.array_equal(batch.image[i], test[i]["image"]) for i in range(297))


def test_load_all_with_a_limit_spreads_over_the_split(test):
    by_class = sorted(test, key=lambda example: int(example["label"]))
    batch = load_all(by_class, image_size=8, image_channels=1, limit=60)
    assert len(batch.image) == 60
    assert set(batch.label) == set(range(10))
    rows = [by_class[i]["image"] for i in batch.example_index]
    assert np.array_equal(batch.image, rows)
    fewer = load_all(by_class, image_size=8, image_channels=1, limit=30)
    assert set(fewer.example_index) < set(batch.example_index)


def test_unwritable_data_directory_is_refused(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(InputError, match=r"data\.directory"):
        open_source("tfds:digits", "train", directory=str(blocked))


def test_tensorflow_is_never_imported(train):
    import sys

    assert "tensorflow" not in sys.modules
