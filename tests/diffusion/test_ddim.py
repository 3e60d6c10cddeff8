"""DDPM, DDIM, Euler and Euler ancestral are one update; DDIM and its inversion."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion.schedules import reaches_pure_noise
from ldm_jax.diffusion.solvers import inversion, make_table, slope_of, tabulate
from ldm_jax.diffusion.timesteps import make_levels
from tests.support.gaussian import SCHEDULES, TWO, follow, network

LDM = SCHEDULES["ldm_linear"]


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def table_of(sampler, levels, **kw):
    return make_table(sampler, levels, prediction="v", **kw)


@pytest.mark.parametrize("num_steps", [2, 10, 1000])
def test_ddpm_posterior_follows_from_bayes_rule(num_steps):
    levels = make_levels(LDM, num_steps)
    table = table_of("ddpm", levels)
    abar = levels.alpha[:-1] ** 2
    abar_t, abar_s = abar[:-1], abar[1:]
    alpha = abar_t / abar_s
    # Precisions add: p(x_s | x_0) times p(x_t | x_s).
    variance = 1 / (1 / (1 - abar_s) + alpha / (1 - alpha))
    wanted = (
        variance * np.sqrt(alpha) / (1 - alpha),
        variance * np.sqrt(abar_s) / (1 - abar_s),
    )
    assert table.noise[:-1, 0] ** 2 == pytest.approx(variance, rel=1e-9)
    assert table.mix[:-1, 0] == pytest.approx(np.stack(wanted, -1), rel=1e-9)
    assert table.mix[-1, 0] == pytest.approx([0, 1])


@pytest.mark.parametrize("name", SCHEDULES)
def test_ddim_eta_one_is_ddpm_and_euler_ancestral(name):
    levels = make_levels(SCHEDULES[name], 12)
    ddpm = table_of("ddpm", levels)
    for other in (
        table_of("ddim", levels, eta=1.0),
        table_of("euler_ancestral", levels),
    ):
        assert other.mix == pytest.approx(ddpm.mix, abs=1e-12)
        assert other.noise == pytest.approx(ddpm.noise, abs=1e-12)
    # k-diffusion's coordinates: x / alpha, with the slope (x - x_0) / ratio.
    x, x_0, noise = 0.3, -0.8, 1.7
    first = int(reaches_pure_noise(SCHEDULES[name]))
    ratio = levels.sigma[first:] / levels.alpha[first:]
    for i, (t, s) in enumerate(itertools.pairwise(ratio), start=first):
        up = np.sqrt(s**2 * (t**2 - s**2) / t**2)
        down = np.sqrt(s**2 - up**2)
        theirs = x / levels.alpha[i]
        theirs = theirs + (theirs - x_0) / t * (down - t) + up * noise
        mix = ddpm.mix[i, 0]
        ours = mix[0] * x + mix[1] * x_0 + ddpm.noise[i, 0] * noise
        assert ours == pytest.approx(levels.alpha[i + 1] * theirs, abs=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
def test_ddim_eta_zero_is_euler_and_keeps_the_noise(name):
    levels = make_levels(SCHEDULES[name], 12)
    ddim, euler = table_of("ddim", levels, eta=0.0), table_of("euler", levels)
    assert ddim.mix == pytest.approx(euler.mix, abs=1e-12)
    assert not np.any(ddim.noise)
    x_0, eps = -0.8, 1.3
    x = levels.alpha * x_0 + levels.sigma * eps
    stepped = euler.mix[:, 0, 0] * x[:-1] + euler.mix[:, 0, 1] * x_0
    assert stepped == pytest.approx(x[1:], abs=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", SCHEDULES)
def test_ddim_has_the_marginals_of_the_forward_process(name, eta):
    # Mean alpha x_0 and variance sigma^2 (DDIM, eq. 7), for every eta.
    levels = make_levels(SCHEDULES[name], 9)
    table = table_of("ddim", levels, eta=eta)
    kept, clean = table.mix[:, 0].T
    assert kept * levels.alpha[:-1] + clean == pytest.approx(
        levels.alpha[1:], abs=1e-12
    )
    variance = (kept * levels.sigma[:-1]) ** 2 + table.noise[:, 0] ** 2
    assert variance == pytest.approx(levels.sigma[1:] ** 2, abs=1e-12)
    # Equation 16: eta is the share of the posterior's deviation.
    posterior = table_of("ddpm", levels).noise[:, 0]
    assert table.noise[:, 0] == pytest.approx(eta * posterior, abs=1e-12)


def test_ddim_eta_may_be_traced():
    levels = make_levels(LDM, 9)

    def weights(eta):
        table = table_of("ddim", levels, eta=eta)
        return table.mix, table.noise

    for traced, eager in zip(
        jax.jit(weights)(jnp.asarray(0.4)), weights(0.4), strict=True
    ):
        assert traced == pytest.approx(np.asarray(eager), abs=1e-15)


def invert(levels, x_0, iterations, prediction, schedule):
    rows = inversion(levels, iterations=iterations)
    how = {"prediction": prediction, "sigma_data": 1.0}
    table = tabulate(rows, levels, slope_of(levels), **how)
    net = network(levels, prediction, TWO, schedule=schedule)
    return table, follow(table, net, x_0)[0]


@pytest.mark.parametrize("name", SCHEDULES)
def test_ddim_of_inverted_noise_returns_the_latent(name):
    schedule = SCHEDULES[name]
    levels = make_levels(schedule, 50)
    x_0 = np.linspace(-1.6, 1.6, 9)
    net = network(levels, "v", TWO, schedule=schedule)
    errors = []
    for iterations in (1, 2, 4, 64):
        table, noise = invert(levels, x_0, iterations, "v", schedule)
        assert table.num_calls == 50 * iterations
        assert table.sigma[-1, 0] == levels.sigma[0]
        back = follow(table_of("euler", levels), net, noise)[0]
        errors.append(np.abs(back - x_0).max())
    assert (np.diff(errors) < 0).all(), errors
    assert errors[-1] < 1e-5, errors


def test_inversion_of_one_iteration_is_ddim_inversion():
    levels = make_levels(LDM, 6)
    net = network(levels, "eps", TWO, schedule=LDM)
    x = np.linspace(-1.6, 1.6, 9)
    _, found = invert(levels, x, 1, "eps", LDM)
    for i in range(5, -1, -1):
        eps = net(x, levels.t[i])
        x_0 = (x - levels.sigma[i + 1] * eps) / levels.alpha[i + 1]
        x = levels.alpha[i] * x_0 + levels.sigma[i] * eps
    assert found == pytest.approx(x, abs=1e-12)
