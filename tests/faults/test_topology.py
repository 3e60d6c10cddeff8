"""Real networks: losses do not depend on the number of devices or the layout."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from ldm_jax.config import ParallelConfig
from ldm_jax.parallel.make_layout import FsdpLayout, PmapLayout, make_layout
from ldm_jax.rng import root_key
from tests.proofs.test_adversary import RATE, distance, make_config, present, run
from tests.training.test_conditions import batch_of, moved, stage_of, train
from tests.training.test_training import CONFIG, batches, stage

STEPS = 20


def losses(name, parallel, devices):
    config = dataclasses.replace(CONFIG, parallel=parallel)
    layout = make_layout(parallel, jax.devices()[:devices])
    built = stage(name, config)
    state, frozen = layout.init(built.init), layout.place(built.frozen)
    key, mapped = layout.place(root_key(config.seed)), layout.map_step(built.step)
    rows = []
    for batch in batches(STEPS, layout):
        state, metrics = mapped(state, frozen, layout.split(batch), key)
        found = jax.device_get(layout.local(metrics))
        rows.append((found.loss, found.gradient_norm))
    return np.asarray(rows).T


@functools.cache
def losses_on_one_device(name):
    return losses(name, ParallelConfig(), 1)


@pytest.mark.parametrize(
    ("layout", "devices", "accumulate"),
    [("pmap", 8, 1), ("pmap", 2, 4), ("fsdp", 4, 2)],
)
@pytest.mark.parametrize("name", ["autoencoder", "diffusion"])
def test_losses_do_not_depend_on_devices_layout_or_accumulation(
    name, layout, devices, accumulate
):
    parallel = ParallelConfig(layout=layout, accumulate=accumulate)
    loss, norm = losses(name, parallel, devices)
    one_loss, one_norm = losses_on_one_device(name)
    assert np.abs(loss / one_loss - 1.0).max() < 1e-5
    assert np.abs(norm / one_norm - 1.0).max() < 1e-4


@pytest.mark.parametrize("regularizer", ["kl", "vq"])
def test_autoencoder_and_discriminator_updates_do_not_depend_on_devices(regularizer):
    config = make_config(regularizer)
    states, one = run(config, 1, 4, RATE)
    for devices, layout in ((8, PmapLayout), (4, FsdpLayout)):
        others, many = run(config, devices, 4, RATE, layout)
        for a, b in zip(one, many, strict=True):
            assert present(a) == pytest.approx(present(b), rel=1e-4, abs=1e-6)
            assert a.loss == pytest.approx(b.loss, rel=1e-5)
        for i in range(4):
            for params_of in (lambda s: s.params, lambda s: s.critic.params):
                before, after = params_of(states[i]), params_of(states[i + 1])
                error = distance(after, params_of(others[i + 1]))
                assert error <= 1e-4 * distance(after, before)


def test_a_text_encoder_trains_with_the_unet_on_one_and_four_devices():
    config, stage, state = stage_of("text", condition_dropout=0.5)
    batch = batch_of(config)
    one, first = train(stage, state, batch, devices=1, steps=3)
    _, many = train(stage, state, batch, devices=4, steps=3)
    assert many == pytest.approx(first, rel=1e-5)
    before, after = (s.params.conditioner["encoder"] for s in (state, one))
    assert moved(before["layer_0"]["attention"], after["layer_0"]["attention"])
    assert moved(before["norm_out"], one.ema.conditioner["encoder"]["norm_out"])
