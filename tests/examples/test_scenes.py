import io
import itertools

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from examples.scenes.captions import Wanted, WantedThing, parse_caption, write_caption
from examples.scenes.checker.scenes import (
    Reading,
    check,
    matches,
    read_scene,
    read_scenes,
)
from examples.scenes.draw import HELD_OUT, SPLITS, TRAINED, Placed, make_scene, paint
from examples.scenes.outlines import HALF_EXTENTS, coverage, is_inside
from examples.scenes.things import (
    COLOURS,
    PAIRS,
    PLACES,
    RADII,
    RELATIONS,
    RGB,
    SHAPES,
    SIZES,
    Thing,
    is_at,
    stands,
)
from ldm_jax.types import InputError

NUM = 80
ALL_MOST = (1, 2, 3)


@pytest.fixture(scope="module")
def scenes():
    return {
        most: [make_scene("test", i, most=most, pixels=32) for i in range(NUM)]
        for most in ALL_MOST
    }


def pale(pixels=32):
    return np.full((pixels, pixels, 3), 245.0)


def picture(*things, pixels=32):
    placed = [Placed(thing, RADII[thing.size][1]) for thing in things]
    return paint(pale(pixels), placed)


def thing(pair, x, y, size="small"):
    colour, shape = pair.split()
    return Thing(shape=shape, colour=colour, size=size, x=float(x), y=float(y))


def same(a, b):
    return np.array_equal(a.image, b.image) and a[1:] == b[1:]


def is_read(scene, reading):
    """Whether everything is recognised, within one pixel of where it is."""

    def rows(things):
        return sorted((t.pair, t.size, t.x, t.y) for t in things)

    found, true = rows(reading.things), rows(scene.things)
    return (
        reading.unknown == 0
        and [row[:2] for row in found] == [row[:2] for row in true]
        and np.allclose([r[2:] for r in found], [r[2:] for r in true], rtol=0, atol=8)
    )


def jpeg(image):
    data = io.BytesIO()
    Image.fromarray(image).save(data, format="JPEG", quality=60)
    return np.asarray(Image.open(data))


def degraded(images, how):
    random = np.random.RandomState(0)
    levels = images.astype(np.float64)
    if how == "blur":
        levels = ndimage.gaussian_filter(levels, (0, 0.7, 0.7, 0))
    if how == "noise":
        levels = levels + 8.0 * random.standard_normal(levels.shape)
    if how == "colour shift":
        levels = levels + random.randint(-10, 11, (len(levels), 1, 1, 3))
    if how == "jpeg":
        return np.stack([jpeg(image) for image in images])
    return np.rint(np.clip(levels, 0, 255)).astype(np.uint8)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_fills_its_box(shape):
    axis = np.linspace(-1.5, 1.5, 601)
    rows, columns = np.nonzero(is_inside(shape, *np.meshgrid(axis, axis)))
    half_width, half_height = HALF_EXTENTS[shape]
    for found, half in ((columns, half_width), (rows, half_height)):
        ends = axis[found.min()], axis[found.max()]
        assert np.allclose(ends, (-half, half), rtol=0, atol=0.011)


def test_coverage_is_the_area():
    parts = coverage("circle", radius=45, shift=(3, 5), pixels=32)
    assert np.isclose(parts.sum(), np.pi * (45 / 8) ** 2, rtol=0.01)
    assert parts.min() == 0.0 and parts.max() == 1.0


@pytest.mark.parametrize("most", ALL_MOST)
def test_an_example_is_a_function_of_its_index(most, scenes):
    for i in (7, 0, 3):
        assert same(make_scene("test", i, most=most, pixels=32), scenes[most][i])


def test_split_seed_index_and_config_each_make_another_example():
    first = make_scene("train", 0, most=3, pixels=32)
    others = [
        make_scene("test", 0, most=3, pixels=32),
        make_scene("train", 1, most=3, pixels=32),
        make_scene("train", 0, most=2, pixels=32),
        make_scene("train", 0, most=3, pixels=32, seed=1),
    ]
    assert not any(np.array_equal(first.image, other.image) for other in others)


def test_more_things_than_there_is_room_for_are_refused():
    with pytest.raises(InputError, match="got 4"):
        make_scene("train", 0, most=4, pixels=32)
    with pytest.raises(InputError, match="got 48"):
        make_scene("train", 0, most=1, pixels=48)


def test_a_larger_picture_shows_the_same_scene():
    small = make_scene("test", 5, most=3, pixels=32)
    large = make_scene("test", 5, most=3, pixels=64)
    assert small[1:] == large[1:]
    assert large.image.shape == (64, 64, 3)
    averaged = large.image.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))
    assert np.abs(averaged - small.image).max() <= 10.0  # 8x8 samples a pixel or 16x16


@pytest.mark.parametrize("most", ALL_MOST)
def test_things_are_inside_apart_and_all_different(most, scenes):
    for scene in scenes[most]:
        assert len({t.pair for t in scene.things}) == len(scene.things) <= most
        assert np.ptp(scene.image[[0, -1]].astype(int), axis=1).max() <= 12
        alone = [picture(t) != picture() for t in scene.things]
        for a, b in itertools.combinations(alone, 2):
            touched = ndimage.binary_dilation(a.any(-1), np.ones((3, 3)))
            assert not (touched & b.any(-1)).any()


@pytest.mark.parametrize("most", ALL_MOST)
def test_captions_are_true(most, scenes):
    for scene in scenes[most]:
        assert parse_caption(scene.caption) == scene.wanted
        for wanted, true in zip(scene.wanted.things, scene.things, strict=True):
            assert wanted.pair == true.pair
            assert wanted.size in (None, true.size)
            assert wanted.place is None or is_at(wanted.place, true, slack=0.0)
        if scene.wanted.relation:
            assert stands(
                scene.things[0], scene.wanted.relation, scene.things[1], slack=0.0
            )


def test_captions_are_varied(scenes):
    said = [scene for most in ALL_MOST for scene in scenes[most]]
    assert len({scene.caption for scene in said}) > 0.9 * len(said)
    wanted = [w for scene in said for w in scene.wanted.things]
    assert {w.place for w in wanted} == {None, *PLACES}
    assert {w.size for w in wanted} == {None, *SIZES}
    assert {w.shape for w in wanted} == set(SHAPES)
    assert {w.colour for w in wanted} == set(COLOURS)
    assert {scene.wanted.relation for scene in said} == {None, *RELATIONS}


@pytest.mark.parametrize("most", ALL_MOST)
def test_held_out_pairs_are_in_no_training_picture(most, scenes):
    train = [make_scene("train", i, most=most, pixels=32) for i in range(NUM)]
    for scene in (*train, *scenes[most]):
        assert not HELD_OUT & {t.pair for t in scene.things}
    for i in range(30):
        scene = make_scene("held_out", i, most=most, pixels=32)
        assert HELD_OUT & {w.pair for w in parse_caption(scene.caption).things}


def test_each_colour_and_each_shape_is_trained_in_all_pairs_but_one():
    assert len(HELD_OUT) == 8 and len(TRAINED) == 56
    for axis, names in enumerate((COLOURS, SHAPES)):
        assert {pair[axis] for pair in HELD_OUT} == set(names)


def test_the_rows_say_what_is_drawn_and_the_label_is_the_first():
    scene = make_scene("test", 4, most=3, pixels=32)
    for row, true in itertools.zip_longest(scene.rows, scene.things):
        if true is None:
            assert (row == -1).all()
        else:
            assert (SHAPES[row[0]], COLOURS[row[1]], SIZES[row[2]]) == (
                true.shape,
                true.colour,
                true.size,
            )
            assert (row[3], row[4]) == (true.x, true.y)
    assert PAIRS[scene.label] == scene.things[0].pair


@pytest.mark.parametrize("most", ALL_MOST)
def test_every_picture_is_read_exactly(most, scenes):
    readings = read_scenes(np.stack([scene.image for scene in scenes[most]]))
    for scene, reading in zip(scenes[most], readings, strict=True):
        assert is_read(scene, reading)
        assert matches(scene.caption, reading)


def test_larger_pictures_are_read_exactly():
    for i in range(6):
        scene = make_scene("held_out", i, most=3, pixels=64)
        assert is_read(scene, read_scene(scene.image))


@pytest.mark.parametrize("how", ["blur", "noise", "colour shift", "jpeg"])
def test_imperfect_pictures_are_read(how, scenes):
    several = [scene for most in ALL_MOST for scene in scenes[most][:34]]
    images = degraded(np.stack([scene.image for scene in several]), how)
    right = [is_read(*both) for both in zip(several, read_scenes(images), strict=True)]
    assert np.mean(right) >= 0.98


def test_every_shape_of_every_colour_and_size_is_read():
    things = [
        Thing(shape=shape, colour=colour, size=size, x=120.0, y=133.0)
        for (colour, shape), size in itertools.product(PAIRS, SIZES)
    ]
    readings = read_scenes(np.stack([picture(t) for t in things]))
    assert [(r.things[0].pair, r.things[0].size) for r in readings] == [
        (t.pair, t.size) for t in things
    ]


def test_where_a_thing_is_does_not_depend_on_its_neighbours(scenes):
    several = np.stack([scene.image for scene in scenes[3][:5]])
    assert [read_scene(image) for image in several] == read_scenes(several)


def test_noise_is_no_scene():
    random = np.random.RandomState(0)
    noise = random.randint(0, 256, (20, 32, 32, 3))
    smooth = ndimage.gaussian_filter(random.standard_normal(noise.shape), (0, 3, 3, 0))
    smooth = np.clip(128 + 60 * smooth / smooth.std(), 0, 255)
    dark = np.full((1, 32, 32, 3), 90)
    for images in (noise, smooth, dark):
        for reading in read_scenes(images.astype(np.uint8)):
            assert reading == Reading((), 1)


def test_an_empty_picture_shows_nothing():
    assert read_scene(picture()) == Reading((), 0)


@pytest.mark.parametrize("colour", COLOURS)
def test_a_faded_thing_is_unknown_or_unseen(colour):
    whole = picture(thing(f"{colour} circle", 100, 140, "large")).astype(np.float64)
    faint, half = (
        np.rint(pale() + part * (whole - pale())).astype(np.uint8)
        for part in (0.25, 0.5)
    )
    assert read_scene(half) == Reading((), 1)
    assert not read_scene(faint).things


@pytest.mark.parametrize("rgb", [(140, 140, 140), (120, 72, 40), (40, 180, 180)])
def test_a_thing_of_another_colour_is_unknown(rgb, monkeypatch):
    monkeypatch.setitem(RGB, "red", rgb)
    image = picture(thing("red star", 100, 140, "large"))
    monkeypatch.undo()
    assert read_scene(image) == Reading((), 1)


def blob(radius, inside):
    """A black picture of whatever `inside` says of x and y, in nominal radii."""
    axis = (np.arange(256) + 0.5 - 128) / radius
    covered = inside(*np.meshgrid(axis, axis)).reshape(32, 8, 32, 8).mean((1, 3))
    return np.rint(pale() + covered[..., None] * (44.0 - pale())).astype(np.uint8)


@pytest.mark.parametrize(
    "image",
    [
        blob(45, lambda x, y: np.hypot(x / 1.4, y / 0.7) <= 1),  # an ellipse
        blob(45, lambda x, y: (abs(x) <= 1.3) & (abs(y) <= 0.6)),  # a bar
        blob(45, lambda x, y: (np.hypot(x, y) <= 1.2) & (y >= 0)),  # half a disc
        blob(45, lambda x, y: (abs(x) <= 1) & (abs(y) <= 1) & ((x < 0) | (y < 0))),
        blob(45, lambda x, y: is_inside("triangle", x, -y)),
        blob(18, lambda x, y: is_inside("circle", x, y)),  # too small
        blob(37, lambda x, y: is_inside("circle", x, y)),  # neither small nor large
        blob(70, lambda x, y: is_inside("circle", x, y)),  # too large
        blob(45, lambda x, y: np.hypot(x, y) <= 1 + 0.4 * np.cos(2 * np.arctan2(y, x))),
    ],
)
def test_what_is_no_shape_is_unknown(image):
    assert read_scene(image) == Reading((), 1)


def test_a_picture_that_is_no_multiple_of_32_is_refused():
    with pytest.raises(InputError, match="48x48"):
        read_scene(np.zeros((48, 48, 3), np.uint8))


RED, BLUE = thing("red circle", 70, 128), thing("blue square", 180, 120, "large")
GREEN = thing("green star", 128, 200)


@pytest.mark.parametrize(
    ("caption", "wrong"),
    [
        ("a red circle and a blue square", set()),
        ("a big blue square and a small red circle", set()),
        ("a red circle left of a large blue square", set()),
        ("right of a red circle there is a blue square", set()),
        ("a red circle on the left and a blue square", set()),
        ("a red circle", {"number"}),
        ("a red circle, a blue square and a green star", {"number", *"scp"}),
        ("a blue circle and a red square", {*"p"}),
        ("a red square and a blue square", {*"sp"}),
        ("a red circle and a red square", {*"cp"}),
        ("a large red circle and a blue square", {"sizes"}),
        ("a red circle on the right and a blue square", {"places"}),
        ("a red circle right of a blue square", {"relation"}),
        ("a red circle above a blue square", {"relation"}),
    ],
)
def test_the_verdict_names_what_is_wrong(caption, wrong):
    names = {
        "s": ("shapes",),
        "c": ("colours",),
        "p": ("pairs", "sizes", "places", "relation"),
    }
    wanted = {name for w in wrong for name in names.get(w, (w,))}
    verdict = check(caption, read_scene(picture(RED, BLUE)))
    got = {name for name, right in verdict._asdict().items() if not right}
    assert got == (wanted | {"all"} if wanted else set())


def test_what_is_unknown_is_one_too_many():
    assert matches("a red circle", Reading((RED,), 0))
    assert not matches("a red circle", Reading((RED,), 1))
    assert not check("a red circle and a blue square", Reading((RED,), 1)).number


def test_of_two_alike_things_either_may_be_meant():
    small, large = thing("red circle", 60, 60), thing("red circle", 90, 190, "large")
    reading = Reading((small, large), 0)
    assert matches("a large red circle and a small red circle", reading)
    assert matches("a large red circle below a red circle", reading)
    assert not matches("a large red circle above a red circle", reading)


def random_wanted(random):
    number = 1 + random.randint(3)

    def some(names):
        return names[random.randint(len(names))]

    things = tuple(
        WantedThing(
            shape=some(SHAPES),
            colour=some(COLOURS),
            size=some((None, *SIZES)),
            place=some((None, *PLACES)),
        )
        for _ in range(number)
    )
    relation = some((None, *RELATIONS)) if number == 2 else None
    return Wanted(things=things, relation=relation)


def test_every_caption_is_read_back():
    random = np.random.RandomState(0)
    for _ in range(1000):
        wanted = random_wanted(random)
        text = write_caption(wanted, random.randint)
        assert parse_caption(text) == wanted, text
        assert parse_caption(f"  {text.upper()}. ") == wanted


def test_a_word_can_be_left_out_or_spelt_otherwise():
    wanted = parse_caption("a red circle in the centre")
    assert parse_caption("red circle in the center") == wanted
    assert parse_caption("the red circle is in the middle") == wanted


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "''"),
        ("a circle", "'a circle'"),
        ("a red dog", "'a red dog'"),
        ("a red circle and a mauve square", "'a mauve square'"),
        ("a red circle on the moon", "'a red circle on the moon'"),
        ("two shapes: a red circle", "'two shapes: a red circle'"),
        ("on the left, a red circle on the right", "on the right'"),
        ("a red circle, a red star, a red ring and a red cross", "4 things"),
    ],
)
def test_what_is_not_understood_is_named_in_one_line(text, part):
    with pytest.raises(InputError, match="caption: ") as error:
        parse_caption(text)
    assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_a_relation_is_between_two():
    one = WantedThing(shape="ring", colour="red")
    with pytest.raises(InputError, match="between two"):
        Wanted(things=(one,), relation="above")
    with pytest.raises(InputError, match="0 things"):
        Wanted(things=())


def test_the_data_set_is_prepared_and_read_back(tmp_path):
    import sys

    from examples.scenes import scenes_dataset_builder as scenes_builder

    config = scenes_builder.SceneConfig(
        name="tiny", most=3, num_train=7, num_test=3, num_held_out=2
    )
    builder = scenes_builder.Builder(
        data_dir=str(tmp_path), config=config, file_format="array_record"
    )
    builder.download_and_prepare()
    names = builder.info.features["label"].names
    for split, number in zip(SPLITS, (7, 3, 2), strict=True):
        examples = builder.as_data_source(split)
        assert len(examples) == number
        for i in range(number):
            scene, example = make_scene(split, i, most=3, pixels=32), examples[i]
            assert np.array_equal(example["image"], scene.image)
            assert example["caption"].decode() == scene.caption
            assert np.array_equal(example["objects"], scene.rows)
            assert names[example["label"]] == " ".join(scene.things[0].pair)
    assert "tensorflow" not in sys.modules


def test_the_configs_are_as_documented():
    from examples.scenes.scenes_dataset_builder import Builder

    configs = {c.name: (c.most, c.pixels) for c in Builder.BUILDER_CONFIGS}
    assert configs == {
        **{"one": (1, 32), "two": (2, 32), "three": (3, 32)},
        **{"one64": (1, 64), "two64": (2, 64), "three64": (3, 64)},
    }
