"""The sample function: a key for each image, one program, bounded memory, edits."""

import dataclasses
import functools
import itertools
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import latent_diffusion as ldm_networks
from ldm_jax.build import build_model
from ldm_jax.diffusion.sampling import starting_noise
from ldm_jax.diffusion.timesteps import make_levels
from ldm_jax.latent_diffusion import calls_at_once, decode, encode_images, in_chunks
from ldm_jax.models.conditioning import ConditionInputs
from ldm_jax.models.tiled_decoding import decode_in_tiles, ramp, tile_starts
from ldm_jax.parallel.make_layout import PmapLayout
from ldm_jax.pretrained.open_weights import to_sample_params
from ldm_jax.rng import image_keys
from ldm_jax.sampling import program
from ldm_jax.sampling.editing import (
    Edit,
    first_level,
    free_latents,
    make_invert_fn,
    slerp,
    start_of,
)
from ldm_jax.sampling.sample_fn import make_sample_fn, steps_of_strength
from ldm_jax.sampling.sampling_config import SamplingConfig
from ldm_jax.types import SAMPLER_NAMES, TAKES_ETA
from tests.support import tiny
from tests.support.models import config_of, model_of

CHUNK = 4
# One sampler of each kind of table: one register or two, with and without noise.
KINDS = ["ddim", "unipc", "dpmpp_sde_2m"]


@functools.cache
def tiny_model(kind="label"):
    """Make model and parameters: the smallest, or one of `tests.support.models`."""
    if kind == "tiny":
        config = tiny.get_config()
        first = dataclasses.replace(config.autoencoder, mid_attention=False)
        second = dataclasses.replace(config.diffusion, channel_multipliers=(1,))
        config = dataclasses.replace(config, autoencoder=first, diffusion=second)
    else:
        config = config_of(kind)
    config = dataclasses.replace(
        config, sampling=dataclasses.replace(config.sampling, chunk=CHUNK)
    )
    params = to_sample_params(model_of(config))
    return build_model(config), params


@functools.cache
def sampler_fn(**options):
    return make_sample_fn(tiny_model("tiny")[0], **options)


def settings(sampler="ddim", steps=3, scale=2.0, **more):
    scales = (scale,) if isinstance(scale, float) else scale
    eta = 0.5 if sampler in TAKES_ETA else 0.0
    fields = {"sampler": sampler, "steps": steps, "guidance_scale": scales, "eta": eta}
    return SamplingConfig(**{**fields, **more})


def labels(*numbers):
    return ConditionInputs(label=jnp.asarray(numbers, jnp.int32))


def pictures(num=1, side=8, seed=0):
    values = np.random.RandomState(seed).uniform(-1, 1, (num, side, side, 1))
    return jnp.asarray(values, jnp.float32)


def images(seeds, numbers, sampler="ddim", *, edit=None, **more):
    inputs = (tiny_model("tiny")[1], image_keys(seeds), labels(*numbers))
    return np.asarray(
        sampler_fn()(*inputs, settings(sampler, **more), edit=edit).images
    )


def in_threads(inputs, at_once):
    """Make a run of a jitted product by three rows; it returns rows and thread ids."""
    callers = []
    product = jax.jit(lambda x: jnp.sin(x) @ jnp.ones((64, 64), x.dtype))

    def fn(part):
        callers.append(threading.get_ident())
        time.sleep(0.02)  # no thread ends before the next one starts
        return product(part)

    return lambda: (in_chunks(fn, inputs, size=3, at_once=at_once), callers)


def test_concurrent_calls_equal_sequential_calls():
    x = jnp.asarray(np.random.RandomState(0).randn(20, 64), jnp.float32)
    here = threading.get_ident()
    run, single = in_threads(x, 4), in_threads(x, 1)()[0]
    for _ in range(2):
        result, callers = run()
        assert callers[0] == here and callers.count(here) == 1
        assert len(set(callers)) > 2 and len(callers) == 7
        assert np.array_equal(result, single)
        callers.clear()


def test_thread_local_setting_holds_in_every_concurrent_call():
    x = jnp.asarray(np.random.RandomState(0).randn(9, 64), jnp.float32)
    single, run = in_threads(x, 1)()[0], in_threads(x, 2)
    with jax.default_matmul_precision("highest"):
        result, callers = run()
    assert callers.count(threading.get_ident()) == 3
    assert np.array_equal(result, single)


def test_exception_of_a_concurrent_call_is_raised():
    def fn(part):
        if float(part[0, 0]) == 2.0:
            raise ValueError("no such picture")
        return part

    with pytest.raises(ValueError, match="no such picture"):
        in_chunks(fn, jnp.arange(4.0)[:, None], size=1, at_once=2)


def test_concurrent_calls_are_bounded_by_cores_and_memory(monkeypatch):
    monkeypatch.setattr(ldm_networks, "num_cores", lambda: 96)
    small = tiny_model("tiny")[0]
    assert calls_at_once(small, "cpu") == 96
    assert calls_at_once(small, "tpu") == 1
    wide = small.autoencoder.clone(channels=128)

    def at_once(side):
        one = small._replace(autoencoder=wide, latent_shape=(side // 2, side // 2, 4))
        return calls_at_once(one, "cpu")

    assert [at_once(side) for side in (64, 256, 512, 1024)] == [64, 4, 1, 1]


@pytest.mark.parametrize("sampler", KINDS)
def test_image_has_the_same_bits_in_any_batch_and_at_any_position(sampler):
    single = images([7], [3], sampler)[0]
    assert np.ptp(single) > 0.1
    for place in range(CHUNK):
        seeds, numbers = [1, 2, 3, 4], [9, 8, 7, 6]
        seeds[place], numbers[place] = 7, 3
        assert np.array_equal(images(seeds, numbers, sampler)[place], single)
    many = images([5, 6, 4, 3, 2, 1, 7], [0, 1, 2, 9, 8, 7, 3], sampler)
    assert np.array_equal(many[-1], single)


def test_one_device_and_eight_sample_the_same_bits():
    sampler = "dpmpp_sde_2m"
    seeds, numbers = list(range(11)), [i % 10 for i in range(11)]
    one = images(seeds, numbers, sampler)
    for devices in (jax.devices()[:1], jax.devices()):
        layout = PmapLayout(devices)
        fn = make_sample_fn(tiny_model("tiny")[0], layout=layout)
        args = (
            layout.place(tiny_model("tiny")[1]),
            image_keys(seeds),
            labels(*numbers),
        )
        assert np.array_equal(fn(*args, settings(sampler)).images, one)


@pytest.fixture
def traces(monkeypatch):
    """List that grows by one at each trace of a sample function."""
    times, original_decode = [], program.decode

    def counted(*args, **kwargs):
        times.append(1)
        return original_decode(*args, **kwargs)

    monkeypatch.setattr(program, "decode", counted)
    return times


def random_settings(rng, i):
    sampler = SAMPLER_NAMES[i % len(SAMPLER_NAMES)]
    scales = [(1.0,), (float(rng.uniform(0, 9)),), tuple(rng.uniform(0, 9, 3).tolist())]
    low = float(rng.uniform(0, 1))
    return SamplingConfig(
        sampler=sampler,
        steps=int(rng.randint(1, 9)),
        spacing=["trailing", "leading", "linspace", "karras", None][i % 5],
        eta=float(rng.uniform(0, 1)) if sampler in TAKES_ETA else 0.0,
        guidance_scale=scales[i % 3],
        guidance_rescale=float(rng.uniform(0, 1)),
        guidance_low=low,
        guidance_high=low + float(rng.uniform(0, 50)),
    )


def test_one_program_serves_twenty_random_settings(traces):
    model, params = tiny_model("tiny")
    fn = make_sample_fn(model, max_steps=8)
    rng, sums = np.random.RandomState(0), []
    for i in range(20):
        num = int(rng.randint(1, 4))
        result = fn(
            params,
            image_keys([int(seed) for seed in rng.randint(0, 2**31, num)]),
            labels(*(int(label) for label in rng.randint(0, 10, num))),
            random_settings(rng, i),
            uncond=labels(*(int(label) for label in rng.randint(0, 11, num))),
        )
        sums.append(float(np.asarray(result.images).sum()))
    assert len(traces) == 1
    assert len(set(sums)) == 20


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_program_for_all_settings_has_the_bits_of_a_specialised_one(scale):
    model, params = tiny_model("tiny")
    inputs = (params, image_keys([7]), labels(3), settings("unipc", scale=scale))
    single = make_sample_fn(model, guided=scale != 1.0)(*inputs).images
    assert np.array_equal(sampler_fn()(*inputs).images, single)


def test_max_steps_does_not_change_an_image():
    model, params = tiny_model("tiny")
    inputs = (params, image_keys([7]), labels(3), settings("heun", steps=5))
    few = make_sample_fn(model, max_steps=5)(*inputs).images
    assert np.array_equal(sampler_fn()(*inputs).images, few)


def test_prompts_share_one_program(traces):
    model, params = tiny_model("text")
    fn = make_sample_fn(model)
    sampling = settings(steps=1, scale=7.5)
    for i in range(3):
        cond = ConditionInputs(tokens=jnp.full((CHUNK, 6), i, jnp.int32))
        # Traced, not compiled: the calls share the program if they share its trace.
        jax.eval_shape(lambda c: fn(params, image_keys([0] * CHUNK), c, sampling), cond)
    assert len(traces) == 1


def test_sample_fn_inside_jit_makes_the_same_images():
    params = tiny_model("tiny")[1]

    @jax.jit
    def mine(keys, cond):
        return sampler_fn()(params, keys, cond, settings()).images

    inside = mine(image_keys(list(range(6))), labels(*range(6)))
    outside = images(list(range(6)), range(6))
    assert np.asarray(inside) == pytest.approx(outside, abs=1e-5)


def test_sample_fn_memory_does_not_grow_with_the_steps():
    def temporary_bytes(num_steps):
        model, params = tiny_model("tiny")
        fn = make_sample_fn(model, max_steps=num_steps)
        sampling = settings("heun", steps=num_steps)
        call = jax.jit(lambda keys, cond: fn(params, keys, cond, sampling).images)
        keys = image_keys(list(range(CHUNK)))
        compiled = call.lower(keys, labels(*range(CHUNK))).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # A few numbers a call, not a latent: 4 x 4 x 4 x 2 floats would be 512 bytes.
    assert temporary_bytes(60) - temporary_bytes(10) < 50 * 2 * 256


def test_guidance_is_off_outside_its_interval_and_follows_its_schedule():
    seeds, numbers = [0, 1], [2, 3]
    guided, plain = images(seeds, numbers), images(seeds, numbers, scale=1.0)
    assert not np.allclose(guided, plain, atol=1e-3)
    nowhere = images(seeds, numbers, guidance_low=1e5)
    assert nowhere == pytest.approx(plain, abs=1e-5)
    everywhere = images(seeds, numbers, guidance_high=1e6)
    assert np.array_equal(everywhere, guided)
    flat = images(seeds, numbers, scale=(2.0, 2.0, 2.0))
    assert np.array_equal(flat, guided)
    rising = images(seeds, numbers, scale=(1.0, 2.0, 3.0))
    assert not np.array_equal(rising, guided)


def test_autoguidance_by_the_model_itself_is_unguided():
    model, params = tiny_model("tiny")
    fn = make_sample_fn(model, weak=model)
    args = (params, image_keys([0, 1]), labels(2, 3), settings(scale=3.0))
    same = np.asarray(fn(*args, weak_params=params).images)
    assert same == pytest.approx(images([0, 1], [2, 3], scale=1.0), abs=1e-5)
    worse = jax.tree.map(lambda x: 0.9 * x, params)
    assert not np.allclose(same, fn(*args, weak_params=worse).images, atol=1e-3)


def test_autoguidance_by_a_model_of_another_prediction_is_refused():
    model, _ = tiny_model("tiny")
    with pytest.raises(ValueError, match="trained alike"):
        make_sample_fn(model, weak=model._replace(prediction="v"))


def test_sample_fn_options_out_of_range_are_refused():
    model, params = tiny_model("tiny")
    for options, message in (
        ({"max_steps": 2000}, "max_steps: got 2000, wanted 1 to 1000"),
        ({"max_steps": 4, "num_frames": 6}, "num_frames: got 6, wanted 0 or 2 to 5"),
        ({"tile": 2}, "tile: got 2, wanted 0, or at least 4"),
    ):
        with pytest.raises(ValueError, match=message):
            make_sample_fn(model, **options)
    inputs = (params, image_keys([0]), labels(0))
    with pytest.raises(ValueError, match="steps: got 5, wanted 1 to 4"):
        make_sample_fn(model, max_steps=4)(*inputs, settings(steps=5))
    with pytest.raises(ValueError, match="num_frames: got 4, wanted 0 or 2 to 3"):
        make_sample_fn(model, num_frames=4)(*inputs, settings(steps=2))


def test_sample_fn_inputs_that_do_not_match_are_refused():
    params = tiny_model("tiny")[1]
    fn, keys, sampling, two = sampler_fn(), image_keys([0, 1]), settings(), labels(1, 2)
    mask, part = jnp.ones((2, 8, 8, 1)), settings(strength=0.5)
    cases = (
        (lambda: fn(params, keys, labels(1), sampling), "cond: got 1 for 2 keys"),
        (lambda: fn(params, keys[:0], labels(), sampling), "keys: got none"),
        (lambda: fn(params, keys, labels(1, 77), sampling), "cond.label: got 77"),
        (
            lambda: fn(params, keys, two, sampling, weak_params=params),
            "weak_params: wanted",
        ),
        (
            lambda: fn(params, keys, two, sampling, edit=Edit(weight=mask)),
            "edit.weight",
        ),
        (lambda: fn(params, keys, two, sampling, edit=Edit(mask=mask)), "edit.mask"),
        (lambda: fn(params, keys, two, part), "strength: got below 1"),
    )
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


def test_strength_sets_the_starting_noise_level_of_an_edit():
    model, params = tiny_model("tiny")
    picture, keys = pictures(), image_keys([0])
    x_0 = np.asarray(encode_images(model, params, picture))
    noise = np.asarray(starting_noise(keys, model.latent_shape))
    levels = make_levels(model.schedule, 50).tail(steps_of_strength(0.3, 50))
    assert levels.num_steps == 15
    first = first_level(levels, sigma_data=model.sigma_data, is_whole=False)
    start = start_of(model, params, keys, Edit(image=picture), first=first)
    wanted = levels.alpha[0] * x_0 + levels.sigma[0] * noise
    assert np.asarray(start.x_start) == pytest.approx(wanted, abs=1e-6)
    assert levels.t[0] == 299 and start.known is None


@pytest.mark.parametrize("sampler", ["ddim", "unipc"])
def test_mask_keeps_every_bit_outside_its_hole(sampler):
    picture = pictures()
    mask = jnp.zeros((1, 8, 8, 1)).at[:, 2:5, 3:7].set(1.0)
    edit = Edit(image=picture, mask=mask)
    filled = images([0], [1], sampler, edit=edit)
    other = images([1], [1], sampler, edit=edit)
    hole = np.asarray(mask) > 0.5
    assert np.array_equal(filled[~hole], np.asarray(picture)[~hole])
    assert not np.allclose(filled[hole], other[hole], atol=1e-3)


def test_every_latent_over_the_mask_hole_is_free():
    mask = jnp.zeros((1, 8, 8, 1)).at[0, 3, 4].set(1.0)
    free = np.asarray(free_latents(mask, (4, 4, 2)))[0, ..., 0]
    assert free[1, 2] == 1.0 and free.sum() == 1.0


def test_slerp_keeps_the_standard_deviation_of_the_noise():
    a, b = np.random.RandomState(0).randn(2, 3, 16, 16, 4)
    weights = jnp.asarray([0.0, 0.5, 1.0])
    a, b = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
    between = np.asarray(slerp(a, b, weights))
    assert np.array_equal(between[0], a[0])
    assert between[2] == pytest.approx(np.asarray(b[2]), abs=1e-6)
    assert between[1].std() == pytest.approx(1.0, abs=0.05)
    assert np.asarray((a + b)[1] / 2).std() == pytest.approx(0.5**0.5, abs=0.05)
    assert np.asarray(slerp(a, a, weights)) == pytest.approx(np.asarray(a), abs=1e-5)


def test_interpolation_starts_and_ends_at_the_plain_images():
    edit = Edit(
        other_keys=image_keys([5, 5, 5]),
        other_cond=labels(8, 8, 8),
        weight=jnp.asarray([0.0, 0.5, 1.0]),
    )
    between = images([2, 2, 2], [4, 4, 4], "unipc", edit=edit)
    assert between[0] == pytest.approx(images([2], [4], "unipc")[0], abs=1e-5)
    assert between[2] == pytest.approx(images([5], [8], "unipc")[0], abs=1e-5)
    for end in (0, 2):
        assert not np.allclose(between[1], between[end], atol=1e-2)


def test_sample_of_inverted_noise_returns_the_image():
    model, params = tiny_model("tiny")
    # A random network is rough; a trained one changes slowly with x_t.
    last = jax.tree.map(lambda x: 0.1 * x, params.unet["conv_out"])
    params = params._replace(unet={**params.unet, "conv_out": last})
    picture, cond = pictures(2), labels(3, 4)
    invert = make_invert_fn(model, num_steps=20, iterations=30)
    latents = invert(params, picture, cond)
    fn = make_sample_fn(model, guided=False)
    sampling = SamplingConfig(steps=20)
    back = fn(
        params, image_keys([0, 1]), cond, sampling, edit=Edit(latents=latents)
    ).images
    kept = decode(model, params, encode_images(model, params, picture))
    assert np.asarray(back) == pytest.approx(np.asarray(kept), abs=1e-3)
    single = invert(params, picture[1:], labels(4))
    assert np.array_equal(single[0], latents[1])


def blur(latents):
    """Decode to sums over 3 x 3 latents, at twice the size."""
    wide = jnp.pad(latents, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    height, width = latents.shape[1:3]
    mean = sum(
        wide[:, i : i + height, j : j + width] for i in range(3) for j in range(3)
    )
    return mean.repeat(2, axis=1).repeat(2, axis=2)


@pytest.mark.parametrize("shape", [(8, 8), (9, 20), (33, 17)])
def test_tiled_decoding_of_a_local_decoder_has_no_seams(shape):
    latents = jnp.asarray(np.random.RandomState(0).randn(2, *shape, 3), jnp.float32)
    plain = np.asarray(blur(latents))
    tiled = np.asarray(decode_in_tiles(blur, latents, tile=8, factor=2))
    assert tiled.shape == plain.shape
    # At a tile's border the blur reads padding; weights are small there.
    assert np.abs(tiled - plain).mean() < 0.1 * np.abs(plain).mean()
    smooth = jnp.broadcast_to(jnp.arange(float(shape[1]))[:, None], (2, *shape, 3))
    flat = np.asarray(decode_in_tiles(lambda x: x, smooth, tile=8, factor=1))
    assert flat == pytest.approx(np.asarray(smooth), rel=1e-5)


def test_tiles_cover_the_latent_and_overlap_by_a_quarter():
    for size in range(8, 70):
        starts = tile_starts(size, 8)
        assert starts[0] == 0 and starts[-1] == size - 8
        assert all(b - a <= 6 for a, b in itertools.pairwise(starts))
    assert (ramp(8, tile=8, factor=2) > 0).all()


def test_tiled_decoding_needs_the_memory_of_one_tile():
    model, params = tiny_model("tiny")

    def temporary_bytes(side, tile):
        def call(latents):
            return decode(model, params, latents, tile=tile)

        latents = jnp.zeros((1, side, side, model.latent_shape[-1]))
        compiled = jax.jit(call).lower(latents).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    tiled = [temporary_bytes(side, 16) for side in (32, 64)]
    picture = 4 * (128**2 - 64**2)  # the growth of the image itself
    assert tiled[1] - tiled[0] < 4 * picture
    assert temporary_bytes(64, 0) > 3 * tiled[1]
