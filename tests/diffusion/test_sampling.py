"""The scan that runs every sampler; `test_solvers.py` tests the tables."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion.guidance import unguided
from ldm_jax.diffusion.sampling import Known, sample, starting_noise
from ldm_jax.diffusion.schedules import Level
from ldm_jax.diffusion.solvers import (
    inversion,
    make_table,
    slope_of,
    tabulate,
)
from ldm_jax.diffusion.tables import frame_slots
from ldm_jax.diffusion.timesteps import make_levels
from ldm_jax.rng import Stream, image_keys, image_step_keys, normal
from ldm_jax.types import SAMPLER_NAMES, TAKES_ETA
from tests.support.compiling import AS_SHIPPED
from tests.support.gaussian import (
    MEAN,
    ONE,
    SCHEDULES,
    STD,
    STOCHASTIC,
    TWO,
    Mixture,
    answer,
    follow,
    moments,
    network,
)

LDM = SCHEDULES["ldm_linear"]
NUM_STEPS, SHAPE = 6, (3, 3, 2)
SEEDS = (5, 0, 7, 9, 2)
COND = np.asarray([0.0, -0.5, 0.3, 1.0, 0.1], np.float32)


def table_of(sampler, num_steps=NUM_STEPS, schedule=LDM):
    eta = {"eta": 0.5} if sampler in TAKES_ETA else {}
    return make_table(sampler, make_levels(schedule, num_steps), prediction="v", **eta)


def float32(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def jax_network(levels, data):
    """Return the exact denoiser of data shifted by the condition; t gives the level."""
    rows = float32(Level(*levels[:3]))

    def denoise(x_t, t, cond):
        place = jnp.argmin(jnp.abs(rows.t - t[0]))
        level = Level(t, rows.alpha[place], rows.sigma[place])
        mean = jnp.asarray(data.mean, jnp.float32) + cond[:, None, None, None, None]
        shifted = data._replace(mean=mean)
        return answer(x_t, level, "v", data=shifted, xp=jnp)

    return denoise


@functools.partial(jax.jit, static_argnames=("step", "components"))
def run(table, x_start, keys, cond, *, step, components):
    """Samplers of equal shapes share one compilation: their weights are inputs."""
    net = jax_network(make_levels(LDM, NUM_STEPS), {1: ONE, 2: TWO}[components])
    table = table._replace(step=np.asarray(step))
    return sample(unguided(net), x_start, keys, cond, table=table).x_0


def run_as_inputs(table, x_start, keys, cond, components=2):
    step = tuple(int(i) for i in table.step)
    args = (float32(table._replace(step=None)), x_start, keys, jnp.asarray(cond))
    return np.asarray(run(*args, step=step, components=components))


def call_noise(keys, table):
    """Draw the noise of each call from the keys of the images."""
    calls = [
        normal(image_step_keys(keys, Stream.SAMPLE_STEP, i), SHAPE)
        for i in range(table.num_calls)
    ]
    return np.asarray(calls, np.float64)


@functools.cache
def five_images(sampler):
    keys = image_keys(list(SEEDS))
    return run_as_inputs(table_of(sampler), starting_noise(keys, SHAPE), keys, COND)


@pytest.mark.parametrize("sampler", SAMPLER_NAMES)
def test_sample_equals_a_step_by_step_evaluation_of_the_table(sampler):
    table, levels = table_of(sampler), make_levels(LDM, NUM_STEPS)
    keys = image_keys(list(SEEDS))
    shifted = TWO._replace(mean=TWO.mean + COND[:, None, None, None, None])
    net = network(levels, "v", shifted)
    start = np.asarray(starting_noise(keys, SHAPE), np.float64)
    wanted = follow(table, net, start, call_noise(keys, table))[0]
    # Float32 against float64, over as many as eleven calls.
    assert five_images(sampler) == pytest.approx(wanted, abs=2e-5)


@pytest.mark.parametrize("sampler", SAMPLER_NAMES)
def test_sampled_image_does_not_depend_on_its_batch(sampler):
    keys = image_keys([SEEDS[3], SEEDS[1]])
    start = starting_noise(keys, SHAPE)
    fewer = run_as_inputs(table_of(sampler), start, keys, COND[[3, 1]])
    assert np.array_equal(fewer, five_images(sampler)[[3, 1]])
    assert not np.array_equal(fewer[0], fewer[1])


@pytest.mark.parametrize("sampler", SAMPLER_NAMES)
def test_only_stochastic_samplers_draw_noise(sampler):
    def call(keys, x):
        net = jax_network(make_levels(LDM, 3), ONE)
        table = table_of(sampler, 3)
        return sample(unguided(net), x, keys, jnp.zeros((1,)), table=table).x_0

    draws_noise = "random_bits" in str(
        jax.make_jaxpr(call)(image_keys([0]), jnp.zeros((1, *SHAPE)))
    )
    assert draws_noise == (sampler in STOCHASTIC)


@pytest.mark.parametrize("sampler", sorted(STOCHASTIC))
def test_samples_have_the_moments_of_the_closed_form(sampler):
    table, levels = table_of(sampler), make_levels(LDM, NUM_STEPS)
    keys = image_keys(list(range(500)))
    start = starting_noise(keys, (8, 8, 1))
    x_0 = run_as_inputs(table, start, keys, np.zeros(500, np.float32), 1)
    x_0 = x_0.astype(np.float64)
    means, variances = moments(table, network(levels, "v", ONE), 0.0, 1.0)
    mean, std = means[-1, 0], variances[-1, 0] ** 0.5
    num = x_0.size  # 32,000 independent pixels: five standard errors
    assert x_0.mean() == pytest.approx(mean, abs=5 * std / num**0.5)
    assert x_0.std() == pytest.approx(std, rel=5 / (2 * num) ** 0.5)


@pytest.mark.parametrize("sampler", sorted(STOCHASTIC))
def test_samples_have_the_covariance_of_the_closed_form(sampler):
    """Two correlated channels; along its axes the Gaussian is two independent ones."""
    levels, stds, turn = make_levels(LDM, NUM_STEPS), (0.9, 0.3), np.pi / 5
    eta = {"eta": 0.5} if sampler in TAKES_ETA else {}
    table = make_table(sampler, levels, prediction="x0", **eta)
    axes = np.asarray([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    rows = float32(Level(*levels[:3]))

    def denoise(x_t, t, cond):
        place = jnp.argmin(jnp.abs(rows.t - t[0]))
        alpha, sigma = rows.alpha[place], rows.sigma[place]
        variance = jnp.square(jnp.asarray(stds, jnp.float32))
        gain = alpha * variance / (alpha**2 * variance + sigma**2)
        turned = jnp.asarray(axes, jnp.float32)
        return ((x_t - alpha * MEAN) @ turned * gain) @ turned.T + MEAN

    keys, num = image_keys(list(range(500))), 500 * 64
    start = starting_noise(keys, (8, 8, 2))
    x_0 = jax.jit(
        lambda x, keys: (
            sample(unguided(denoise), x, keys, jnp.zeros(500), table=table).x_0
        )
    )(start, keys)
    pixels = np.asarray(x_0, np.float64).reshape(num, 2)
    ends = []
    for std, centre in zip(stds, axes.T @ np.full(2, MEAN), strict=True):
        one = Mixture(np.ones(1), np.asarray([centre]), np.asarray([std]))
        means, variances = moments(table, network(levels, "x0", one), 0.0, 1.0)
        ends.append((means[-1, 0], variances[-1, 0]))
    mean = axes @ np.asarray([end[0] for end in ends])
    wanted = axes @ np.diag([end[1] for end in ends]) @ axes.T
    error = np.sqrt((np.outer(*[wanted.diagonal()] * 2) + wanted**2) / num)
    assert abs(wanted[0, 1]) > 50 * error[0, 1]  # the covariance is detectable
    assert np.all(abs(pixels.mean(0) - mean) < 5 * np.sqrt(wanted.diagonal() / num))
    assert np.all(abs(np.cov(pixels.T) - wanted) < 5 * error)


def test_start_from_pure_noise_shifts_the_mean_by_the_last_signal_at_most():
    # The start is N(0, 1), its level has the mean sqrt(abar_T) MEAN.
    levels = make_levels(LDM, 1000)
    table = make_table("euler", levels, prediction="v")
    means, variances = moments(table, network(levels, "v", ONE), 0.0, 1.0)
    bias = STD * LDM.abar[-1] ** 0.5 * MEAN
    assert means[-1, 0] == pytest.approx(MEAN, abs=1.1 * bias)
    assert variances[-1, 0] ** 0.5 == pytest.approx(STD, rel=2e-2)


def run_once(table, levels, *, known=None, frames=0):
    keys = image_keys(list(range(4)))
    return sample(
        unguided(jax_network(levels, TWO)),
        starting_noise(keys, SHAPE),
        keys,
        jnp.zeros((4,)),
        table=table,
        known=known,
        num_frames=frames,
    )


@functools.cache
def plain_samples(sampler):
    """Sample five steps without frames or known pixels."""
    return np.asarray(run_once(table_of(sampler, 5), make_levels(LDM, 5)).x_0)


@pytest.mark.parametrize("sampler", ["ddpm", "heun"])
def test_frames_are_the_latents_after_the_steps(sampler):
    levels, table = make_levels(LDM, 5), table_of(sampler, 5)
    result = run_once(table, levels, frames=6)
    keys = image_keys([0, 1, 2, 3])
    start = starting_noise(keys, SHAPE)
    assert np.array_equal(result.frames[0], start)
    assert np.array_equal(result.frames[-1], result.x_0)
    assert np.array_equal(plain_samples(sampler), result.x_0)
    for num_steps in (1, 2, 3):
        # The same network calls, up to this step.
        first = table._replace(
            **{
                name: row[table.step < num_steps]
                for name, row in table._asdict().items()
            }
        )
        wanted = follow(
            first, network(levels, "v", TWO), start, call_noise(keys, first)
        )[0]
        assert result.frames[num_steps] == pytest.approx(wanted, abs=1e-5)


def test_sample_keeps_no_frames_by_default():
    table, levels = table_of("ddpm", 5), make_levels(LDM, 5)
    assert run_once(table, levels).frames.shape == (0, 4, *SHAPE)


@pytest.mark.parametrize("sampler", SAMPLER_NAMES)
def test_frame_slots_fill_every_frame_in_order(sampler):
    for num_steps in (1, 5, 20):
        step = table_of(sampler, num_steps).step
        for num_frames in range(2, num_steps + 2):
            slots = frame_slots(step, num_frames)
            assert slots.dtype == np.int32
            assert sorted(set(slots.tolist())) == list(range(1, num_frames))
            assert (np.diff(slots) >= 0).all()
        by_step = frame_slots(step, num_steps + 1)
        assert np.array_equal(by_step, step + 1)


@pytest.mark.parametrize("sampler", ["ddim", "heun", "plms"])
def test_sampling_memory_does_not_grow_with_the_steps(sampler):
    shape, num_frames = (32, 32, 4), 3

    def memory(num_steps):
        levels, table = make_levels(LDM, num_steps), table_of(sampler, num_steps)

        def call(keys, x):
            return sample(
                lambda x_t, call, cond: jnp.tanh(x_t) * call.t,
                x,
                keys,
                None,
                table=table,
                num_frames=num_frames,
            )

        assert levels.num_steps == num_steps
        args = image_keys([0, 1, 2, 3]), jnp.zeros((4, *shape))
        return jax.jit(call).lower(*args).compile().memory_analysis()

    latents = 4 * 32 * 32 * 4 * 4
    many, few = memory(500), memory(50)
    assert few.temp_size_in_bytes > latents
    # The weights of 450 more rows: less than one latent.
    assert many.temp_size_in_bytes - few.temp_size_in_bytes < latents
    assert many.output_size_in_bytes == pytest.approx(
        (1 + num_frames) * latents, rel=1e-3
    )


def known_of(free):
    rng = np.random.RandomState(0)
    x_0, eps = (jnp.asarray(rng.randn(4, *SHAPE), jnp.float32) for _ in range(2))
    return Known(x_0=x_0, eps=eps, free=jnp.asarray(free, jnp.float32))


@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp_2s", "unipc"])
def test_known_pixels_are_kept_exactly_and_follow_the_forward_process(sampler):
    levels, table = make_levels(LDM, 5), table_of(sampler, 5)
    free = np.random.RandomState(1).rand(4, 3, 3, 1) < 0.5
    known = known_of(free)
    result = run_once(table, levels, known=known, frames=6)
    kept = np.broadcast_to(~free, known.x_0.shape)
    assert np.array_equal(np.asarray(result.x_0)[kept], np.asarray(known.x_0)[kept])
    for i in range(1, 6):
        path = levels.alpha[i] * known.x_0 + levels.sigma[i] * known.eps
        found = np.asarray(result.frames[i])[kept]
        assert found == pytest.approx(np.asarray(path)[kept], abs=1e-6)
    # The network acts on single pixels: free ones equal those of a plain run.
    found_free, expected_free = (
        np.asarray(result.x_0)[~kept],
        plain_samples(sampler)[~kept],
    )
    assert found_free == pytest.approx(expected_free, abs=1e-6)


def test_known_without_kept_pixels_changes_no_bit():
    levels, table = make_levels(LDM, 5), table_of("heun", 5)
    everything = known_of(np.ones((4, 3, 3, 1)))

    @functools.partial(jax.jit, compiler_options=AS_SHIPPED)
    def sampled(known):
        return run_once(table, levels, known=known).x_0

    assert np.array_equal(sampled(everything), sampled(None))


def test_ddim_of_inverted_noise_returns_the_latent_in_float32():
    levels = make_levels(SCHEDULES["flow"], 20)
    rows = inversion(levels, iterations=8)
    up = tabulate(rows, levels, slope_of(levels), prediction="v", sigma_data=1.0)
    down = make_table("ddim", levels, prediction="v")
    net, keys = unguided(jax_network(levels, TWO)), image_keys([0, 1])
    x_0, cond = jnp.tanh(starting_noise(keys, SHAPE)), jnp.zeros((2,))
    noise = sample(net, x_0, keys, cond, table=up).x_0
    back = sample(net, noise, keys, cond, table=down).x_0
    assert back == pytest.approx(np.asarray(x_0), abs=1e-4)
