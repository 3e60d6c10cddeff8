"""Post-hoc EMA: averages of any relative length from the snapshots of a few."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ldm_jax.cli.sample import parse_sample
from ldm_jax.config import DiffusionConfig
from ldm_jax.files import write_record
from ldm_jax.pretrained.posthoc_ema import make_average
from ldm_jax.pretrained.tensors import open_tensors
from ldm_jax.sampling.metadata import read_settings, settings_text
from ldm_jax.training.ema import (
    Profile,
    list_snapshots,
    mixture,
    power_of,
    share_of_new,
    snapshot_steps,
    write_snapshot,
)
from ldm_jax.training.state import Optimizer, apply_gradients, init_state
from ldm_jax.types import InputError, Preempted
from tests.parallel.test_layouts import FSDP, StopAfter
from tests.support.commands import write_run
from tests.support.tiny import get_config
from tests.support.toys import run_toy, toy_stage, toy_state, toy_step

KEPT = (0.05, 0.1)


@pytest.mark.parametrize(("length", "power"), [(0.05, 16.97), (0.1, 6.94)])
def test_a_relative_length_is_the_deviation_of_its_profile(length, power):
    found = power_of(length)
    assert found == pytest.approx(power, abs=5e-3)  # as the paper has them
    t = (np.arange(200_000) + 0.5) / 200_000
    profile = (found + 1.0) * t**found
    mean = (t * profile).mean()
    assert np.sqrt(((t - mean) ** 2 * profile).mean()) == pytest.approx(length, 1e-4)


@pytest.mark.parametrize("length", [0.0, 0.3, -0.1])
def test_a_length_out_of_range_is_a_value_error(length):
    with pytest.raises(ValueError, match=r"wanted above 0, at most 0\.28"):
        power_of(length)


@functools.cache
def walk(num_steps=600):
    """Return noisy parameters that change fast at first, then slowly."""
    random = np.random.default_rng(0)
    steps = np.arange(1, num_steps + 1)[:, None]
    drift = 1.0 - np.exp(-steps / np.asarray([[5.0, 30.0, 100.0, 1e4]]))
    return drift + 0.05 * random.normal(size=drift.shape)


def averages_of(length, num_steps=600):
    """Track an average step by step, as training does, in float32."""
    shares = jax.jit(jax.vmap(functools.partial(share_of_new, length=length)))
    all_shares = np.asarray(shares(jnp.arange(1, num_steps + 1)))
    average, found = np.full(4, 7.0), []  # the initial value has no weight
    for share, params in zip(all_shares, walk(num_steps), strict=True):
        average = average + share * (params - average)
        found.append(average)
    return np.stack(found)


def test_tracked_averages_follow_their_power_profile():
    steps, power = np.arange(0, 601), power_of(0.07) + 1.0
    masses = np.diff((steps / 600) ** power)
    wanted = masses @ walk()
    assert averages_of(0.07)[-1] == pytest.approx(wanted, rel=1e-5)
    # Late in training a share is far below the float32 resolution of 1 - 1 / t.
    late = share_of_new(jnp.asarray(3_000_000), length=0.07)
    assert float(late) == pytest.approx(power / 3e6, rel=1e-5)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A folder of snapshots of two averages."""
    folder = tmp_path_factory.mktemp("kept") / "averages"
    tracked = [averages_of(length) for length in KEPT]
    for step in snapshot_steps(600, snapshots=16):
        trees = tuple({"w": one[step - 1].astype(np.float32)} for one in tracked)
        write_snapshot(folder, KEPT, trees, step)
    return folder


def test_averages_are_compared_with_the_record_of_their_run(kept, tmp_path):
    run, folder = tmp_path, tmp_path / "diffusion/averages"
    write_record(run, {"configs": [], "data": None, "files": {}, "stages": {}})
    folder.parent.mkdir()
    for step in (300, 600):
        trees = tuple({"w": np.full(4, step, np.float32)} for _ in KEPT)
        write_snapshot(folder, KEPT, trees, step, run=run)
    post_hoc(folder, 0.1, run=run)
    older, newer = sorted(folder.iterdir())
    newer.write_bytes(older.read_bytes())  # intact by itself, and of another step
    with pytest.raises(InputError, match=r"000600\.safetensors: got .*moving the file"):
        post_hoc(folder, 0.1, run=run)


def post_hoc(folder, length, step=None, **fields):
    shapes = {"w": jax.ShapeDtypeStruct((4,), jnp.float32)}
    given = {"lengths": KEPT, "newest": 600, **fields}
    return make_average(folder, shapes, length=length, step=step, **given)


@pytest.mark.parametrize("length", [0.03, 0.05, 0.07, 0.1, 0.15, 0.2])
def test_a_post_hoc_average_is_the_one_tracked_in_training(kept, length):
    for step in (None, 375):
        found = post_hoc(kept, length, step)
        direct = averages_of(length)[(step or 600) - 1]
        assert found.step == (step or 600)
        assert found.mixture.weights.sum() == pytest.approx(1.0)
        # Cauchy-Schwarz: the profiles' difference times the spread of the parameters.
        steps, power = np.arange(found.step + 1), power_of(length) + 1.0
        profile = np.linalg.norm(np.diff((steps / found.step) ** power))
        most = np.linalg.norm(walk()[: found.step] - direct, axis=0) * profile
        error = np.abs(found.tree["w"] - direct)
        assert (error < 3e-6 + most * found.mixture.error).all()
        if length in KEPT:
            assert found.mixture.error < 1e-9
        # The average of another length differs clearly.
        other = np.abs(found.tree["w"] - averages_of(0.28)[found.step - 1])
        assert other.max() > 10 * error.max()


def test_a_mixture_keeps_constant_parameters():
    profiles = [Profile(one, at) for at in (200, 400, 600) for one in KEPT]
    for length in (0.01, 0.04, 0.28):
        assert mixture(profiles, Profile(length, 600)).weights.sum() == pytest.approx(1)


def test_a_mixture_of_a_million_steps_is_accurate():
    profiles = [
        Profile(one, at)
        for at in snapshot_steps(1_000_000, snapshots=16)
        for one in KEPT
    ]
    found = mixture(profiles, Profile(0.07, 1_000_000))
    assert found.error < 0.005


def test_an_average_out_of_reach_of_the_snapshots_is_an_input_error(kept, tmp_path):
    with pytest.raises(InputError, match=r"got 0\.005, but the nearest .* % off"):
        post_hoc(kept, 0.005)
    with pytest.raises(InputError, match=r"no averages of step 100 .* there: 38, 75"):
        post_hoc(kept, 0.07, 100)
    with pytest.raises(InputError, match="there: none yet"):
        post_hoc(tmp_path, 0.07)
    assert (
        post_hoc(kept, 0.07, newest=580).step == 562
    )  # later snapshots are of a killed run
    with pytest.raises(InputError, match="missing"):
        post_hoc(kept, 0.07, lengths=(0.05, 0.2))


def test_a_damaged_snapshot_is_refused_by_name(kept, tmp_path):
    for path in kept.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / "000600.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"000600\.safetensors: 0\.\d+/w is damaged"):
        post_hoc(tmp_path, 0.07)
    path.unlink()
    assert post_hoc(tmp_path, 0.07).step == 562


def test_an_update_follows_the_profile_of_every_average():
    optimizer = Optimizer(optax.sgd(1.0), ema_decay=0.9, average_lengths=KEPT)
    state = init_state({"w": jnp.asarray(0.0)}, optimizer)
    weights = []
    for n in range(1, 30):
        state = apply_gradients(state, {"w": jnp.asarray(-1.0)}, optimizer)
        weights.append(float(n))
        for length, average in zip(KEPT, state.averages, strict=True):
            masses = np.diff((np.arange(n + 1) / n) ** (power_of(length) + 1.0))
            assert average["w"] == pytest.approx(masses @ weights, rel=1e-5)


def averaged_step(state, frozen, batch, root, *, reduce):
    after, metrics = toy_step(state, frozen, batch, root, reduce=reduce)
    averages = tuple(
        optax.incremental_update(
            after.params, old, share_of_new(after.step, length=length)
        )
        for old, length in zip(state.averages, KEPT, strict=True)
    )
    return after._replace(averages=averages), metrics


def averaged_state():
    state = toy_state()
    copies = tuple(jax.tree.map(jnp.copy, state.params) for _ in KEPT)
    return state._replace(averages=copies)


def averaged_toy(folder):
    def keep(averages, step):
        write_snapshot(folder, KEPT, averages, step)

    return toy_stage()._replace(
        step=averaged_step,
        init=averaged_state,
        write_averages=keep,
        average_steps=tuple(snapshot_steps(12, snapshots=5)),
    )


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_snapshots_do_not_depend_on_interruptions_or_the_layout(
    tmp_path,
):
    one = jax.devices()[:1]
    unbroken = run_toy(tmp_path / "a", averaged_toy(tmp_path / "whole"), devices=one)
    whole = files(tmp_path / "whole")
    assert list_snapshots(tmp_path / "whole") == [2, 5, 7, 10, 12] and len(whole) == 5
    cut = averaged_toy(tmp_path / "cut")
    for dispatches in (3, 4):
        with pytest.raises(Preempted):
            run_toy(tmp_path / "b", cut, devices=one, stop=StopAfter(dispatches))
    assert list_snapshots(tmp_path / "cut") == [2, 5, 7]
    found = run_toy(tmp_path / "b", cut, devices=one)
    assert found.digest == unbroken.digest
    assert files(tmp_path / "cut") == whole
    spread = averaged_toy(tmp_path / "spread")
    run_toy(tmp_path / "c", spread, parallel=FSDP, devices=jax.devices()[:4])
    for name in whole:
        here, there = (
            open_tensors(tmp_path / where / name) for where in ("whole", "spread")
        )
        assert list(here) == list(there)
        for key in here:
            np.testing.assert_allclose(here[key], there[key], rtol=1e-6)


def test_snapshots_are_even_and_end_with_the_last_step():
    assert snapshot_steps(1350, snapshots=4) == [338, 675, 1012, 1350]
    assert snapshot_steps(3, snapshots=16) == [1, 2, 3]


@pytest.mark.parametrize("lengths", [(0.0,), (0.29,), (0.1, 0.1)])
def test_average_lengths_out_of_range_are_input_errors(lengths):
    with pytest.raises(InputError, match=r"average_lengths: got .*wanted each above 0"):
        DiffusionConfig(average_lengths=lengths)


def test_ema_length_is_refused_for_a_run_without_averages(tmp_path):
    workdir = write_run(get_config(), tmp_path / "run")
    with pytest.raises(InputError, match="the run kept no averages"):
        parse_sample([f"--workdir={workdir}", "--ema-length=0.1"])


def test_metadata_without_ema_length_reads_back(tmp_path):
    workdir = write_run(get_config(), tmp_path / "run")
    settings = parse_sample([f"--workdir={workdir}"]).settings
    text = settings_text(settings)
    assert "ema_length" not in json.loads(text)
    assert read_settings(text) == settings
    longer = dataclasses.replace(settings, ema_length=0.1)
    assert read_settings(settings_text(longer)) == longer
