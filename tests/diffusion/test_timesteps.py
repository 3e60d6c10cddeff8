import re

import numpy as np
import pytest

from ldm_jax.diffusion.schedules import (
    EdmSchedule,
    FlowSchedule,
    make_schedule,
    reaches_pure_noise,
)
from ldm_jax.diffusion.timesteps import (
    check_spacing,
    default_spacing,
    make_levels,
    spaced_timesteps,
)
from ldm_jax.types import SPACING_NAMES
from tests.support.gaussian import BETAS, SCHEDULES, level_of_time

LDM, ZERO, FLOW, EDM = (
    SCHEDULES[name] for name in ("ldm_linear", "zero_snr", "flow", "edm")
)
SMALL = {
    f"T{top}": make_schedule("linear", **{**BETAS, "num_timesteps": top})
    for top in (1, 2, 7)
}
ALL = {**SCHEDULES, **SMALL, "flow97": FLOW._replace(num_timesteps=97)}


def valid_pairs(spacings, schedules):
    """List accepted pairs: no infinite ratio, no table spacing on a continuous path."""
    return [
        (spacing, name)
        for spacing in spacings
        for name, schedule in schedules.items()
        if not (spacing == "karras" and reaches_pure_noise(schedule))
        if not (spacing == "ldm" and isinstance(schedule, FlowSchedule | EdmSchedule))
    ]


@pytest.mark.parametrize(
    ("spacing", "name"),
    valid_pairs(("trailing", "leading", "linspace", "karras"), ALL),
)
def test_make_levels_returns_the_requested_number_of_steps(spacing, name):
    schedule = ALL[name]
    for num_steps in range(1, schedule.num_timesteps + 1):
        levels = make_levels(schedule, num_steps, spacing=spacing)
        assert levels.num_steps == num_steps
        assert len(levels.t) == len(levels.alpha) == len(levels.sigma) == num_steps + 1
        assert (np.diff(levels.t[:-1]) < 0).all()
        assert (np.diff(levels.sigma) < 0).all()
        assert (np.diff(np.arctan2(levels.sigma, levels.alpha)) < 0).all()
        assert (levels.alpha[-1], levels.sigma[-1]) == (1.0, 0.0)


@pytest.mark.parametrize("top", [1, 2, 97, 1000])
def test_spaced_timesteps_keep_their_ends_and_are_even(top):
    for num_steps in range(1, top + 1):
        by_spacing = {
            spacing: spaced_timesteps(num_steps, num_timesteps=top, spacing=spacing)
            for spacing in ("trailing", "leading", "linspace")
        }
        assert by_spacing["trailing"][0] == by_spacing["linspace"][0] == top - 1
        assert by_spacing["linspace"][-1] == (0 if num_steps > 1 else top - 1)
        assert by_spacing["leading"][-1] in (0, 1)
        assert by_spacing["leading"][0] <= top - 1
        for timesteps in by_spacing.values():
            assert timesteps[-1] >= 0
            if num_steps > 1:
                assert np.ptp(np.diff(timesteps)) <= 1
    assert (spaced_timesteps(top, num_timesteps=top) == np.arange(top)[::-1]).all()


# Table 2 of Lin et al.: 10 of 1000, counted from 1 there and from 0 here.
def test_spacings_equal_the_table_of_lin_et_al():
    def spaced(spacing):
        return spaced_timesteps(10, num_timesteps=1000, spacing=spacing).tolist()

    assert spaced("trailing") == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]
    # latent-diffusion shifts the paper's 0, 100, .. 900 by one.
    assert spaced("leading") == [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]
    assert spaced("linspace") == [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]


@pytest.mark.parametrize("num_steps", [0, 1001, -3])
def test_num_steps_out_of_range_is_refused(num_steps):
    with pytest.raises(ValueError, match="1 to 1000"):
        make_levels(LDM, num_steps)


def test_ldm_spacing_equals_the_original_or_is_refused_with_a_valid_count():
    refused = 0
    for num_steps in range(1, 1001):
        original = np.asarray(list(range(0, 1000, 1000 // num_steps))) + 1
        if original.max() < 1000:
            levels = make_levels(LDM, num_steps, spacing="ldm")
            assert levels.t.tolist() == [*original[::-1], 0]
            assert levels.alpha[-1] == LDM.abar[0] ** 0.5
            continue
        refused += 1
        with pytest.raises(ValueError, match="try") as caught:
            make_levels(LDM, num_steps, spacing="ldm")
        (valid_count,) = re.findall(r"try (\d+) steps", str(caught.value))
        assert make_levels(LDM, int(valid_count), spacing="ldm").num_steps >= int(
            valid_count
        )
    # The strides that divide 999.
    divisors = (1, 3, 9, 27, 37, 111, 333, 999)
    assert refused == sum(1000 // n in divisors for n in range(1, 1001))


def test_ldm_spacing_may_return_another_number_of_steps():
    assert make_levels(LDM, 50, spacing="ldm").num_steps == 50
    assert make_levels(LDM, 7, spacing="ldm").num_steps == 8


def test_unknown_spacing_is_refused_with_the_nearest_name():
    for wrong, near in (("trailling", "trailing"), ("karas", "karras"), ("x", "")):
        with pytest.raises(ValueError, match=f"{wrong}.*did you mean {near}"):
            check_spacing(LDM, wrong)


def test_spacings_undefined_for_a_schedule_are_refused():
    for schedule in (ZERO, FLOW):
        with pytest.raises(ValueError, match=r"without signal.*trailing"):
            make_levels(schedule, 5, spacing="karras")
    for schedule in (FLOW, EDM):
        with pytest.raises(ValueError, match=r"continuous.*trailing"):
            make_levels(schedule, 5, spacing="ldm")


def test_karras_levels_are_even_in_the_seventh_root_between_the_ends():
    for schedule, ends in ((EDM, (80.0, 0.002)), (LDM, None)):
        levels = make_levels(schedule, 20, spacing="karras")
        ratio = levels.sigma[:-1] / levels.alpha[:-1]
        if ends is None:
            ends = np.sqrt(1 / LDM.abar[[-1, 0]] - 1)
        assert ratio[[0, -1]] == pytest.approx(ends, rel=1e-9)
        gaps = np.diff(ratio ** (1 / 7))
        assert gaps == pytest.approx(gaps[0], rel=1e-9)
    alone = make_levels(EDM, 1)
    assert alone.sigma[0] / alone.alpha[0] == pytest.approx(80.0)


@pytest.mark.parametrize(("spacing", "name"), valid_pairs(SPACING_NAMES, SCHEDULES))
def test_t_of_every_spacing_matches_its_alpha_and_sigma(spacing, name):
    schedule = SCHEDULES[name]
    levels = make_levels(schedule, 23, spacing=spacing)
    for t, alpha, sigma in zip(*(row[:-1] for row in levels[:3]), strict=True):
        wanted = level_of_time(schedule, t)
        assert (alpha, sigma) == pytest.approx((wanted.alpha, wanted.sigma), rel=1e-9)


def test_default_spacing_is_karras_for_edm_only():
    defaults = {name: default_spacing(value) for name, value in SCHEDULES.items()}
    assert {name for name in defaults if defaults[name] == "karras"} == {"edm"}
    for name, schedule in SCHEDULES.items():
        for named, chosen in zip(
            make_levels(schedule, 9, spacing=defaults[name]),
            make_levels(schedule, 9),
            strict=True,
        ):
            assert np.array_equal(named, chosen)


def test_only_schedules_that_end_near_pure_noise_use_straight_time():
    found = {name for name, s in SCHEDULES.items() if make_levels(s, 3).straight}
    assert found == {"zero_snr", "flow", "cosine"}
    ddpm = make_schedule("linear", num_timesteps=1000, beta_start=1e-4, beta_end=0.02)
    assert not make_levels(ddpm, 3).straight


def test_tail_of_levels_is_the_last_steps():
    levels = make_levels(FLOW, 10)
    for num_steps in (1, 4, 10):
        tail = levels.tail(num_steps)
        assert tail.num_steps == num_steps
        assert tail.straight
        for rows, last in zip(levels[:3], tail[:3], strict=True):
            assert np.array_equal(rows[-num_steps - 1 :], last)
