"""Steps with exact sums give one state on any number of devices."""

import dataclasses

import jax
import numpy as np
import pytest

from ldm_jax.build import open_iterator
from ldm_jax.parallel.make_layout import FsdpLayout, PmapLayout
from ldm_jax.rng import root_key
from ldm_jax.training.prefetch import Prefetch
from tests.parallel.test_exact import (
    exact_layout,
    stage_of,
    with_adversary,
    with_optimizer,
)
from tests.support.commands import digests, ldm, succeeded
from tests.support.tiny import get_config


def test_the_first_steps_of_the_digits_have_one_digest(tmp_path):
    steps = ("--autoencoder.steps", 50, "--diffusion.steps", 50)
    for shards, devices in ((2, (1, 2)), (8, (1, 2, 8))):
        found = []
        for num in devices:
            workdir = tmp_path / f"{shards} {num}"
            flags = ("--config", "digits", "--parallel.shards", shards, *steps)
            succeeded(ldm("train", *flags, "--workdir", workdir, devices=num))
            found.append(digests(workdir))
        assert all(digest == found[0] for digest in found)


def state_after(stage, config, layout, *, steps):
    """Return the state and the metrics after some steps, on the host."""
    batches = open_iterator(config, batch_size=stage.batch_size, layout=layout)
    prefetch, key = Prefetch(batches, layout), layout.place(root_key(0))
    state, frozen = layout.init(stage.init), layout.place(stage.frozen)
    step = layout.map_step(layout.alike(stage.step))
    for left in reversed(range(steps)):
        batch, _ = prefetch.take(1, then=min(left, 1))
        state, metrics = step(state, frozen, batch, key)
        jax.block_until_ready(state)  # emulated devices share threads
    batches.close()
    return jax.tree.map(np.asarray, (layout.local(state), layout.local(metrics)))


LAYOUTS = [(1, PmapLayout), (2, PmapLayout), (8, PmapLayout), (2, FsdpLayout)]


def test_an_adversary_has_one_state_on_any_number_of_devices():
    config = with_adversary(
        sync_batch_norm=False, start_step=1, ramp_steps=2, channels=8, num_layers=1
    )
    data = dataclasses.replace(config.data, image_size=16)
    config, found = dataclasses.replace(config, data=data), []
    stage = stage_of("autoencoder", config)
    for devices, layout in LAYOUTS:
        layout = exact_layout(devices, layout)
        found.append(state_after(stage, config, layout, steps=4))
        _, metrics = found[-1]
        assert 0.0 < metrics.adaptive_weight and metrics.adversary_factor == 1.0
    for other in found[1:]:
        assert jax.tree.all(jax.tree.map(np.array_equal, found[0], other))


def test_muon_has_one_state_on_any_number_of_devices():
    diffusion = dataclasses.replace(get_config().diffusion, channels=64, num_groups=8)
    config = dataclasses.replace(get_config(), diffusion=diffusion)
    config, found = with_optimizer(config, algorithm="muon", clip_norm=0.1), []
    stage = stage_of("diffusion", config)
    for devices, layout in LAYOUTS:
        layout = exact_layout(devices, layout)
        found.append(state_after(stage, config, layout, steps=3))
    for other in found[1:]:
        assert jax.tree.all(jax.tree.map(np.array_equal, found[0], other))


@pytest.mark.parametrize("name", ["autoencoder", "diffusion"])
def test_an_exact_step_is_a_plain_one_but_for_its_rounding(name):
    config, found = get_config(), []
    stage = stage_of(name, config)
    for layout in (exact_layout(1), PmapLayout(jax.devices()[:1])):
        state, metrics = state_after(stage, config, layout, steps=1)
        found.append((state.opt_state, metrics))
    # The moments of the first step are its gradient and the square.
    for exact, plain in zip(*map(jax.tree.leaves, found), strict=True):
        assert np.allclose(exact, plain, rtol=1e-3, atol=1e-5)
