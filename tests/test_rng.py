import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import rng
from ldm_jax.rng import Stream
from ldm_jax.types import InputError


def draws(devices: int) -> list[np.ndarray]:
    """Draw every kind of number for 8 examples at step 3, on `devices` devices."""
    root = rng.root_key(5)
    index = jnp.arange(100, 108, dtype=jnp.uint32)

    def draw(index):
        def keys(stream):
            return rng.example_keys(root, stream, 3, index)

        return (
            rng.normal(keys(Stream.NOISE), (2, 2, 1)),
            rng.normal(keys(Stream.DIFFUSION_POSTERIOR), (2, 2, 1)),
            rng.integers(keys(Stream.TIMESTEP), below=1000),
            rng.uniform(keys(Stream.CONDITION_DROPOUT)),
            rng.normal(keys(Stream.OFFSET_NOISE), (3,)),
        )

    mapped = jax.pmap(draw, devices=jax.devices()[:devices])
    return [np.asarray(x).reshape(-1) for x in mapped(index.reshape(devices, -1))]


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_every_draw_is_bitwise_the_same_on_any_number_of_devices(devices):
    for many, one in zip(draws(devices), draws(1), strict=True):
        assert len(np.unique(one)) > 1
        assert np.array_equal(many, one)


def test_stream_step_and_example_each_change_the_draw():
    root, index = rng.root_key(0), jnp.arange(2, dtype=jnp.uint32)

    def draw(stream, step):
        return rng.normal(rng.example_keys(root, stream, step, index), (4,))

    rows = [draw(Stream.NOISE, 0), draw(Stream.NOISE, 1), draw(Stream.TIMESTEP, 0)]
    values = np.concatenate(rows)
    assert len(np.unique(values)) == values.size


def test_streams_have_distinct_numbers():
    assert len({int(stream) for stream in Stream}) == len(Stream.__members__)


def test_noise_is_standard_normal():
    keys = rng.example_keys(
        rng.root_key(1), Stream.NOISE, 0, jnp.arange(4096, dtype=jnp.uint32)
    )
    noise = np.asarray(rng.normal(keys, (16,)), np.float64)
    # 65,536 draws: five standard errors of mean and variance.
    assert abs(noise.mean()) < 5 / 256
    assert abs(noise.var() - 1) < 5 * np.sqrt(2) / 256


def test_integers_cover_their_range_evenly():
    keys = rng.example_keys(
        rng.root_key(2), Stream.TIMESTEP, 0, jnp.arange(20_000, dtype=jnp.uint32)
    )
    counts = np.bincount(np.asarray(rng.integers(keys, below=10)), minlength=10)
    assert len(counts) == 10
    assert np.abs(counts - 2000).max() < 5 * np.sqrt(20_000 * 0.09)


def test_the_key_of_an_image_depends_on_its_seed_alone():
    alone = jax.random.key_data(rng.image_keys([7]))[0]
    among = jax.random.key_data(rng.image_keys([1, 7, 7]))
    assert np.array_equal(among[1], alone)
    assert np.array_equal(among[2], alone)
    assert not np.array_equal(among[0], alone)


def test_image_keys_equal_the_root_keys_of_their_seeds():
    seeds = [0, 1, 2**31, 2**32 - 1]
    keys = jax.random.key_data(rng.image_keys(seeds))
    for key, seed in zip(keys, seeds, strict=True):
        assert np.array_equal(key, jax.random.key_data(rng.root_key(seed)))


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_out_of_range_is_refused(seed):
    with pytest.raises(InputError, match="4294967295"):
        rng.root_key(seed)
    with pytest.raises(InputError, match="4294967295"):
        rng.image_keys([0, seed, 1])
