"""A run with exact sums ends in one digest on any number of devices and processes."""

import dataclasses
import json
import socket

import jax
import numpy as np
import pytest

from ldm_jax.build import open_iterator
from ldm_jax.parallel.make_layout import PmapLayout
from ldm_jax.rng import root_key
from ldm_jax.training.prefetch import Prefetch
from tests.parallel.test_exact import exact_layout, stage_of, with_adversary
from tests.support.commands import LDM, TINY, ldm, start, succeeded, train
from tests.support.tiny import get_config

# Several steps a dispatch need rare logs.
FLAGS = (
    *("--parallel.reduction", "exact", "--checkpoint.every", 4),
    *("--log.every", 4, "--log.images-every", 8),
)


def digests(workdir):
    return json.loads((workdir / "final.json").read_text())["digest_by_stage"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The digests of the run on one device."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    succeeded(train(workdir, *FLAGS))
    return digests(workdir)


@pytest.mark.parametrize(("devices", "steps"), [(8, 1), (2, 4)])
def test_one_digest_on_any_number_of_devices(devices, steps, alone, tmp_path):
    flags = (*FLAGS, "--parallel.steps-per-dispatch", steps)
    succeeded(train(tmp_path / "run", *flags, devices=devices))
    assert digests(tmp_path / "run") == alone


def test_a_run_on_eight_devices_goes_on_with_two(alone, tmp_path):
    run = tmp_path / "run"
    succeeded(train(run, *FLAGS, "--diffusion.steps", 4, devices=8))
    succeeded(train(run, *FLAGS, "--change", "diffusion.steps=8", devices=2))
    assert digests(run) == alone


def test_two_processes_have_the_digest_of_one(alone, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    join = ("--coordinator", f"localhost:{port}", "--num-processes", 2)
    args = (*LDM, "train", "--config", TINY, "--workdir", tmp_path / "run", *FLAGS)
    processes = [start(*args, *join, "--process-id", i, devices=2) for i in range(2)]
    found = [(*process.communicate(), process.returncode) for process in processes]
    assert [code for _, _, code in found] == [0, 0], found
    assert digests(tmp_path / "run") == alone


def test_the_first_steps_of_the_digits_have_one_digest(tmp_path):
    steps = ("--autoencoder.steps", 50, "--diffusion.steps", 50)
    flags = ("--config", "digits", "--parallel.reduction", "exact", *steps)
    for devices in (1, 2, 8):
        workdir = tmp_path / f"{devices}"
        succeeded(ldm("train", *flags, "--workdir", workdir, devices=devices))
    one, two, eight = (digests(tmp_path / f"{devices}") for devices in (1, 2, 8))
    assert one == two == eight


def test_an_adversary_has_one_state_on_any_number_of_devices():
    config = with_adversary(
        sync_batch_norm=False, start_step=1, ramp_steps=2, channels=8, num_layers=1
    )
    data = dataclasses.replace(config.data, image_size=16)
    config, found = dataclasses.replace(config, data=data), []
    stage = stage_of("autoencoder", config)
    for devices in (1, 2, 8):
        layout = exact_layout(devices)
        batches = open_iterator(config, batch_size=stage.batch_size, layout=layout)
        prefetch = Prefetch(batches, layout)
        state, key = layout.init(stage.init), layout.place(root_key(0))
        step = layout.map_step(layout.alike(stage.step))
        for left in (3, 2, 1, 0):
            batch, _ = prefetch.take(1, then=min(left, 1))
            state, metrics = step(state, None, batch, key)
        batches.close()
        found.append(jax.tree.map(np.asarray, (layout.local(state), metrics.loss[0])))
        assert 0.0 < metrics.adaptive_weight[0] and metrics.adversary_factor[0] == 1.0
    for other in found[1:]:
        assert jax.tree.all(jax.tree.map(np.array_equal, found[0], other))


@pytest.mark.parametrize("name", ["autoencoder", "diffusion"])
def test_an_exact_step_is_a_plain_one_but_for_its_rounding(name):
    config, found = get_config(), []
    stage = stage_of(name, config)
    for layout in (exact_layout(1), PmapLayout(jax.devices()[:1])):
        batches = open_iterator(config, batch_size=stage.batch_size, layout=layout)
        batch, _ = Prefetch(batches, layout).take(1, then=0)
        batches.close()
        state, frozen = layout.init(stage.init), layout.place(stage.frozen)
        step = layout.map_step(layout.alike(stage.step))
        state, metrics = step(state, frozen, batch, layout.place(root_key(0)))
        found.append(jax.tree.map(np.asarray, (layout.local(state).opt_state, metrics)))
    # The moments of the first step are its gradient and the square.
    for exact, plain in zip(*map(jax.tree.leaves, found), strict=True):
        assert np.allclose(exact, plain, rtol=1e-3, atol=1e-5)
