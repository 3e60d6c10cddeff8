import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion.losses import (
    DiffusionObjective,
    denoising_loss,
    loss_weight,
    offset_noise,
)
from ldm_jax.diffusion.parameterization import (
    add_noise,
    prediction_gain,
    reading_of,
    target_of,
)
from ldm_jax.diffusion.schedules import Level, level_at, reaches_pure_noise
from tests.support.gaussian import SCHEDULES, SIGMA_DATA

PREDICTIONS = ("eps", "v", "x0", "flow", "edm")
PAIRS = [
    (prediction, name)
    for prediction in PREDICTIONS
    for name, schedule in SCHEDULES.items()
    if not (prediction == "eps" and reaches_pure_noise(schedule))
]


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def random(seed, num, shape):
    values = np.random.RandomState(seed).randn(num, *shape)
    return [jnp.asarray(value) for value in values]


def some_levels(name) -> Level:
    """Return seven levels of a schedule, both ends included."""
    return level_at(SCHEDULES[name], np.asarray([0.0, 1, 10, 300, 600, 900, 999]))


def wide(weights):
    return np.asarray(weights)[:, None, None, None]


@pytest.mark.parametrize(("prediction", "name"), PAIRS)
def test_every_prediction_reads_back_as_clean_latent_noise_and_flow(prediction, name):
    x_0, eps = random(0, 2, (7, 3, 3, 2))
    level = some_levels(name)
    how = {"prediction": prediction, "sigma_data": SIGMA_DATA}
    x_t = add_noise(x_0, eps, level)
    target = target_of(x_0, eps, level, **how)
    for signal, wanted in (("x0", x_0), ("eps", eps), ("flow", eps - x_0)):
        reading = reading_of(signal, level, **how)
        assert reading.output_weight.dtype == np.float64
        found = wide(reading.x_t_weight) * x_t + wide(reading.output_weight) * target
        # Dividing by a weight of 5e-5 (cosine's end) leaves 11 of 16 digits.
        assert found == pytest.approx(np.asarray(wanted), abs=1e-10)


def test_v_is_the_derivative_of_x_t_by_its_angle():
    # Salimans & Ho: with the angle phi, x_t = cos x_0 + sin eps and v = d x_t / d phi.
    x_0, eps = random(0, 2, (1, 4, 4, 2))
    phi, step = 0.7, 1e-5

    def noisy(angle):
        return np.cos(angle) * x_0 + np.sin(angle) * eps

    level = Level(np.zeros(1), np.cos([phi]), np.sin([phi]))
    v = target_of(x_0, eps, level, prediction="v")
    wanted = (noisy(phi + step) - noisy(phi - step)) / (2 * step)
    assert v == pytest.approx(np.asarray(wanted), abs=1e-8)


def test_flow_is_the_velocity_of_the_straight_path():
    x_0, eps = random(0, 2, (2, 4, 4, 2))
    x_early, x_late = (
        add_noise(x_0, eps, level_at(SCHEDULES["flow"], np.asarray(position)))
        for position in ([249.0, 599.0], [349.0, 699.0])
    )
    flow = target_of(x_0, eps, some_levels("flow"), prediction="flow")
    assert (x_late - x_early) / 0.1 == pytest.approx(np.asarray(flow), abs=1e-12)


def test_edm_is_minus_v_for_data_of_unit_deviation():
    x_0, eps = random(0, 2, (7, 4, 4, 2))
    for schedule in (
        SCHEDULES["ldm_linear"],
        SCHEDULES["edm"]._replace(sigma_data=1.0),
    ):
        level = level_at(schedule, np.asarray([0.0, 1, 10, 300, 600, 900, 999]))
        edm = target_of(x_0, eps, level, prediction="edm", sigma_data=1.0)
        v = target_of(x_0, eps, level, prediction="v")
        assert edm == pytest.approx(-np.asarray(v), abs=1e-12)


def test_edm_parameterization_equals_its_paper():
    level = some_levels("edm")
    sigma = level.sigma / level.alpha  # their noise level, of data not scaled
    total = np.sqrt(sigma**2 + SIGMA_DATA**2)
    c_skip = SIGMA_DATA**2 / total**2
    c_out = sigma * SIGMA_DATA / total
    c_in, c_noise = 1 / total, np.log(sigma) / 4
    x_0, noise, output = random(0, 3, (7, 3, 3, 2))
    theirs = x_0 + wide(sigma) * noise
    x_t = add_noise(x_0, noise, level)
    assert x_t == pytest.approx(np.asarray(wide(c_in) * theirs), abs=1e-12)
    assert level.t == pytest.approx(1000 * c_noise, rel=1e-12)
    how = {"prediction": "edm", "sigma_data": SIGMA_DATA}
    reading = reading_of("x0", level, **how)
    ours = wide(reading.x_t_weight) * x_t + wide(reading.output_weight) * output
    denoised = wide(c_skip) * theirs + wide(c_out) * output
    assert ours == pytest.approx(np.asarray(denoised), abs=1e-12)
    # Equation 8: the target, and the weight that makes the loss uniform in it.
    target = (x_0 - wide(c_skip) * theirs) / wide(c_out)
    found = target_of(x_0, noise, level, **how)
    assert found == pytest.approx(np.asarray(target), abs=1e-9)
    assert prediction_gain(level, **how) == pytest.approx(c_out**2, rel=1e-12)


def test_loss_is_zero_for_the_target_and_the_mean_error_for_zero_output():
    x_0, eps = random(0, 2, (7, 4, 4, 2))
    cond = jnp.zeros((7,), jnp.int32)
    level = Level(*(jnp.asarray(row) for row in some_levels("cosine")))
    for prediction in PREDICTIONS:
        target_output = target_of(x_0, eps, level, prediction=prediction)
        for loss, size in (("l1", jnp.abs), ("l2", jnp.square)):
            objective = DiffusionObjective(None, prediction, loss=loss)
            score = functools.partial(denoising_loss, objective=objective)
            args = (x_0, level, eps, cond)
            perfect = score(lambda *_, y=target_output: y, *args)
            assert np.asarray(perfect) == pytest.approx(0, abs=1e-20)
            error_of_zero = score(lambda x, *_: jnp.zeros_like(x), *args)
            wanted = np.asarray(size(target_output)).mean(axis=(1, 2, 3))
            assert error_of_zero == pytest.approx(wanted, rel=1e-12)


def test_loss_calls_the_network_with_noisy_latent_t_and_condition():
    x_0, eps = random(0, 2, (7, 2, 2, 1))
    level = Level(*(jnp.asarray(row) for row in some_levels("edm")))
    cond, seen = jnp.arange(7), []

    def denoise(x_t, t, cond):
        seen.append((x_t, t, cond))
        return x_t

    objective = DiffusionObjective(None, "v")
    denoising_loss(denoise, x_0, level, eps, cond, objective=objective)
    wanted = (add_noise(x_0, eps, level), level.t, cond)
    assert all(np.array_equal(*pair) for pair in zip(seen[0], wanted, strict=True))


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_loss_weights_equal_those_of_the_papers(gamma):
    level = some_levels("ldm_linear")
    snr = np.square(level.alpha / level.sigma)
    assert snr.min() < gamma < snr.max()
    clipped = np.minimum(snr, gamma)
    papers = {
        # Hang et al., after eq. 9, and app. on v and x_0.
        ("min_snr", "eps"): clipped / snr,
        ("min_snr", "v"): clipped / (snr + 1),
        ("min_snr", "x0"): clipped,
        # Choi et al., eq. 8, on the noise.
        ("p2", "eps"): 1 / (1 + snr) ** gamma,
        # Yu et al., the root in the place of gamma.
        ("debiased", "eps"): 1 / snr**gamma,
    }
    for (weight, prediction), wanted in papers.items():
        found = loss_weight(level, weight=weight, gamma=gamma, prediction=prediction)
        assert found == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("weight", ["min_snr", "p2", "debiased"])
@pytest.mark.parametrize(("prediction", "name"), PAIRS)
def test_weighted_loss_is_the_same_for_every_prediction(prediction, name, weight):
    # A wrong output, scored as itself and as the clean latent read out of it.
    x_0, eps, wrong = random(0, 3, (7, 3, 3, 2))
    level = some_levels(name)
    how = {"prediction": prediction, "sigma_data": SIGMA_DATA}
    x_t = add_noise(x_0, eps, level)
    target = target_of(x_0, eps, level, **how)
    reading = reading_of("x0", level, **how)
    clean = wide(reading.x_t_weight) * x_t
    clean = clean + wide(reading.output_weight) * (target + wrong)
    scoring = {"weight": weight, "weight_gamma": 2.0}
    as_itself, as_clean = (
        denoising_loss(
            lambda *_, y=answer: y,
            x_0,
            Level(*(jnp.asarray(row) for row in level)),
            eps,
            jnp.zeros((7,)),
            objective=DiffusionObjective(None, **kind, **scoring),
        )
        for answer, kind in ((target + wrong, how), (clean, {"prediction": "x0"}))
    )
    # Where x_t is almost clean, x_0 is read to 13 digits and its error is 1e-2 of it.
    assert as_itself == pytest.approx(np.asarray(as_clean), rel=1e-7)
    assert (np.asarray(as_itself)[:-1] > 0).all()


def test_loss_weights_stay_finite_without_noise_and_without_signal():
    level = Level(jnp.zeros(2), jnp.asarray([1.0, 0.0]), jnp.asarray([0.0, 1.0]))
    for prediction in ("v", "x0", "flow", "edm"):
        for weight, gamma in (("min_snr", 5.0), ("p2", 5.0), ("debiased", 1.0)):
            found = loss_weight(
                level, weight=weight, gamma=gamma, prediction=prediction
            )
            assert np.isfinite(found).all()


def test_offset_noise_correlates_pixels_within_a_channel_only():
    num, strength = 20_000, 0.5
    eps, offset = random(0, 1, (num, 1, 2, 2))[0], random(1, 1, (num, 2))[0]
    noise = np.asarray(offset_noise(eps, offset, strength=strength)).reshape(num, 4)
    # Values of a pixel: channel 0, channel 1; pixels in order.
    same_channel = np.tile(np.eye(2), (2, 2))
    wanted = np.eye(4) + strength**2 * same_channel
    found = noise.T @ noise / num
    # Five standard errors of a product of two normals: at most sqrt(2) of a variance.
    assert found == pytest.approx(wanted, abs=5 * 2**0.5 * 1.25 / num**0.5)
    assert np.array_equal(offset_noise(eps, offset, strength=0.0), eps)
