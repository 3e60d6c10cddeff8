"""Our samplers equal diffusers' schedulers at every network call.

Both call one nonlinear function, each at its own latents, and read the same noise. The
levels come from `make_levels` where it gives the grid of diffusers. Elsewhere they are
read from the tables of diffusers, where the name of a spacing has another meaning:

- `trailing` at 999 steps: they round `1000 k / 999`, we round down.
- `linspace`: they round halves to even, we round them up; Euler, Heun and FlowMatch do
  not round at all; DPM-Solver and UniPC divide by one step more and leave the last out.
- `leading`: DPM-Solver and UniPC divide by one step more.
- `karras`: DPM-Solver and UniPC ask the network at rounded timesteps.
- `ldm`: refused for 999 steps.
- LCM takes its timesteps from 50 evenly spaced ones.
- DPM-Solver and UniPC begin flows short of pure noise.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion.guidance import rescaled, unguided
from ldm_jax.diffusion.parameterization import PredictionName
from ldm_jax.diffusion.sampling import sample
from ldm_jax.diffusion.schedules import EdmSchedule, level_at
from ldm_jax.diffusion.solvers import Table, make_table
from ldm_jax.diffusion.timesteps import Levels, make_levels
from ldm_jax.rng import Stream, image_keys, image_step_keys, normal
from ldm_jax.types import SAMPLER_NAMES, SpacingName
from tests.parity.scheduler_traces import (
    CASES,
    COUNTS,
    LDM,
    SHORT,
    Case,
    follow_ours,
    follow_theirs,
    in_their_units,
    levels_of,
    network,
    scheduler_of,
    widen,
    worst,
)

torch = pytest.importorskip("torch", reason="parity needs the extra `parity`")

# diffusers warns of its own deprecations; none of them is ours.
pytestmark = pytest.mark.filterwarnings("ignore")

# DDPM clamps its variance at 1e-20, and so puts 1e-10 of noise on the clean latent.
TOLERANCE = 1e-8
SHAPE = (2, 2, 2, 3)
DRAWN = np.random.default_rng(0).standard_normal((2001, *SHAPE))
X_START, FRESH = DRAWN[-1], DRAWN[:-1]
EACH = [(name, spacing) for name, case in CASES.items() for spacing in case.grids]
SHARED = [pair for pair in EACH if {*CASES[pair[0]].grids[pair[1]]} & {*SHORT}]


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def wide(monkeypatch):
    """Have diffusers compute in double precision."""
    widen(monkeypatch, *{f"{case.theirs}Scheduler" for case in CASES.values()})
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def counts_of(spacing: SpacingName) -> tuple[int, ...]:
    return SHORT if spacing == "ldm" else COUNTS


def table_of(case: Case, levels: Levels, prediction: PredictionName) -> Table:
    edm = isinstance(case.schedule, EdmSchedule)
    sigma_data = case.schedule.sigma_data if edm else 1.0
    return make_table(
        case.ours, levels, prediction=prediction, sigma_data=sigma_data, eta=case.eta
    )


class Pair(NamedTuple):
    """A scheduler, its latents after every network call, and our table of it."""

    scheduler: Any
    theirs: np.ndarray
    table: Table


def pair_of(
    case: Case,
    spacing: SpacingName,
    num_steps: int,
    prediction: PredictionName,
    fresh: np.ndarray = FRESH,
) -> Pair:
    """Run a scheduler, and make our table on its levels."""
    scheduler = scheduler_of(case, spacing, num_steps, prediction)
    if num_steps in case.grids[spacing]:
        levels = make_levels(case.schedule, num_steps, spacing=spacing)
    else:
        levels = levels_of(scheduler, case.schedule)
    table = table_of(case, levels, prediction)
    options = {"eta": case.eta} if case.theirs == "DDIM" else {}
    theirs = follow_theirs(scheduler, case.schedule, network, X_START, fresh, **options)
    return Pair(scheduler, theirs, table)


def error_of(pair: Pair) -> float:
    """Return the largest relative error of a network call's latents."""
    ours = follow_ours(pair.table, network, X_START, FRESH)
    return worst(in_their_units(ours, pair.table, pair.scheduler), pair.theirs)


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize(("name", "spacing"), EACH)
def test_levels_equal_diffusers_for_exactly_the_listed_grids(name, spacing):
    case = CASES[name]
    for num_steps in counts_of(spacing):
        scheduler = scheduler_of(case, spacing, num_steps, case.predictions[0])
        theirs = levels_of(scheduler, case.schedule)
        ours = make_levels(case.schedule, num_steps, spacing=spacing)
        pairs = zip(ours[:3], theirs[:3], strict=True)
        agree = [np.allclose(a, b, rtol=1e-9, atol=1e-9) for a, b in pairs]
        assert all(agree) == (num_steps in case.grids[spacing]), num_steps
        if spacing == "karras":
            assert all(agree[1:])
            assert all(agree) or (np.rint(ours.t) == theirs.t).all()


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize(("name", "spacing"), EACH)
def test_every_latent_equals_diffusers_in_float64(name, spacing):
    case = CASES[name]
    for i, prediction in enumerate(case.predictions):
        for num_steps in counts_of(spacing):
            # Long runs of diffusers are slow: all predictions on the first grid only.
            if num_steps > 50 and i > 0 and spacing != next(iter(case.grids)):
                continue
            error = error_of(pair_of(case, spacing, num_steps, prediction))
            assert error < TOLERANCE, (prediction, num_steps)


@pytest.mark.parametrize(("name", "spacing"), SHARED)
def test_latents_of_diffusers_in_float32_differ_by_rounding(name, spacing):
    case = CASES[name]
    for num_steps in sorted({*case.grids[spacing]} & {*SHORT}):
        for prediction in case.predictions:
            error = error_of(pair_of(case, spacing, num_steps, prediction))
            assert error < 1e-5, (prediction, num_steps)


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("sampler", SAMPLER_NAMES)
def test_the_scan_equals_diffusers_for_every_sampler(sampler):
    case = next(case for case in CASES.values() if case.ours == sampler)
    keys = image_keys([3, 8])
    fresh = [
        normal(image_step_keys(keys, Stream.SAMPLE_STEP, call), SHAPE[1:])
        for call in range(20)
    ]
    pair = pair_of(case, next(iter(case.grids)), 10, "eps", np.stack(fresh))

    def denoise(x_t, t, cond):
        return network(x_t, t[:, None, None, None], jnp)

    found = sample(
        unguided(denoise),
        jnp.asarray(X_START),
        keys,
        None,
        table=pair.table,
        num_frames=int(pair.table.step[-1]) + 2,
    )
    # The last network call of a step ends it.
    last = np.append(np.diff(pair.table.step) != 0, True)
    rows = Table(*(row[last] for row in pair.table))
    frames = in_their_units(np.asarray(found.frames[1:]), rows, pair.scheduler)
    assert worst(frames, pair.theirs[last]) < TOLERANCE
    assert (found.frames[0] == X_START).all()
    assert (found.frames[-1] == found.x_0).all()


# diffusers extrapolates v over several levels and uses the sum as the v of one, which
# is a method of first order. So diffusers is given the noise instead.
@pytest.mark.usefixtures("wide")
def test_plms_extrapolates_the_noise_of_each_level():
    case = CASES["plms"]
    scheduler = scheduler_of(case, "leading", 25, "eps")
    levels = make_levels(LDM, 25, spacing="leading")

    def noise_of(x_t, t):
        abar = LDM.abar[int(t)]
        return np.sqrt(abar) * network(x_t, t) + np.sqrt(1.0 - abar) * x_t

    ours = follow_ours(table_of(case, levels, "v"), network, X_START, FRESH)
    theirs = follow_theirs(scheduler, LDM, noise_of, X_START, FRESH)
    assert worst(ours, theirs) < TOLERANCE

    scheduler = scheduler_of(case, "leading", 25, "v")
    theirs = follow_theirs(scheduler, LDM, network, X_START, FRESH)
    fine = level_at(LDM, np.linspace(levels.t[0], levels.t[-2], 1001))
    table = make_table("heun", Levels(*fine, straight=False), prediction="v")
    exact = follow_ours(table, network, X_START, FRESH)[-1]
    # Before the last step, which ends at the clean latent.
    assert np.abs(ours[-2] - exact).max() < np.abs(theirs[-2] - exact).max() / 5


def test_ldm_spacing_equals_latent_diffusion_for_every_valid_count():
    crashed, steps, abar = set(), {}, LDM.abar
    for num_steps in range(1, 1001):
        stride = 1000 // num_steps
        grid = np.asarray(list(range(0, 1000, stride))) + 1
        if grid[-1] > 999:
            crashed.add(num_steps)
            with pytest.raises(ValueError, match=f"got {num_steps}, .* passes"):
                make_levels(LDM, num_steps, spacing="ldm")
            continue
        steps[num_steps] = len(grid)
        levels = make_levels(LDM, num_steps, spacing="ldm")
        assert (levels.t == [*grid[::-1], 0]).all()
        if num_steps != 1000 // stride:
            continue  # the same grid as another count's
        here = abar[grid][::-1]
        there = np.append(abar[0], abar[grid[:-1]])[::-1]
        for sampler, eta in (("euler", 0.0), ("euler_ancestral", 1.0)):
            drawn = eta * np.sqrt((1 - there) / (1 - here) * (1 - here / there))
            kept = np.sqrt(there / here)
            noise = np.sqrt(1 - there - drawn**2) - kept * np.sqrt(1 - here)
            table = make_table(sampler, levels, prediction="eps")
            of_x_t, of_clean = table.mix[:, 0].T
            x_t_in_clean, output = table.read.T
            np.testing.assert_allclose(of_x_t + of_clean * x_t_in_clean, kept)
            np.testing.assert_allclose(of_clean * output, noise, atol=1e-12)
            np.testing.assert_allclose(table.noise[:, 0], drawn, atol=1e-12)
    assert {n: steps[n] for n in (30, 150, 220, 400, 450)} == {
        30: 31,
        150: 167,
        220: 250,
        400: 500,
        450: 500,
    }
    ranges = ((3, 3), (9, 9), (27, 27), (36, 37), (101, 111), (251, 333), (501, 1000))
    assert crashed == {n for low, high in ranges for n in range(low, high + 1)}


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_guidance_rescaling_equals_diffusers(share):
    from diffusers.guiders.guider_utils import rescale_noise_cfg

    guided, conditional = 5.0 * DRAWN[0], DRAWN[1] + 0.5
    theirs = rescale_noise_cfg(
        torch.from_numpy(guided), torch.from_numpy(conditional), share
    )
    ours = rescaled(
        jnp.asarray(guided), jnp.asarray(conditional), share=jnp.asarray(share)
    )
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-12)
