"""One program for every number of steps: filled tables, and the bits of the others."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.build import build_model
from ldm_jax.diffusion.guidance import unguided
from ldm_jax.diffusion.sampling import sample
from ldm_jax.diffusion.solvers import make_table
from ldm_jax.diffusion.tables import pad
from ldm_jax.diffusion.timesteps import make_levels
from ldm_jax.models.conditioning import ConditionInputs
from ldm_jax.pretrained.open_weights import to_sample_params
from ldm_jax.rng import image_keys
from ldm_jax.sampling import any_steps
from ldm_jax.sampling.any_steps import AnyStepsFn, make_any_steps_fn
from ldm_jax.sampling.program import sample_course
from ldm_jax.sampling.sample_fn import make_sample_fn
from ldm_jax.types import SAMPLER_NAMES, InputError
from tests.support import tiny
from tests.support.gaussian import SCHEDULES
from tests.support.models import model_of

MOST = 12
SAMPLER = "dpmpp_sde_2m"


@functools.cache
def tiny_model():
    config = tiny.get_config()
    return build_model(config), to_sample_params(model_of(config))


class Counted(NamedTuple):
    """A sample function, and how often it was traced."""

    fn: AnyStepsFn
    traces: list[int]


@functools.cache
def counted():
    traces = []

    def traced(*args):
        traces.append(1)
        return sample_course(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(any_steps, "sample_course", traced)
        # Draws noise, and remembers: all that a table may ask for.
        fn = make_any_steps_fn(tiny_model()[0], sampler=SAMPLER, max_steps=9)
    return Counted(fn, traces)


def labels(*numbers):
    return ConditionInputs(label=np.asarray(numbers, np.int32))


def table_of(sampler, num_steps, schedule="ldm_linear"):
    levels = make_levels(SCHEDULES[schedule], num_steps)
    return make_table(sampler, levels, prediction="v")


@pytest.mark.parametrize("schedule", ["ldm_linear", "zero_snr"])
@pytest.mark.parametrize("sampler", SAMPLER_NAMES)
def test_every_table_fits_into_that_of_the_most_steps(sampler, schedule):
    for most in range(1, MOST + 1):
        longest = table_of(sampler, most, schedule)
        shape = {"num_calls": longest.num_calls, "num_signals": longest.num_signals}
        for num_steps in range(1, most + 1):
            table = table_of(sampler, num_steps, schedule)
            filled, live = pad(table, **shape)
            assert [x.shape for x in filled] == [x.shape for x in longest]
            assert live.sum() == live[: table.num_calls].sum() == table.num_calls
            kept = filled.mix[live]
            assert np.array_equal(kept[..., : table.mix.shape[2]], table.mix)
            assert not kept[..., table.mix.shape[2] :].any()
            assert all(np.isfinite(x).all() for x in (filled.mix, filled.read))


def test_a_table_is_not_cut():
    with pytest.raises(ValueError, match="got 6 calls of 1 signals, wanted at most 5"):
        pad(table_of("ddim", 6), num_calls=5, num_signals=1)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "plms", "dpmpp_2m", "unipc"])
def test_calls_that_are_not_live_ask_nothing_and_change_nothing(sampler):
    table, asked = table_of(sampler, 3), []

    def denoise(x_t, t, cond):
        jax.debug.callback(lambda: asked.append(1))
        return jnp.tanh(x_t) * (1.0 + t[:, None, None, None] / 1000.0)

    keys = image_keys([1, 2])
    x_start = jax.random.normal(jax.random.key(0), (2, 3, 3, 2))

    def end(table, live=None):
        predict = unguided(denoise)
        made = sample(predict, x_start, keys, None, table=table, live=live).x_0
        jax.effects_barrier()
        return np.asarray(made)

    plain, num_asked = end(table), len(asked)
    filled = end(*pad(table, num_calls=9, num_signals=table.num_signals + 2))
    assert num_asked == table.num_calls and len(asked) == 2 * num_asked
    # The weights are the same; a branch is compiled by itself, and may round otherwise.
    assert filled == pytest.approx(plain, abs=1e-6)


def test_an_image_has_the_bits_of_the_program_of_its_steps():
    model, params = tiny_model()
    inputs = (params, image_keys([7, 8, 9]), labels(3, 4, 5))
    for scale in (1.0, 2.5):
        fn = make_sample_fn(model, sampler=SAMPLER, num_steps=4, guided=scale != 1.0)
        ours, theirs = counted().fn(*inputs, 4, scale), fn(*inputs, scale).images
        assert np.array_equal(ours, theirs)
        assert np.ptp(ours) > 0.1


def test_turning_any_knob_compiles_nothing(lowered):
    fn, traces = counted()
    rng, drawn, programs = np.random.RandomState(0), [], []
    for i in range(20):
        keys = image_keys([int(rng.randint(2**31))])
        cond = labels(rng.randint(10))
        uncond = [None, labels(rng.randint(11))][i % 2]
        scale = [1.0, float(rng.uniform(0, 9)), 3][i % 3]
        image = fn(tiny_model()[1], keys, cond, int(rng.randint(1, 10)), scale, uncond)
        drawn.append(float(np.asarray(image).sum()))
        programs.append(len(lowered))
    assert len(traces) == 1 and len(set(drawn)) == 20
    # Nor small ones, once what lies around it was called with and without `uncond`.
    assert programs[-1] == programs[2]


def test_what_it_cannot_do_is_refused():
    model, params = tiny_model()
    with pytest.raises(ValueError, match="spacing: got 'ldm'"):
        make_any_steps_fn(model, sampler="ddim", max_steps=6, spacing="ldm")
    with pytest.raises(ValueError, match="steps: got 2000, wanted 1 to 1000"):
        make_any_steps_fn(model, sampler="ddim", max_steps=2000)
    fn = counted().fn
    for num_steps in (0, 10):
        with pytest.raises(InputError, match=f"got {num_steps}, wanted 1 to 9"):
            fn(params, image_keys([0]), labels(0), num_steps)
    with pytest.raises(InputError, match=r"cond\.label: got 11"):
        fn(params, image_keys([0]), labels(11), 3)
