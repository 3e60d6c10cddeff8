import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion.guidance import classifier_free
from ldm_jax.diffusion.objectives import denoising_loss, predicting_eps
from ldm_jax.diffusion.parameterize import (
    add_noise,
    clean_from_eps,
    eps_from_prediction,
    target_of,
)
from ldm_jax.diffusion.samplers import (
    Levels,
    ddim_step,
    ddpm_step,
    frame_slots,
    make_levels,
    sample,
    spaced_timesteps,
)
from ldm_jax.diffusion.schedules import make_schedule
from ldm_jax.rng import Stream, image_keys, image_step_keys, normal
from tests import gaussian

LDM = make_schedule(
    "ldm_linear", num_timesteps=1000, beta_start=0.0015, beta_end=0.0195
)


def random(seed, num, shape):
    """Unit normal arrays of the default float type."""
    values = np.random.RandomState(seed).randn(num, *shape)
    return [jnp.asarray(value) for value in values]


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


# The values are those of the original code, computed apart from it.
@pytest.mark.parametrize(
    ("name", "start", "end", "abar_last"),
    [
        ("ldm_linear", 0.0015, 0.0195, 1.42e-4),
        ("linear", 0.0015, 0.0195, 2.57e-5),
        ("ldm_linear", 0.00085, 0.012, 4.66e-3),
        ("linear", 0.00085, 0.012, 1.58e-3),
    ],
)
def test_the_last_signal_power_is_that_of_the_original(name, start, end, abar_last):
    schedule = make_schedule(name, num_timesteps=1000, beta_start=start, beta_end=end)
    assert schedule.abar[-1] == pytest.approx(abar_last, rel=4e-3)
    assert schedule.beta[[0, -1]] == pytest.approx([start, end], rel=1e-12)


def test_ldm_linear_is_linear_in_the_root_and_linear_in_beta():
    assert np.diff(np.sqrt(LDM.beta), 2) == pytest.approx(0, abs=1e-15)
    plain = make_schedule("linear", num_timesteps=9, beta_start=0.1, beta_end=0.9)
    assert plain.beta == pytest.approx(np.arange(1, 10) / 10, abs=1e-15)
    assert plain.abar == pytest.approx(np.cumprod(1 - np.arange(1, 10) / 10))


def test_tables_are_float64_and_fall():
    assert LDM.abar.dtype == np.float64
    assert (np.diff(LDM.abar) < 0).all()


def test_a_bad_schedule_is_refused():
    with pytest.raises(ValueError, match="betas"):
        make_schedule("linear", num_timesteps=5, beta_start=0.5, beta_end=0.1)
    with pytest.raises(ValueError, match="num_timesteps"):
        make_schedule("linear", num_timesteps=0, beta_start=0.1, beta_end=0.2)


def test_noising_step_by_step_has_the_closed_form_of_noising_at_once():
    # Means and variances of q(x_t | x_0) by the recursion of eq. 2 of DDPM.
    mean, variance = 1.0, 0.0
    for i, beta in enumerate(LDM.beta):
        mean, variance = np.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        if i in (0, 1, 10, 500, 999):
            zero, one = jnp.zeros((1, 1, 1, 1)), jnp.ones((1, 1, 1, 1))
            abar = jnp.asarray([LDM.abar[i]])
            assert add_noise(one, zero, abar_t=abar).item() == pytest.approx(
                mean, rel=1e-6
            )
            std = add_noise(zero, one, abar_t=abar).item()
            assert std**2 == pytest.approx(variance, rel=1e-5)


def test_clean_from_eps_undoes_add_noise(x64):
    x_0, eps = random(0, 2, (3, 4, 4, 2))
    for i in (0, 400, 999):
        abar = jnp.asarray(LDM.abar[i])
        x_t = add_noise(x_0, eps, abar_t=jnp.full((3,), abar))
        assert clean_from_eps(x_t, eps, abar_t=abar) == pytest.approx(
            np.asarray(x_0), abs=1e-9
        )


def test_eps_loss_is_zero_for_the_truth_and_the_mean_square_for_silence():
    x_0, eps = (
        jnp.asarray(x, jnp.float32)
        for x in np.random.RandomState(0).randn(2, 3, 4, 4, 2)
    )
    t, cond = jnp.asarray([0, 10, 999]), jnp.zeros((3,), jnp.int32)
    abar = jnp.asarray(LDM.abar, jnp.float32)
    args = (x_0, t, eps, cond)
    score = functools.partial(denoising_loss, abar=abar, prediction="eps", loss="l2")
    assert np.asarray(score(lambda *_: eps, *args)) == pytest.approx(0)
    silent = score(lambda x, *_: jnp.zeros_like(x), *args)
    assert silent == pytest.approx(np.square(eps).mean(axis=(1, 2, 3)), rel=1e-5)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_the_noise_is_read_back_out_of_every_prediction(x64, prediction):
    x_0, eps = random(0, 2, (3, 4, 4, 2))
    abar_t = jnp.asarray([0.999, 0.5, 0.002])
    x_t = add_noise(x_0, eps, abar_t=abar_t)
    target = target_of(x_0, eps, abar_t=abar_t, prediction=prediction)
    found = eps_from_prediction(x_t, target, abar_t=abar_t, prediction=prediction)
    assert found == pytest.approx(np.asarray(eps), abs=1e-9)


def test_the_velocity_is_the_turn_of_signal_and_noise(x64):
    # Salimans & Ho: with the angle phi, x_t = cos x_0 + sin eps and v = d x_t / d phi.
    x_0, eps = random(0, 2, (1, 4, 4, 2))
    phi, step = 0.7, 1e-5

    def noisy(angle):
        return np.cos(angle) * x_0 + np.sin(angle) * eps

    v = target_of(x_0, eps, abar_t=jnp.asarray([np.cos(phi) ** 2]), prediction="v")
    wanted = (noisy(phi + step) - noisy(phi - step)) / (2 * step)
    assert v == pytest.approx(np.asarray(wanted), abs=1e-8)


@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_a_network_samples_the_same_whatever_it_predicts(x64, prediction):
    plain = gaussian.denoiser(LDM.abar)
    table = jnp.asarray(LDM.abar)

    def predict(x_t, t, cond):
        abar = table[t][:, None, None, None]
        eps = plain(x_t, t, cond)
        x_0 = (x_t - jnp.sqrt(1 - abar) * eps) / jnp.sqrt(abar)
        return target_of(x_0, eps, abar_t=table[t], prediction=prediction)

    x = random(3, 1, (4, 4, 4, 2))[0]
    t, cond = jnp.asarray([0, 10, 500, 999]), jnp.zeros((4,), jnp.int32)
    as_eps = predicting_eps(predict, abar=table, prediction=prediction)
    wanted = np.asarray(plain(x, t, cond))
    assert as_eps(x, t, cond) == pytest.approx(wanted, abs=1e-6)


def test_every_number_of_steps_gives_exactly_that_many():
    for num_steps in range(1, 1001):
        t = spaced_timesteps(num_steps, num_timesteps=1000)
        assert len(t) == num_steps
        assert t[0] == 999
        assert (np.diff(t) < 0).all()
        assert t[-1] >= 0
        assert np.ptp(np.diff(t)) <= 1 if num_steps > 1 else True
    assert (spaced_timesteps(1000, num_timesteps=1000) == np.arange(999, -1, -1)).all()


@pytest.mark.parametrize("num_steps", [0, 1001, -3])
def test_other_numbers_of_steps_are_refused(num_steps):
    with pytest.raises(ValueError, match="1 to 1000"):
        make_levels(LDM, num_steps)


def test_the_last_level_is_clean():
    for num_steps in (1, 7, 1000):
        levels = make_levels(LDM, num_steps)
        assert levels.abar_s[-1] == 1.0
        assert levels.sigma[-1] == 0.0
        assert levels.x_0_weight[-1] == pytest.approx(1.0)
        assert levels.x_t_weight[-1] == 0.0


@pytest.mark.parametrize("num_steps", [2, 10, 1000])
def test_the_posterior_is_that_of_bayes_rule(x64, num_steps):
    levels = make_levels(LDM, num_steps)
    row = Levels(*(np.asarray(column)[:-1] for column in levels))
    alpha = row.abar_t / row.abar_s
    # Precisions add: p(x_s | x_0) times p(x_t | x_s).
    variance = 1 / (1 / (1 - row.abar_s) + alpha / (1 - alpha))
    assert row.sigma**2 == pytest.approx(variance, rel=1e-9)
    assert row.x_0_weight == pytest.approx(
        variance * np.sqrt(row.abar_s) / (1 - row.abar_s), rel=1e-9
    )
    assert row.x_t_weight == pytest.approx(
        variance * np.sqrt(alpha) / (1 - alpha), rel=1e-9
    )


def rows(levels: Levels):
    for i in range(len(levels.t)):
        yield Levels(*(column[i] for column in levels))


def test_ddim_with_eta_one_is_ddpm(x64):
    x_t, eps, noise = random(1, 3, (2, 3, 3, 1))
    for level in rows(make_levels(LDM, 12)):
        ddim = ddim_step(x_t, eps, noise, level=level, eta=jnp.asarray(1.0))
        ddpm = ddpm_step(x_t, eps, noise, level=level, eta=jnp.asarray(1.0))
        assert ddim == pytest.approx(np.asarray(ddpm), abs=1e-10)


def test_ddim_with_eta_zero_keeps_the_noise_it_was_given(x64):
    x_0, eps, noise = random(2, 3, (2, 3, 3, 1))
    for level in rows(make_levels(LDM, 12)):
        x_t = jnp.sqrt(level.abar_t) * x_0 + jnp.sqrt(1 - level.abar_t) * eps
        x_s = jnp.sqrt(level.abar_s) * x_0 + jnp.sqrt(1 - level.abar_s) * eps
        step = ddim_step(x_t, eps, noise, level=level, eta=jnp.asarray(0.0))
        assert step == pytest.approx(np.asarray(x_s), abs=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_has_the_marginals_of_the_forward_process(x64, eta):
    # Mean sqrt(abar_s) x_0 and variance 1 - abar_s (DDIM, eq. 7).
    one, zero = jnp.ones((1, 1, 1, 1)), jnp.zeros((1, 1, 1, 1))
    for level in rows(make_levels(LDM, 9)):
        noisy = jnp.sqrt(1 - level.abar_t) * one
        kw = {"level": level, "eta": jnp.asarray(eta)}
        from_eps = ddim_step(noisy, one, zero, **kw).item()
        from_noise = ddim_step(zero, zero, one, **kw).item()
        from_x_0 = ddim_step(jnp.sqrt(level.abar_t) * one, zero, zero, **kw).item()
        variance = from_eps**2 + from_noise**2
        assert variance == pytest.approx(1 - float(level.abar_s), abs=1e-12)
        assert from_x_0 == pytest.approx(float(level.abar_s) ** 0.5, rel=1e-12)


def run_gaussian(num_steps, *, num_images=4, step=ddim_step, eta=0.0, frames=0):
    return sample(
        gaussian.denoiser(LDM.abar),
        image_keys(list(range(num_images))),
        jnp.zeros((num_images,), jnp.int32),
        eta=jnp.asarray(eta, jnp.zeros(()).dtype),
        levels=make_levels(LDM, num_steps),
        step=step,
        shape=(4, 4, 2),
        num_frames=frames,
    )


def starting_noise():
    keys = image_step_keys(image_keys([0, 1, 2, 3]), Stream.SAMPLE_START)
    return normal(keys, (4, 4, 2))


def test_ddim_converges_to_the_probability_flow_with_first_order(x64):
    x_start = normal(
        image_step_keys(image_keys([0, 1, 2, 3]), Stream.SAMPLE_START), (4, 4, 2)
    )
    exact = gaussian.flow_end(np.asarray(x_start), LDM.abar[-1])
    errors = [
        np.abs(np.asarray(run_gaussian(num_steps).x_0) - exact).max()
        for num_steps in (100, 200, 400, 800)
    ]
    ratios = np.divide(errors[:-1], errors[1:])
    assert ratios == pytest.approx(2.0, abs=0.25)


@pytest.mark.parametrize(
    ("step", "eta"), [(ddpm_step, 1.0), (ddim_step, 0.0), (ddim_step, 0.5)]
)
def test_samples_have_the_distribution_of_the_closed_form(step, eta):
    x_0 = run_gaussian(100, num_images=512, step=step, eta=eta).x_0
    x_0 = np.asarray(x_0, np.float64)
    num = x_0.size  # 16,384 independent pixels: five standard errors
    t = spaced_timesteps(100, num_timesteps=1000)
    mean, std = gaussian.sample_moments(LDM.abar[t], eta)
    assert x_0.mean() == pytest.approx(mean, abs=5 * std / num**0.5)
    assert x_0.std() == pytest.approx(std, rel=5 / (2 * num) ** 0.5)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_the_closed_form_of_many_steps_is_the_data(eta):
    mean, std = gaussian.sample_moments(LDM.abar[::-1], eta)
    # The chain starts at N(0, 1), the data's end is at mean sqrt(abar_T) MEAN.
    bias = gaussian.STD * LDM.abar[-1] ** 0.5 * gaussian.MEAN
    assert mean == pytest.approx(gaussian.MEAN, abs=1.1 * bias)
    assert std == pytest.approx(gaussian.STD, rel=2e-2)


def test_an_image_does_not_depend_on_its_neighbours():
    among = run_gaussian(20, num_images=5, step=ddpm_step).x_0
    fewer = run_gaussian(20, num_images=2, step=ddpm_step).x_0
    assert np.array_equal(among[:2], fewer)


def test_frames_start_with_noise_and_end_with_the_sample():
    for num_steps, num_frames in ((1, 2), (5, 6), (20, 4), (7, 3)):
        result = run_gaussian(num_steps, frames=num_frames)
        start = normal(
            image_step_keys(image_keys([0, 1, 2, 3]), Stream.SAMPLE_START), (4, 4, 2)
        )
        assert np.array_equal(result.frames[0], start)
        assert np.array_equal(result.frames[-1], result.x_0)
        assert sorted(set(frame_slots(num_steps, num_frames))) == list(
            range(1, num_frames)
        )


def test_keeping_frames_changes_no_bit_of_the_sample():
    assert np.array_equal(run_gaussian(9).x_0, run_gaussian(9, frames=5).x_0)


def test_memory_of_the_sampler_does_not_grow_with_its_steps():
    def temporary_bytes(num_steps):
        def call(keys):
            return sample(
                gaussian.denoiser(LDM.abar),
                keys,
                jnp.zeros((4,), jnp.int32),
                eta=jnp.asarray(0.0),
                levels=make_levels(LDM, num_steps),
                step=ddim_step,
                shape=(32, 32, 4),
                num_frames=0,
            ).x_0

        compiled = jax.jit(call).lower(image_keys([0, 1, 2, 3])).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    latents = 4 * 32 * 32 * 4 * 4
    assert temporary_bytes(500) - temporary_bytes(50) < latents


def test_guidance_interpolates_between_the_two_predictions():
    def denoise(x_t, t, cond):
        return x_t * (1.0 + cond.astype(x_t.dtype)[:, None, None, None])

    x, t = jnp.ones((2, 1, 1, 1)), jnp.zeros((2,), jnp.int32)
    cond = jnp.asarray([2, 5])
    for scale, wanted in ((0.0, [10, 10]), (1.0, [3, 6]), (2.0, [-4, 2])):
        guided = classifier_free(
            denoise, null_cond=jnp.full((2,), 9), scale=jnp.asarray(scale)
        )
        assert guided(x, t, cond).ravel() == pytest.approx(wanted)
