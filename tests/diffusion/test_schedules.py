import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion.parameterization import add_noise
from ldm_jax.diffusion.schedules import (
    DiscreteSchedule,
    FlowSchedule,
    Level,
    draw_levels,
    level_at,
    level_of_ratio,
    make_schedule,
    reaches_pure_noise,
)
from ldm_jax.rng import image_keys
from tests.support.gaussian import BETAS, SCHEDULES, SIGMA_DATA, level_of_time

LDM, EDM = SCHEDULES["ldm_linear"], SCHEDULES["edm"]
NUM_DRAWS = 20_000
DRAWING = ["ldm_linear", "zero_snr", "flow", "edm"]


@pytest.fixture(scope="module")
def draws():
    keys = image_keys(list(range(NUM_DRAWS)))
    return {name: draw_levels(SCHEDULES[name], keys) for name in DRAWING}


# Values of the original code, computed separately.
@pytest.mark.parametrize(
    ("name", "start", "end", "abar_last"),
    [
        ("ldm_linear", 0.0015, 0.0195, 1.42e-4),
        ("linear", 0.0015, 0.0195, 2.57e-5),
        ("ldm_linear", 0.00085, 0.012, 4.66e-3),
        ("linear", 0.00085, 0.012, 1.58e-3),
    ],
)
def test_last_signal_power_equals_the_original(name, start, end, abar_last):
    schedule = make_schedule(name, num_timesteps=1000, beta_start=start, beta_end=end)
    assert schedule.abar[-1] == pytest.approx(abar_last, rel=4e-3)
    assert schedule.beta[[0, -1]] == pytest.approx([start, end], rel=1e-12)


def test_ldm_linear_is_linear_in_sqrt_beta_and_linear_in_beta():
    assert np.diff(np.sqrt(LDM.beta), 2) == pytest.approx(0, abs=1e-15)
    plain = make_schedule("linear", num_timesteps=9, beta_start=0.1, beta_end=0.9)
    assert plain.beta == pytest.approx(np.arange(1, 10) / 10, abs=1e-15)
    assert plain.abar == pytest.approx(np.cumprod(1 - np.arange(1, 10) / 10))


def test_cosine_schedule_is_the_squared_cosine_up_to_the_largest_beta():
    cosine = SCHEDULES["cosine"]
    angle = (np.arange(1, 1001) / 1000 + 0.008) / 1.008 * np.pi / 2
    wanted = np.cos(angle) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    assert cosine.abar[:-1] == pytest.approx(wanted[:-1], rel=1e-9)
    # The formula ends without signal; the largest beta prevents that.
    assert cosine.beta[-1] == 0.999
    assert cosine.abar[-1] == pytest.approx(0.001 * cosine.abar[-2])


@pytest.mark.parametrize("name", ["ldm_linear", "linear", "cosine"])
def test_zero_terminal_snr_moves_the_end_to_zero_and_keeps_the_start(name):
    plain = make_schedule(name, **BETAS)
    moved = make_schedule(name, **BETAS, zero_terminal_snr=True)
    assert moved.abar[-1] == 0.0
    assert moved.abar[0] == pytest.approx(plain.abar[0], rel=1e-12)
    assert moved.beta[-1] == 1.0
    assert moved.abar == pytest.approx(np.cumprod(1 - moved.beta), abs=1e-12)
    # One shift and one scale for every level.
    roots = np.sqrt(plain.abar), np.sqrt(moved.abar)
    assert np.polyval(np.polyfit(*roots, 1), roots[0]) == pytest.approx(
        roots[1], abs=1e-9
    )


def test_schedule_tables_are_float64_and_decreasing():
    for schedule in SCHEDULES.values():
        if isinstance(schedule, DiscreteSchedule):
            assert schedule.abar.dtype == schedule.beta.dtype == np.float64
            assert (np.diff(schedule.abar) < 0).all()
            assert schedule.num_timesteps == 1000


def test_a_bad_schedule_is_refused():
    with pytest.raises(ValueError, match="betas"):
        make_schedule("linear", num_timesteps=5, beta_start=0.5, beta_end=0.1)
    with pytest.raises(ValueError, match="num_timesteps"):
        make_schedule("linear", num_timesteps=0, beta_start=0.1, beta_end=0.2)
    with pytest.raises(ValueError, match="at least 2"):
        make_schedule(
            "linear",
            num_timesteps=1,
            beta_start=0.1,
            beta_end=0.2,
            zero_terminal_snr=True,
        )


def test_only_zero_snr_and_flow_reach_pure_noise():
    found = {name for name in SCHEDULES if reaches_pure_noise(SCHEDULES[name])}
    assert found == {"zero_snr", "flow"}


def test_add_noise_equals_the_recursion_of_single_steps():
    # Means and variances of q(x_t | x_0) by the recursion of eq. 2 of DDPM.
    mean, variance = 1.0, 0.0
    zero, one = jnp.zeros((1, 1, 1, 1)), jnp.ones((1, 1, 1, 1))
    for i, beta in enumerate(LDM.beta):
        mean, variance = np.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        if i in (0, 1, 10, 500, 999):
            rows = level_at(LDM, np.asarray([float(i)]))
            level = Level(*(jnp.asarray(row, jnp.float32) for row in rows))
            assert add_noise(one, zero, level).item() == pytest.approx(mean, rel=1e-6)
            std = add_noise(zero, one, level).item()
            assert std**2 == pytest.approx(variance, rel=1e-5)


def test_schedule_positions_run_from_least_to_most_noise():
    ends = np.asarray([0.0, 999.0])
    flow = level_at(SCHEDULES["flow"], ends)
    assert flow.sigma == pytest.approx([0.001, 1.0], rel=1e-15)
    assert flow.alpha == pytest.approx([0.999, 0.0], rel=1e-15)
    assert flow.t == pytest.approx([1.0, 1000.0], rel=1e-15)
    edm = level_at(EDM, ends)
    assert edm.sigma / edm.alpha == pytest.approx([0.002, 80.0], rel=1e-12)
    assert edm.t == pytest.approx(250 * np.log([0.002, 80.0]), rel=1e-12)
    table = level_at(LDM, ends)
    assert np.square(table.alpha) == pytest.approx(LDM.abar[[0, -1]], rel=1e-15)
    one_level = level_at(EDM._replace(num_timesteps=1), np.zeros(1))
    assert one_level.sigma / one_level.alpha == pytest.approx([80.0])


@pytest.mark.parametrize("name", SCHEDULES)
def test_level_t_determines_alpha_and_sigma_between_table_entries(name):
    schedule = SCHEDULES[name]
    position = np.asarray([0.0, 0.25, 17.5, 500.9, 900.0])
    level = level_at(schedule, position)
    for t, alpha, sigma in zip(*level, strict=True):
        expected = level_of_time(schedule, t)
        assert (alpha, sigma) == pytest.approx(expected[1:], rel=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
def test_level_of_ratio_inverts_level_at(name):
    schedule = SCHEDULES[name]
    for position in (np.linspace(0, 990, 67), np.linspace(0.3, 997.7, 91)):
        wanted = level_at(schedule, position)
        found = level_of_ratio(schedule, wanted.sigma / wanted.alpha)
        assert found.t == pytest.approx(wanted.t, abs=1e-6)
        assert found.alpha == pytest.approx(wanted.alpha, rel=1e-9)
        assert found.sigma == pytest.approx(wanted.sigma, rel=1e-9)


def test_drawn_levels_lie_on_their_schedule(draws):
    for name in ("ldm_linear", "zero_snr"):
        level = draws[name]
        power = np.square(level.alpha) + np.square(level.sigma)
        assert power == pytest.approx(1, abs=3e-7)
        abar = SCHEDULES[name].abar[np.asarray(level.t)]
        assert np.square(level.alpha) == pytest.approx(abar, abs=1e-6)
    flow = draws["flow"]
    assert np.asarray(flow.alpha + flow.sigma) == pytest.approx(1, abs=2e-7)
    assert np.asarray(flow.t) == pytest.approx(1000 * np.asarray(flow.sigma), rel=1e-6)
    edm = draws["edm"]
    data_power = (SIGMA_DATA * np.asarray(edm.alpha)) ** 2 + np.square(edm.sigma)
    assert data_power == pytest.approx(1, abs=1e-5)
    ratio = np.asarray(edm.sigma / edm.alpha)
    assert np.asarray(edm.t) == pytest.approx(250 * np.log(ratio), abs=1e-3)


def test_drawn_timesteps_of_a_table_are_uniform(draws):
    counts = np.bincount(np.asarray(draws["ldm_linear"].t) // 100, minlength=10)
    assert len(counts) == 10
    # Five standard errors of a binomial count.
    assert counts == pytest.approx(NUM_DRAWS / 10, abs=5 * (NUM_DRAWS * 0.09) ** 0.5)
    small = make_schedule("linear", num_timesteps=3, beta_start=0.1, beta_end=0.5)
    t = draw_levels(small, image_keys(list(range(200)))).t
    assert sorted(set(np.asarray(t).tolist())) == [0, 1, 2]


def test_drawn_times_of_a_flow_are_uniform(draws):
    time = np.asarray(draws["flow"].sigma, np.float64)
    assert 0 <= time.min() < 0.001
    assert 0.999 < time.max() < 1
    # Moment k of the uniform distribution is 1 / (k + 1).
    for k in (1, 2, 3):
        error = (1 / (2 * k + 1) - 1 / (k + 1) ** 2) ** 0.5 / NUM_DRAWS**0.5
        assert (time**k).mean() == pytest.approx(1 / (k + 1), abs=5 * error)


def test_drawn_ratios_of_edm_are_log_normal(draws):
    level = draws["edm"]
    log_ratio = np.log(np.asarray(level.sigma / level.alpha, np.float64))
    unit = (log_ratio - EDM.log_mean) / EDM.log_std
    # Moments of the unit normal, and the variances of their estimates.
    for k, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        error = (variance / NUM_DRAWS) ** 0.5
        assert (unit**k).mean() == pytest.approx(moment, abs=5 * error)


@pytest.mark.parametrize("name", DRAWING)
def test_drawn_level_depends_on_its_own_key_only(name, draws):
    few = draw_levels(SCHEDULES[name], image_keys([7, 3]))
    for some, all_ in zip(few, draws[name], strict=True):
        assert np.array_equal(some, all_[np.asarray([7, 3])])


def test_flow_schedule_scales_t_by_num_timesteps():
    assert level_at(FlowSchedule(10), np.asarray([4.0])).t == pytest.approx([5.0])


@pytest.mark.parametrize("name", ["ldm_linear", "flow"])
@pytest.mark.parametrize("shift", [3.0, 0.5])
def test_shift_moves_drawn_times_by_its_formula(name, shift):
    keys = image_keys(list(range(2000)))
    times = np.asarray(draw_levels(SCHEDULES[name], keys, shift=shift).t)
    times = times / SCHEDULES[name].num_timesteps
    for share in (0.1, 0.5, 0.9):
        below = np.mean(times < shift * share / (1.0 + (shift - 1.0) * share))
        # Five standard errors of a share of 2,000.
        assert below == pytest.approx(
            share, abs=5 * (share * (1 - share) / 2000) ** 0.5
        )


def test_shifted_level_is_a_table_entry():
    tiny = make_schedule("linear", num_timesteps=2, beta_start=0.1, beta_end=0.2)
    t = draw_levels(tiny, image_keys(list(range(200))), shift=1e6).t
    assert set(np.asarray(t).tolist()) == {1}
