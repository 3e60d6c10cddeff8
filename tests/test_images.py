import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import images
from tests.support.pngs import read_texts


def test_uint8_round_trips_through_float():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    as_float = np.asarray(images.to_float(jnp.asarray(levels)))
    assert as_float.min() == -1.0 and as_float.max() == 1.0
    assert np.array_equal(images.to_uint8(as_float), levels)


def test_to_uint8_clips_and_rounds_to_nearest():
    x = np.asarray([-3.0, 3.0, 0.999, -0.999]).reshape(1, 2, 2, 1)
    assert images.to_uint8(x).ravel().tolist() == [0, 255, 255, 0]


def test_a_grid_shows_every_image_in_order():
    tiles = np.arange(1, 6, dtype=np.uint8).reshape(5, 1, 1, 1) * np.ones(
        (1, 64, 64, 1), np.uint8
    )
    picture = images.grid(tiles, columns=3)
    assert picture.shape == (2 * 66 + 2, 3 * 66 + 2, 1)
    centres = [int(picture[34 + 66 * (i // 3), 34 + 66 * (i % 3), 0]) for i in range(5)]
    assert centres == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("channels", [1, 3])
def test_png_keeps_its_pixels_and_its_text_chunks(tmp_path, channels):
    image = np.random.RandomState(0).randint(0, 256, (5, 7, channels), np.uint8)
    path = tmp_path / "a.png"
    images.write_png(path, image, {"seed": "3", "versions": '{"jax": "1"}'})
    assert np.array_equal(images.read_png(path), image)
    assert read_texts(path) == {"seed": "3", "versions": '{"jax": "1"}'}
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
