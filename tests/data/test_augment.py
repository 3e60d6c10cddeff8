"""Random crops and flips: equal on any number of processes, and for image and map."""

import functools
import itertools

import jax
import numpy as np
import pytest

from ldm_jax.data.pipeline import (
    Augment,
    draw_augmentation,
    load_all,
    make_iterator,
    prepare_example,
    resize,
    to_batch,
)
from ldm_jax.rng import Stream, host_uniform

SIDE = 8
WIDE, TALL = (SIDE, 3 * SIDE), (3 * SIDE, SIDE)


def columns(height, width):
    """Make an image whose pixels hold their row and column."""
    row, column = np.mgrid[:height, :width]
    return np.stack([row, column, row + column], axis=-1).astype(np.uint8)


class WideAndTallImages:
    """Wide and tall images; the segmentation map copies the third channel."""

    def __len__(self):
        return 16

    def __getitem__(self, record, /):
        image = columns(*(WIDE, TALL)[record % 2])
        return {"image": image, "segmentation": image[..., 2].astype(np.int32)}


def stream(augment, *, process=(0, 1), num_threads=1):
    prepare = functools.partial(
        prepare_example, image_size=SIDE, image_channels=3, augment=augment
    )
    return make_iterator(
        WideAndTallImages(),
        prepare,
        batch_size=16,
        seed=5,
        process_index=process[0],
        process_count=process[1],
        num_threads=num_threads,
    )


def take(iterator, num):
    return [to_batch(element) for element in itertools.islice(iterator, num)]


def equal(a, b):
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


BOTH = Augment(seed=5, crop=True, flip=True)


def prepared(example, index, augment):
    return prepare_example(
        {**example, "index": index}, image_size=SIDE, image_channels=3, augment=augment
    )


def test_host_uniform_is_a_uniform_number_of_philox():
    assert host_uniform(0, Stream.CROP, 0) == 0.24596310127046672
    bits = np.random.Philox(key=[7, Stream.FLIP], counter=[0, 9, 0, 0])
    assert host_uniform(7, Stream.FLIP, 9) == np.random.Generator(bits).random()
    draws = [host_uniform(7, Stream.FLIP, i) for i in range(4000)]
    assert 0.0 <= min(draws) and max(draws) < 1.0
    counts = np.histogram(draws, bins=10, range=(0, 1))[0]
    assert np.abs(counts - 400).max() < 5 * np.sqrt(400)


def test_host_uniform_differs_by_seed_stream_and_example():
    draws = {
        host_uniform(seed, stream, index)
        for seed in (0, 1, 2**32 - 1)
        for stream in (Stream.CROP, Stream.FLIP)
        for index in (0, 1, 2, 2**32 - 1)
    }
    assert len(draws) == 24


def test_crops_cover_every_offset_and_half_are_flipped():
    example = {"image": columns(*WIDE)}
    found = [prepared(example, i, BOTH)["image"] for i in range(600)]
    flipped = [image[0, 0, 1] > image[0, -1, 1] for image in found]
    assert 250 < sum(flipped) < 350
    first = [int(image[0, :, 1].min()) for image in found]
    assert np.bincount(first).min() > 10 and len(set(first)) == WIDE[1] - SIDE + 1
    for image in found:
        assert set(np.abs(np.diff(image[0, :, 1].astype(int)))) == {1}
        assert np.array_equal(image[:, 0, 0], np.arange(SIDE))


def test_segmentation_is_cropped_and_flipped_with_its_image():
    for batch in take(stream(BOTH), 4):
        assert np.array_equal(batch.image[..., 2], batch.segmentation)
    assert len({batch.tobytes() for batch in batch.image}) > 10


def test_without_augmentation_examples_are_centre_crops():
    example = WideAndTallImages()[0]
    plain = prepared(example, 3, None)
    assert np.array_equal(plain["image"], columns(*WIDE)[:, SIDE : 2 * SIDE])
    assert np.array_equal(plain["image"], resize(example["image"], SIDE, channels=3))
    off = prepared(example, 3, Augment(seed=5, crop=False, flip=False))
    assert equal(plain, off)
    batch = load_all(WideAndTallImages(), image_size=SIDE, image_channels=3)
    assert np.array_equal(batch.image[0], plain["image"])


def test_crop_and_flip_do_not_change_each_others_draws():
    views = [draw_augmentation(BOTH, i) for i in range(20)]
    assert [draw_augmentation(BOTH._replace(flip=False), i)[0] for i in range(20)] == [
        place for place, _ in views
    ]
    assert [draw_augmentation(BOTH._replace(crop=False), i) for i in range(20)] == [
        (None, flipped) for _, flipped in views
    ]


def test_augmentation_varies_by_epoch_and_seed():
    first, second = take(stream(BOTH), 2)
    other = take(stream(BOTH._replace(seed=6)), 1)[0]
    images = [sorted(x.tobytes() for x in batch.image) for batch in (first, second)]
    assert images[0] != images[1]
    assert not np.array_equal(first.image, other.image)


def test_augmentation_is_the_same_on_any_number_of_processes_and_threads():
    expected = take(stream(BOTH), 3)
    assert equal(take(stream(BOTH, num_threads=4), 3), expected)
    halves = [take(stream(BOTH, process=(i, 2)), 3) for i in range(2)]
    for step, i in itertools.product(range(3), range(2)):
        part = jax.tree.map(lambda column, i=i: column[i::2], expected[step])
        assert equal(part, halves[i][step])


@pytest.mark.parametrize("consumed", [0, 1, 5])
def test_augmentation_of_a_restored_stream_continues_exactly(consumed):
    unbroken = take(stream(BOTH), consumed + 2)[consumed:]
    first, again = stream(BOTH), stream(BOTH, num_threads=3)
    take(first, consumed)
    again.set_state(first.get_state())
    assert equal(take(again, 2), unbroken)
