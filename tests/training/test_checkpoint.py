import asyncio
import collections
import gc
import json
import logging
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore

from ldm_jax.training.checkpoint import CheckpointStore
from ldm_jax.training.digest import tree_digest
from ldm_jax.training.state import CriticState, TrainState
from ldm_jax.types import RunError


def tree(value=1.0):
    return {
        "w": jnp.arange(4096, dtype=jnp.float32) * value,
        "step": jnp.asarray(3, jnp.int32),
        "key": jax.random.key_data(jax.random.key(0)),
    }


TARGET = jax.eval_shape(tree)


@pytest.fixture
def store(tmp_path):
    opened = CheckpointStore(tmp_path / "checkpoints", keep=2)
    yield opened
    opened.close()


def reopened(store):
    store.close()
    return CheckpointStore(store.directory, keep=2)


def test_a_checkpoint_restores_bits_and_notes(store):
    digest = store.save(5, tree(0.1), {"data": {"next_index": 7}, "seconds": 1.5})
    found = reopened(store).restore(TARGET)
    assert found.step == 5
    assert found.digest == digest
    assert found.notes["data"] == {"next_index": 7}
    same = jax.tree.map(
        lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), found.tree, tree(0.1)
    )
    assert all(jax.tree.leaves(same))


def test_only_the_newest_checkpoints_are_kept(store):
    for step in (1, 2, 3):
        store.save(step, tree(step), {})
    store.close()
    names = {path.name for path in store.directory.iterdir()}
    assert {"2", "3"} <= names and "1" not in names


def test_a_checkpoint_is_on_the_disk_before_it_is_valid_and_the_last_one_goes(
    tmp_path, monkeypatch
):
    """Of one that keeps a single step, a loss of power leaves the old or the new."""
    store = CheckpointStore(tmp_path / "checkpoints", keep=1)
    store.save(1, tree(), {})
    store.wait()
    done, fsync = [], os.fsync

    def recorded(number):
        path = Path(os.readlink(f"/proc/self/fd/{number}"))
        there = {name for name in ("1", "2") if (store.directory / name).exists()}
        done.append((path, there))
        fsync(number)

    monkeypatch.setattr(os, "fsync", recorded)
    store.save(2, tree(2.0), {})
    store.wait()
    store.close()
    assert not (store.directory / "1").exists()
    final = store.directory / "2"
    before = [path for path, there in done if there == {"1"}]
    after = [path for path, there in done if there == {"1", "2"}]
    assert len(before) + len(after) == len(done)
    (part,) = {path for path in before if path.parent == store.directory}
    synced = {path.relative_to(part) for path in before}
    whole = {path.relative_to(final) for path in [final, *final.rglob("*")]}
    assert whole - synced == {Path("commit_success.txt")}  # written by the renaming
    assert {path.relative_to(final) for path in after[:-1]} == whole
    assert after[-1] == store.directory


def test_an_empty_folder_restores_none(store):
    assert store.restore(TARGET) is None


FIELDS = {"step": jnp.int32(3), "params": tree(), "ema": tree(2.0), "opt_state": ()}
PARTS = {"critic": CriticState(tree(3.0), ()), "averages": (tree(4.0), tree(5.0))}


@pytest.mark.parametrize("parts", [(), ("critic",), ("averages",)])
def test_absent_parts_of_a_state_leave_no_trace_in_a_checkpoint(store, parts):
    fields = {**FIELDS, **{name: PARTS[name] for name in parts}}
    # Earlier versions had one class for each set of parts.
    earlier = collections.namedtuple("Earlier", fields)(**fields)
    state = TrainState(**fields)
    digests = [
        store.save(1, {"state": earlier}, {}),
        store.save(2, {"state": state}, {}),
    ]
    assert digests[0] == digests[1]
    opened = reopened(store)
    target = jax.eval_shape(lambda: {"state": state})
    for step in (1, 2):
        found = opened.restore(target, step=step).tree["state"]
        assert type(found) is TrainState
        assert tree_digest(found) == tree_digest(state)
    opened.close()
    leaves = [
        set(json.loads(path.read_text())["tree_metadata"])
        for path in sorted(store.directory.glob("*/state/_METADATA"))
    ]
    assert leaves[0] == leaves[1]


@pytest.mark.parametrize("leaf", ["w", "step", "key"])
def test_the_digest_depends_on_every_leaf(leaf):
    changed = tree()
    changed[leaf] = changed[leaf].at[-1].add(1) if leaf != "step" else changed[leaf] + 1
    assert tree_digest(changed) != tree_digest(tree())


def test_the_digest_depends_on_shape_dtype_and_path():
    array = jnp.zeros((2, 3))
    digests = {
        tree_digest({"a": array}),
        tree_digest({"b": array}),
        tree_digest({"a": array.reshape(3, 2)}),
        tree_digest({"a": array.astype(jnp.int32)}),
    }
    assert len(digests) == 4


def flip_a_bit(directory):
    files = [p for p in directory.rglob("*") if p.is_file() and "/d/" in str(p)]
    path = max(files, key=lambda p: p.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def test_restoring_skips_a_checkpoint_with_a_flipped_bit(store):
    store.save(1, tree(0.37), {})
    store.save(2, tree(0.73), {})
    store.close()
    flip_a_bit(store.directory / "2")
    found = reopened(store).restore(TARGET)
    assert found.step == 1
    assert np.array_equal(found.tree["w"], tree(0.37)["w"])
    assert len(list((store.directory / "damaged").iterdir())) == 1


@pytest.mark.parametrize("on_device", [False, True])
def test_of_many_damaged_arrays_python_reports_none(store, on_device):
    """A read that ended after Orbax closed its event loop would print a traceback."""

    def many():
        return {str(i): jnp.arange(20_000, dtype=jnp.float32) * i for i in range(60)}

    for step in (1, 2):
        store.save(step, many(), {})
    store.close()
    for path in (store.directory / "2/state").glob("**/d/*"):
        content = bytearray(path.read_bytes())
        content[::1000] = bytes(byte ^ 255 for byte in content[::1000])
        path.write_bytes(content)
    target, shardings = jax.eval_shape(many), None
    if on_device:
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: place, target)
    assert reopened(store).restore(target, shardings=shardings).step == 1
    gc.collect()


ODD = {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "link to itself": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize("kind", ODD)
def test_what_is_no_file_in_a_checkpoint_is_not_waited_for(store, kind, caplog):
    for step in (1, 2):
        store.save(step, tree(step), {})
    store.close()
    names = [path for path in (store.directory / "2").rglob("*") if path.is_file()]
    needed = ("metadata", "_METADATA", "manifest.ocdbt")
    names = [path for path in names if path.name in needed or path.parent.name == "d"]
    assert len(names) >= 4
    whole = shutil.copytree(store.directory, store.directory.with_name("whole"))
    for path in names:
        shutil.rmtree(store.directory)
        shutil.copytree(whole, store.directory)
        path.unlink()
        ODD[kind](path)
        caplog.clear()
        opened = reopened(store)
        assert opened.restore(TARGET).step == 1, path
        opened.close()
        assert "damaged checkpoint: step 2: " in caplog.messages[-1]


def test_restoring_skips_a_truncated_checkpoint(store):
    store.save(1, tree(), {})
    store.save(2, tree(), {})
    store.close()
    for path in (store.directory / "2").rglob("*"):
        if path.is_file() and path.stat().st_size > 1000:
            path.write_bytes(path.read_bytes()[:100])
    assert reopened(store).restore(TARGET).step == 1


def test_restoring_raises_if_no_checkpoint_is_intact(store):
    store.save(1, tree(0.37), {})
    store.close()
    flip_a_bit(store.directory / "1")
    with pytest.raises(RunError, match="no checkpoint is intact"):
        reopened(store).restore(TARGET)


def test_a_non_finite_state_is_not_saved(store):
    store.save(1, tree(), {})
    bad = tree()
    bad["w"] = bad["w"].at[7].set(jnp.nan)
    with pytest.raises(RunError, match=r"step 2.*'w'.*not finite"):
        store.save(2, bad, {})
    assert reopened(store).restore(TARGET).step == 1


def test_notes_are_restored_as_json(store):
    store.save(1, tree(), {"config": {"seed": 0}})
    found = reopened(store).restore(TARGET)
    assert json.loads(json.dumps(found.notes))["config"] == {"seed": 0}


def test_a_read_only_store_moves_no_damaged_checkpoint(store):
    store.save(1, tree(0.37), {})
    store.save(2, tree(0.73), {})
    store.close()
    flip_a_bit(store.directory / "2")
    reader = CheckpointStore(store.directory, keep=2, read_only=True)
    assert reader.restore(TARGET).step == 1
    assert (store.directory / "2").is_dir()


async def of_somebody_else(_):
    raise ValueError("not of a checkpoint")


def zarr_in(folder):
    kvstore = {"driver": "file", "path": f"{folder}/"}
    return {"driver": "zarr", "kvstore": kvstore}


def open_nothing(folder):
    return tensorstore.open(zarr_in(folder / "nothing"))


def read_what_is_torn(folder):
    place = folder / "torn"
    array = tensorstore.open(
        zarr_in(place), create=True, dtype=tensorstore.float32, shape=[64]
    ).result()
    array.write(np.ones(64, np.float32)).result()
    (place / "0").write_bytes(bytes(8))
    return tensorstore.open(zarr_in(place), read=True).result().read()


@pytest.mark.parametrize(
    "begin, lines", [(open_nothing, 0), (read_what_is_torn, 0), (of_somebody_else, 1)]
)
def test_further_failed_reads_of_an_open_store_are_not_logged(
    begin, lines, store, tmp_path, caplog
):
    async def leave_one_alone():
        await asyncio.wait([asyncio.ensure_future(begin(tmp_path))])

    # As Orbax reads: in an event loop of its own, closed at the first failure.
    loop = asyncio.new_event_loop()
    loop.run_until_complete(leave_one_alone())
    loop.close()
    gc.collect()
    assert len(caplog.messages) == lines


def test_a_closed_store_filters_nothing(store):
    before = {
        name: len(logging.getLogger(name).filters) for name in ("absl", "asyncio")
    }
    CheckpointStore(store.directory.parent / "another", keep=1).close()
    for name, num in before.items():
        assert len(logging.getLogger(name).filters) == num


def test_what_asyncio_logs_late_of_a_failed_save_stays_filtered(
    tmp_path, monkeypatch, caplog
):
    for name in ("absl", "asyncio"):
        monkeypatch.setattr(logging.getLogger(name), "filters", [])
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    shutil.rmtree(store.directory)
    store.directory.write_text("no folder")
    with pytest.raises(RunError, match="the checkpoint of step 1 could not be"):
        store.save(1, tree(), {})
    store.close()
    logging.getLogger("asyncio").error(
        "Task exception was never retrieved\nfuture: <Task finished "
        "coro=<async_serialize_from_host() done, defined at orbax/checkpoint>"
    )
    logging.getLogger("asyncio").error("somebody else's")
    assert caplog.messages == ["somebody else's"]
