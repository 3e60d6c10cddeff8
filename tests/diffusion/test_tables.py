"""Tables of samplers, padded to the one shape that a program takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion.guidance import unguided
from ldm_jax.diffusion.sampling import sample
from ldm_jax.diffusion.solvers import make_table
from ldm_jax.diffusion.tables import pad
from ldm_jax.diffusion.timesteps import make_levels
from ldm_jax.rng import image_keys
from ldm_jax.types import SAMPLER_NAMES
from tests.support.compiling import AS_SHIPPED
from tests.support.gaussian import SCHEDULES

MAX_STEPS = 12


def table_of(sampler, num_steps, schedule="ldm_linear"):
    levels = make_levels(SCHEDULES[schedule], num_steps)
    return make_table(sampler, levels, prediction="v")


@pytest.mark.parametrize("schedule", ["ldm_linear", "zero_snr"])
def test_padded_tables_have_one_shape(schedule):
    shapes = set()
    for sampler in SAMPLER_NAMES:
        for num_steps in range(1, MAX_STEPS + 1):
            table = table_of(sampler, num_steps, schedule)
            padded = pad(table, max_steps=MAX_STEPS)
            shapes.add(tuple(leaf.shape for leaf in jax.tree.leaves(padded)))
            assert padded.live.sum() == padded.live[: table.num_calls].sum()
            assert padded.live.sum() == table.num_calls
            mix = padded.table.mix[padded.live]
            kept = mix[:, : table.num_registers, : table.num_terms]
            assert np.array_equal(kept, table.mix)
            assert np.count_nonzero(mix) == np.count_nonzero(table.mix)
            assert all(np.isfinite(x).all() for x in (mix, padded.table.read))
    assert len(shapes) == 1


def test_pad_refuses_a_table_that_is_too_long():
    with pytest.raises(ValueError, match="got 6 network calls, wanted at most 4"):
        pad(table_of("ddim", 6), max_steps=2)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "plms", "dpmpp_2m", "unipc"])
def test_padding_calls_run_no_network_and_change_nothing(sampler):
    table, network_calls = table_of(sampler, 3), []

    def denoise(x_t, t, cond):
        jax.debug.callback(lambda: network_calls.append(1))
        return jnp.tanh(x_t) * (1.0 + t[:, None, None, None] / 1000.0)

    keys = image_keys([1, 2])
    x_start = jax.random.normal(jax.random.key(0), (2, 3, 3, 2))

    def samples_of(table):
        # Jitted: run op by op, there would be no branches to compare.
        x_0 = jax.jit(
            lambda x: sample(unguided(denoise), x, keys, None, table=table).x_0,
            compiler_options=AS_SHIPPED,
        )(x_start)
        jax.effects_barrier()
        return np.asarray(x_0)

    plain, num_calls = samples_of(table), len(network_calls)
    padded = samples_of(pad(table, max_steps=40))
    assert num_calls == table.num_calls and len(network_calls) == 2 * num_calls
    # Equal weights; a branch is compiled separately and may round differently.
    assert padded == pytest.approx(plain, abs=1e-6)
