"""Samplers as tables, on data whose denoiser and flow are known in closed form."""

import jax
import numpy as np
import pytest

from ldm_jax.diffusion.schedules import reaches_pure_noise
from ldm_jax.diffusion.solvers import (
    make_table,
)
from ldm_jax.diffusion.timesteps import Levels, make_levels
from ldm_jax.types import SAMPLER_NAMES, TAKES_ETA
from tests.support.gaussian import (
    MEAN,
    ONE,
    POINT,
    SCHEDULES,
    SIGMA_DATA,
    STD,
    STOCHASTIC,
    TWO,
    flow_end,
    follow,
    level_of_time,
    moments,
    network,
)

PREDICTIONS = ("v", "eps", "x0", "flow", "edm")
LDM = SCHEDULES["ldm_linear"]
FIRST_ORDER = ("ddim", "ddpm", "euler", "euler_ancestral")


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def levels_of_ratios(ratio, kind):
    """Make levels of given noise-to-signal ratios; t is their index."""
    alpha = {
        "vp": 1 / np.sqrt(1 + ratio**2),
        "straight": 1 / (1 + ratio),
        "edm": 1 / np.sqrt(SIGMA_DATA**2 + ratio**2),
    }[kind]
    t = np.arange(len(ratio), dtype=np.float64)
    return Levels(t, alpha, alpha * ratio, straight=kind == "straight")


def even_in_lambda(n):
    return np.exp(np.linspace(3, -3, n + 1))


def even_in_seventh_root(n):
    return np.linspace(20 ** (1 / 7), 0.05 ** (1 / 7), n + 1) ** 7


def even_in_time(n):
    time = np.linspace(0.98, 0.02, n + 1)
    return time / (1 - time)


def uneven_in_lambda(n):
    """Shorten every other step, so that the grid never becomes smooth."""
    places = np.arange(n + 1) - 0.3 * (np.arange(n + 1) % 2)
    return np.exp(3 - 6 * places / n)


def squared_time(n):
    time = np.linspace(0.98**0.5, 0.02**0.5, n + 1) ** 2
    return time / (1 - time)


def table_of(sampler, levels, prediction="v", **kw):
    return make_table(
        sampler, levels, prediction=prediction, sigma_data=SIGMA_DATA, **kw
    )


def orders(sampler, kind, ratios, counts=(64, 128, 256)):
    """Measure convergence orders against the exact end of a flow of two components."""
    errors = []
    for n in counts:
        levels = levels_of_ratios(ratios(n), kind)
        deviation = np.hypot(levels.alpha[0] * 0.9, levels.sigma[0])
        x_start = np.linspace(-2, 2, 17) * deviation
        net = network(levels, "v", TWO)
        found = follow(table_of(sampler, levels), net, x_start)[0]
        errors.append(np.abs(found - flow_end(x_start, levels, TWO)).max())
    return np.log2(np.divide(errors[:-1], errors[1:]))


PATHS = {
    "vp": ("vp", even_in_lambda),
    "straight": ("straight", squared_time),
    "edm": ("edm", even_in_seventh_root),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("sampler", "least", "most"),
    [
        ("ddim", 0.9, 1.1),
        ("euler", 0.9, 1.1),
        ("heun", 1.9, 2.1),
        ("plms", 1.9, 2.1),
        ("dpmpp_2m", 1.9, 2.1),
        ("dpmpp_2s", 1.85, 2.1),
        # The corrector adds an order to the predictor's two.
        ("unipc", 2.6, 3.1),
    ],
)
def test_solver_converges_with_its_order(sampler, least, most, path):
    found = orders(sampler, *PATHS[path])
    assert (found > least).all(), found
    assert (found < most).all(), found


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "dpmpp_2s", "unipc"])
def test_second_order_solvers_keep_their_order_on_uneven_steps(sampler):
    assert (orders(sampler, "vp", uneven_in_lambda) > 1.85).all()


def test_plms_has_a_higher_order_on_levels_even_in_its_own_time():
    # Three instead of four, because the first step is one of Heun.
    assert (orders("plms", "straight", even_in_time) > 2.7).all()
    in_ratio = orders("plms", "vp", lambda n: np.linspace(12, 0.05, n + 1), (256, 512))
    assert in_ratio > 2.7


@pytest.mark.parametrize("name", SCHEDULES)
def test_ddim_converges_to_the_flow_on_every_schedule(name):
    x_start = np.linspace(-2, 2, 9)
    errors = []
    for num_steps in (125, 250, 500):
        levels = make_levels(SCHEDULES[name], num_steps)
        net = network(levels, "v", ONE, schedule=SCHEDULES[name])
        found = follow(table_of("ddim", levels), net, x_start)[0]
        errors.append(np.abs(found - flow_end(x_start, levels, ONE)).max())
    assert np.divide(errors[:-1], errors[1:]) == pytest.approx(2.0, abs=0.25)


@pytest.mark.parametrize("name", SCHEDULES)
def test_higher_order_solvers_are_nearer_to_the_flow_than_ddim(name):
    # Cosine begins at a ratio of 2e4: steps in the ratio itself would be too long.
    x_start, errors = np.linspace(-2, 2, 17), {}
    levels = make_levels(SCHEDULES[name], 20)
    net = network(levels, "v", TWO, schedule=SCHEDULES[name])
    for sampler in ("ddim", "heun", "plms", "dpmpp_2m", "dpmpp_2s", "unipc"):
        found = follow(table_of(sampler, levels), net, x_start)[0]
        errors[sampler] = np.abs(found - flow_end(x_start, levels, TWO)).max()
    assert max(errors, key=lambda sampler: errors[sampler]) == "ddim", errors


def predictions(name):
    pure = reaches_pure_noise(SCHEDULES[name])
    return [kind for kind in PREDICTIONS if not (pure and kind == "eps")]


def ends_of(sampler, name, num_steps, prediction):
    """Return mean and standard deviation of samples from the exact start."""
    schedule = SCHEDULES[name]
    levels = make_levels(schedule, num_steps)
    net = network(levels, prediction, ONE, schedule=schedule)
    start = (levels.alpha[0] * STD) ** 2 + levels.sigma[0] ** 2
    table = table_of(sampler, levels, prediction)
    means, variances = moments(table, net, levels.alpha[0] * MEAN, start)
    return means[-1, 0], variances[-1, 0] ** 0.5, levels


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("sampler", [s for s in SAMPLER_NAMES if s != "lcm"])
def test_samples_have_the_distribution_of_the_data(sampler, name):
    for num_steps in (100, 300):
        mean, std, levels = ends_of(sampler, name, num_steps, "v")
        assert mean == pytest.approx(MEAN, abs=1e-9)
        # The last step returns the mean of the clean latent: the variance left at its
        # level is lost. The other errors fall with the number of steps.
        lost = (levels.sigma[-2] / levels.alpha[-2] / STD) ** 2
        bias = (7 if sampler in FIRST_ORDER else 1) / num_steps
        assert std == pytest.approx(STD, rel=lost + bias)


@pytest.mark.parametrize(
    ("sampler", "name"),
    [
        (sampler, name)
        for sampler in SAMPLER_NAMES
        for name in SCHEDULES
        if (sampler, name) != ("lcm", "edm")
    ],
)
def test_sample_does_not_depend_on_the_prediction(sampler, name):
    levels = make_levels(SCHEDULES[name], 12)
    fresh = np.random.RandomState(0).randn(30, 9)
    found = [
        follow(
            table_of(sampler, levels, kind, **eta_of(sampler)),
            network(levels, kind, TWO, schedule=SCHEDULES[name]),
            np.linspace(-2, 2, 9),
            fresh,
        )[0]
        for kind in predictions(name)
    ]
    for other in found[1:]:
        assert other == pytest.approx(found[0], abs=1e-9)


def eta_of(sampler):
    return {"eta": 0.5} if sampler in TAKES_ETA else {}


@pytest.mark.parametrize("path", [*SCHEDULES, *PATHS])
@pytest.mark.parametrize("sampler", [s for s in SAMPLER_NAMES if s != "lcm"])
def test_data_of_one_image_is_sampled_exactly_in_any_number_of_steps(sampler, path):
    # Its denoiser is constant: every register holds alpha x_0 + sigma eps at the level
    # that `Table` states.
    for num_steps in (1, 2, 3, 4, 7):
        if path in SCHEDULES:
            schedule = SCHEDULES[path]
            levels = make_levels(schedule, num_steps)
        else:
            kind, ratios = PATHS[path]
            schedule, levels = None, levels_of_ratios(ratios(num_steps), kind)
        net = network(levels, "v", POINT, schedule=schedule)
        table = table_of(sampler, levels, **eta_of(sampler))
        means, variances = moments(
            table, net, levels.alpha[0] * MEAN, levels.sigma[0] ** 2
        )
        # Rounding in float64, also from cosine's start with a signal of 5e-5.
        assert means == pytest.approx(table.alpha * MEAN, abs=1e-9)
        assert variances == pytest.approx(table.sigma**2, abs=1e-9)
        assert means[-1, 0] == pytest.approx(levels.alpha[-1] * MEAN, abs=1e-9)


@pytest.mark.parametrize("name", ["ldm_linear", "cosine", "zero_snr", "flow"])
def test_lcm_samples_the_data_with_a_consistency_function(name):
    schedule = SCHEDULES[name]
    levels = make_levels(schedule, 4)

    def jump(x, t):
        """Map x at t to the clean end of its flow, as a distilled network does."""
        level = level_of_time(schedule, t)
        total = np.hypot(level.alpha * STD, level.sigma)
        return MEAN + STD / total * (x - level.alpha * MEAN)

    table = table_of("lcm", levels, "x0")
    start = (levels.alpha[0] * STD) ** 2 + levels.sigma[0] ** 2
    means, variances = moments(table, jump, levels.alpha[0] * MEAN, start)
    # The boundary's scaling keeps (0.5 / 10 t)^2 of x_t; t is 249 at the last step.
    assert means[:, 0] == pytest.approx(levels.alpha[1:] * MEAN, abs=1e-7)
    wanted = (levels.alpha[1:] * STD) ** 2 + levels.sigma[1:] ** 2
    assert variances[:, 0] == pytest.approx(wanted, abs=1e-7)


def test_lcm_boundary_scaling_keeps_a_latent_without_noise():
    levels = make_levels(LDM, 1000)
    mix = table_of("lcm", levels).mix[:, 0]
    assert mix[-1] == pytest.approx([1.0, 0.0], abs=1e-15)
    # At t = 1, in the units of the scaling: s = 10 and sigma_data 0.5.
    wanted = np.asarray([0.25 / 100.25, 10 / 100.25**0.5])
    assert mix[-2] == pytest.approx(levels.alpha[-2] * wanted, rel=1e-12)


def test_lcm_is_refused_on_a_schedule_without_timesteps():
    with pytest.raises(ValueError, match="lcm"):
        table_of("lcm", make_levels(SCHEDULES["edm"], 4))


@pytest.mark.parametrize("num_steps", [1, 2, 3, 10])
def test_every_sampler_makes_its_number_of_network_calls(num_steps):
    levels = make_levels(LDM, num_steps)
    calls = {name: table_of(name, levels).num_calls for name in SAMPLER_NAMES}
    # Heun has no slope at the clean end; PLMS begins with a step of Heun.
    assert calls.pop("heun") == 2 * num_steps - 1
    assert calls.pop("plms") == num_steps + (num_steps > 1)
    assert set(calls.values()) == {num_steps}
    for name in SAMPLER_NAMES:
        step = np.asarray(table_of(name, levels).step)
        assert step[-1] == num_steps - 1
        assert set(np.diff(step)) <= {0, 1}


def test_stochastic_samplers_add_noise():
    levels = make_levels(LDM, 5)
    found = {
        name
        for name in SAMPLER_NAMES
        if np.any(table_of(name, levels, **eta_of(name)).noise)
    }
    assert found == STOCHASTIC


def test_eps_prediction_is_refused_at_a_level_without_signal():
    for name in ("flow", "zero_snr"):
        levels = make_levels(SCHEDULES[name], 5)
        with pytest.raises(ValueError, match=r"without signal.*wanted v"):
            table_of("euler", levels, "eps")
        # An edit starts at a later level, which has signal.
        assert np.isfinite(table_of("euler", levels.tail(4), "eps").read).all()
