import json
import os
import signal
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import PartitionSpec

from ldm_jax.config import CheckpointConfig, LogConfig, ParallelConfig
from ldm_jax.data.pipeline import Batch
from ldm_jax.parallel.fsdp import AXES, FsdpLayout, make_mesh, spec_of
from ldm_jax.parallel.make_layout import PmapLayout
from ldm_jax.parallel.multihost import StopSignal, stop_signal
from ldm_jax.parallel.reduce import mean_over_parts
from ldm_jax.training.checkpoint import CheckpointStore
from ldm_jax.training.digest import LANES, leaf_digests
from ldm_jax.training.loop import LoopConfig, dispatch_size
from ldm_jax.training.profiling import Profile
from ldm_jax.types import InputError, Preempted, RunError
from tests.support.toys import run_toy, toy_stage

DEVICES = jax.devices()
FSDP = ParallelConfig(layout="fsdp")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The digest of a run on one device, and its log."""
    workdir = tmp_path_factory.mktemp("unbroken")
    found = run_toy(workdir, toy_stage(), devices=DEVICES[:1])
    return found.digest, rows(workdir)


def rows(workdir):
    return logged(workdir, "loss")


def logged(workdir, name):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [(row["step"], row[name]) for row in map(json.loads, lines)]


# Random draws and the order of the data are equal bits on every layout.


@pytest.mark.parametrize(
    ("layout", "devices", "accumulate", "steps_per_dispatch"),
    [
        ("pmap", 2, 1, 1),
        ("pmap", 8, 1, 1),
        ("pmap", 2, 4, 1),
        ("pmap", 4, 2, 3),
        ("fsdp", 1, 1, 1),
        ("fsdp", 4, 2, 1),
        ("fsdp", 8, 1, 3),
    ],
)
def test_the_digest_does_not_depend_on_layout_devices_or_accumulation(
    tmp_path, unbroken, layout, devices, accumulate, steps_per_dispatch
):
    found = run_toy(
        tmp_path,
        toy_stage(),
        parallel=ParallelConfig(
            layout=layout,
            accumulate=accumulate,
            steps_per_dispatch=steps_per_dispatch,
        ),
        devices=DEVICES[:devices],
    )
    assert found.digest == unbroken[0]
    assert rows(tmp_path) == unbroken[1]


class StopAfter(StopSignal):
    """A stop signal that arrives after some dispatches."""

    def __init__(self, dispatches):
        super().__init__()
        self._left = dispatches

    def agreed(self):
        self._left -= 1
        return self._left < 0


@pytest.mark.parametrize("dispatches", [1, 2, 3, 5])
def test_a_preempted_run_resumes_on_another_layout(tmp_path, unbroken, dispatches):
    with pytest.raises(Preempted, match="is saved"):
        run_toy(
            tmp_path,
            toy_stage(),
            parallel=ParallelConfig(steps_per_dispatch=2),
            stop=StopAfter(dispatches),
        )
    found = run_toy(tmp_path, toy_stage(), parallel=FSDP, devices=DEVICES[:4])
    assert found.digest == unbroken[0]
    assert rows(tmp_path) == unbroken[1]


def test_a_checkpoint_of_eight_devices_restores_on_fewer(tmp_path, unbroken):
    with pytest.raises(Preempted):
        run_toy(tmp_path, toy_stage(), parallel=FSDP, stop=StopAfter(6))
    for parallel, devices in ((None, 4), (FSDP, 2)):
        with pytest.raises(Preempted):
            run_toy(
                tmp_path,
                toy_stage(),
                parallel=parallel,
                devices=DEVICES[:devices],
                stop=StopAfter(1),
            )
    found = run_toy(tmp_path, toy_stage(), devices=DEVICES[:1])
    assert found.digest == unbroken[0]


def test_dispatches_end_at_every_due_step(tmp_path):
    loop_config = LoopConfig(
        tmp_path,
        CheckpointConfig(every=7),
        LogConfig(every=5, images_every=12),
        ParallelConfig(steps_per_dispatch=3),
    )
    done, ends = 0, [0]
    while done < 40:
        size = dispatch_size(done, num_steps=40, loop_config=loop_config)
        assert size in (1, 3)
        done += size
        ends.append(done)
    assert done == 40
    assert {n for n in range(41) if n % 7 == 0 or n % 5 == 0 or n % 12 == 0} <= set(
        ends
    )


PROGRAM = {"pmap": "jit(_fun)", "fsdp": "jit(whole)"}
"""JAX's name of a layout's mapped step."""


@pytest.mark.parametrize("steps_per_dispatch", [1, 2])
@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("layout", PROGRAM)
def test_a_fresh_run_compiles_its_step_once(
    layout, devices, steps_per_dispatch, tmp_path, lowered, compiled
):
    # Compiled by shapes while the state is made, and used by the first dispatch.
    parallel = ParallelConfig(layout=layout, steps_per_dispatch=steps_per_dispatch)
    run_toy(tmp_path, toy_stage(), parallel=parallel, devices=DEVICES[:devices])
    for programs in (lowered, compiled):
        names = [program["fun_name"] for program in programs]
        assert names.count(PROGRAM[layout]) == 1, names


# The state is donated, sharded, and held once.


@pytest.mark.parametrize("kind", [PmapLayout, FsdpLayout])
def test_a_layout_holds_its_share_of_the_state_once(kind):
    layout, stage = kind(DEVICES[:4]), toy_stage()
    shapes = jax.eval_shape(stage.init)
    batch = layout_batch(layout, stage)
    state = layout.init(stage.init)
    key = layout.place(jax.random.key(0))
    mapped = layout.map_step(stage.step)
    memory = mapped.lower(state, None, batch, key).compile().memory_analysis()
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    share = whole if kind is PmapLayout else whole / 4
    assert memory.alias_size_in_bytes == pytest.approx(share, rel=0.01)
    after, _ = mapped(state, None, batch, key)
    kept = (state.params, state.ema)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(kept))
    del after


def layout_batch(layout, stage):
    batch = Batch(
        image=np.zeros((stage.batch_size, 8, 8, 1), np.uint8),
        label=np.zeros(stage.batch_size, np.int32),
        example_index=np.arange(stage.batch_size, dtype=np.uint32),
    )
    return layout.split(batch)


def test_leaves_are_sharded_over_axes_that_divide():
    mesh = make_mesh(DEVICES)
    assert dict(mesh.shape) == {"rows": 4, "columns": 2}
    assert spec_of((3, 3, 64, 128), mesh) == PartitionSpec(None, None, None, AXES)
    assert spec_of((3, 3, 132, 1002), mesh) == PartitionSpec(
        None, None, "rows", "columns"
    )
    assert spec_of((3, 3, 129, 30), mesh) == PartitionSpec(None, None, None, "columns")
    assert spec_of((63, 65), mesh) == PartitionSpec()
    assert spec_of((128,), mesh) == PartitionSpec()


def test_the_mean_over_parts_is_the_mean_over_the_batch():
    batch = {"x": jnp.arange(24.0).reshape(12, 2), "n": jnp.arange(12)}
    whole = batch["x"].mean()
    for parts in (1, 2, 3, 4):
        seen = mean_over_parts(lambda b: b["x"].mean(), batch, parts=parts)
        assert seen == pytest.approx(whole)


# Digests.


def numpy_digest(array):
    """Compute the formula of a digest in NumPy, with 64-bit integers."""

    def mix(x):
        x = np.asarray(x, np.uint64)
        x ^= x >> np.uint64(16)
        x = x * np.uint64(0x85EBCA6B) & np.uint64(0xFFFFFFFF)
        x ^= x >> np.uint64(13)
        x = x * np.uint64(0xC2B2AE35) & np.uint64(0xFFFFFFFF)
        return x ^ x >> np.uint64(16)

    words = np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}").ravel()
    place = mix(np.arange(words.size))
    sums = [int(mix(words ^ mix(place ^ np.uint64(n))).sum()) % 2**32 for n in LANES]
    return "".join(f"{n:08x}" for n in sums)


@pytest.mark.parametrize("dtype", ["float32", "int32", "uint8", "float16"])
def test_a_leaf_digest_does_not_depend_on_the_sharding(dtype):
    array = np.random.RandomState(0).randn(64, 128).astype(dtype)
    layout = FsdpLayout(DEVICES)
    (cut,) = leaf_digests(layout.place([array])).values()
    (whole,) = leaf_digests([array]).values()
    assert cut.digest == whole.digest == numpy_digest(array)


def test_a_leaf_digest_changes_with_a_bit_an_order_and_a_sign_of_zero():
    array = np.random.RandomState(0).randn(999).astype(np.float32)
    (before,) = leaf_digests([array]).values()
    for bit in range(32):
        flipped = array.copy()
        flipped.view(np.uint32)[bit * 30] ^= np.uint32(1 << bit)
        (after,) = leaf_digests([flipped]).values()
        assert after.digest != before.digest
    swapped = array.copy()
    swapped[[3, 4]] = swapped[[4, 3]]
    assert leaf_digests([swapped]) != leaf_digests([array])
    assert leaf_digests([np.zeros(2)]) != leaf_digests([-np.zeros(2)])


# Failures.


def test_non_finite_steps_are_skipped_up_to_the_limit(tmp_path):
    stage = toy_stage(nan_at=(2, 5))
    with pytest.raises(RunError, match=r"diffusion step 6: loss = nan.*after 1 that"):
        run_toy(tmp_path, stage, max_skipped=1)
    found = run_toy(tmp_path / "more", stage, max_skipped=2)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found.ema))
    lines = (tmp_path / "more" / "not_finite.jsonl").read_text().splitlines()
    skipped = [json.loads(line) for line in lines]
    assert [row["step"] for row in skipped] == [3, 6]
    assert skipped[0]["example_index"] == [list(range(16, 24))]


def test_a_skipped_step_changes_only_the_step_count(tmp_path):
    def until(num_steps, nan_at):
        stage = toy_stage(num_steps=num_steps, nan_at=nan_at)
        return run_toy(tmp_path / f"{num_steps}{nan_at}", stage, max_skipped=1).ema

    before, after = until(4, ()), until(5, (4,))
    same = jax.tree.map(np.array_equal, before, after)
    assert all(jax.tree.leaves(same))


def test_a_skipped_step_does_not_change_the_logged_learning_rate(tmp_path):
    stage = toy_stage(nan_at=(4,))._replace(learning_rate=float)
    run_toy(tmp_path, stage, max_skipped=1)
    rates = {step: rate for step, rate in logged(tmp_path, "learning_rate")}
    assert rates[4] == 3.0 and rates[12] == 10.0  # eleven updates: 0 to 10


def test_a_save_does_not_poll_the_stop_signal(tmp_path, monkeypatch):
    """A poll by Orbax would disturb the agreement of processes on a stop step."""

    def polled(*args):
        raise AssertionError("asked")

    monkeypatch.setattr(ocp.checkpoint_manager.utils, "reached_preemption", polled)
    store = CheckpointStore(tmp_path / "c", keep=2)
    store.save(1, {"w": jnp.ones(8)}, {})
    store.wait()
    assert store.restore(jax.eval_shape(lambda: {"w": jnp.ones(8)})).step == 1
    store.close()


def test_at_once_raises_preempted_in_the_body():
    with stop_signal() as stop, pytest.raises(Preempted, match="nothing yet"):
        with stop.at_once("nothing yet"):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)
    with pytest.raises(Preempted, match="nor now"), stop.at_once("nor now"):
        pass
    with stop_signal() as stop:
        with stop.at_once("done"):
            pass
        os.kill(os.getpid(), signal.SIGTERM)  # recorded, and polled between steps
        assert stop.agreed()


def test_a_checkpoint_of_another_model_is_an_input_error(tmp_path):
    store = CheckpointStore(tmp_path / "c", keep=2)
    store.save(1, {"w": jnp.zeros((4, 4))}, {})
    store.wait()
    target = jax.eval_shape(lambda: {"w": jnp.zeros((4, 8))})
    with pytest.raises(InputError, match=r"'w'\] is \(4, 4\) there, \(4, 8\) here"):
        store.restore(target)
    store.close()
    assert (tmp_path / "c" / "1").is_dir()


def test_a_checkpoint_store_refuses_a_file(tmp_path):
    (tmp_path / "c").write_text("")
    with pytest.raises(InputError, match="a file, wanted a folder"):
        CheckpointStore(tmp_path / "c", keep=2)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_failed_save_is_reported_and_keeps_the_checkpoint_before(
    tmp_path, monkeypatch
):
    store = CheckpointStore(tmp_path / "c", keep=2)
    store.save(1, {"w": jnp.ones(8)}, {})
    store.wait()

    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ocp.CheckpointManager, "save", full)
    with pytest.raises(RunError, match=r"step 2 could not be written .*No space left"):
        store.save(2, {"w": jnp.ones(8)}, {})
    monkeypatch.undo()
    found = store.restore(jax.eval_shape(lambda: {"w": jnp.ones(8)}))
    assert found.step == 1
    store.close()


@pytest.mark.parametrize("dispatch", [1, 4, 20])
def test_a_profile_covers_the_dispatches_of_its_steps(dispatch, monkeypatch):
    traced, tracing = [], []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *_, **__: tracing.append(1))
    monkeypatch.setattr(jax.profiler, "stop_trace", tracing.clear)
    profile = Profile(Path(), (10, 15))
    for done in range(0, 40, dispatch):
        profile.before(done, dispatch)
        if tracing:
            traced += range(done, done + dispatch)
    assert set(range(10, 15)) <= set(traced)
    assert len(traced) < 5 + 2 * dispatch


def test_a_profile_writes_perfetto_and_xplane_files(tmp_path):
    profile = Profile(tmp_path, (1, 2))
    for done in range(3):
        profile.before(done, 1)
        jnp.arange(3.0).sum().block_until_ready()
    profile.close()
    assert list(tmp_path.rglob("perfetto_trace.json.gz"))
    assert list(tmp_path.rglob("*.xplane.pb"))
