"""Sums over a batch in one order, whatever the number of devices."""

import dataclasses
import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from ldm_jax.build import build_model, open_iterator
from ldm_jax.config import Config, ParallelConfig, digest, from_json, to_json
from ldm_jax.config.serialization import differences
from ldm_jax.latent_diffusion import init_autoencoder
from ldm_jax.parallel.exact import rows_of_devices
from ldm_jax.parallel.make_layout import FsdpLayout, PmapLayout, make_layout
from ldm_jax.parallel.reduce import BatchGradients
from ldm_jax.parallel.rewrites import compiled_alone, with_rewrites
from ldm_jax.rng import root_key
from ldm_jax.training.autoencoder_stage import autoencoder_stage, latent_scale
from ldm_jax.training.diffusion_stage import diffusion_stage
from ldm_jax.training.diffusion_step import FrozenParams
from ldm_jax.training.prefetch import Prefetch
from ldm_jax.types import InputError
from tests.support.tiny import get_config

DEVICES = jax.devices()
SHARDS = 8
EXACT = ParallelConfig(reduction="exact")
UNORDERED = re.compile(r"stablehlo\.(all_reduce|reduce_scatter|all_to_all)")


def exact_layout(devices, layout=PmapLayout):
    return layout(DEVICES[:devices], shards=SHARDS)


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_each_device_has_whole_shards_in_the_order_of_the_tree(processes, devices):
    if devices < processes:
        pytest.skip("a process has a device")
    batch, here = np.arange(32), devices // processes
    turns, found = SHARDS // devices, {}
    for process in range(processes):
        own = batch[process::processes]  # as a process reads them
        rows = rows_of_devices(len(own), shards=SHARDS // processes, devices=here)
        for j, part in enumerate(own[rows].reshape(here, turns, -1)):
            found[process + j * processes] = part
    for device, shards in found.items():
        numbers = [shard[0] for shard in shards]
        assert {number % devices for number in numbers} == {device}
        for number, shard in zip(numbers, shards, strict=True):
            assert list(shard) == list(batch[number::SHARDS])
        # Neighbours differ in the highest bit that is left, pairs in the next.
        for size in (1, 2, 4):
            if size < turns:
                high = SHARDS // 2 // size
                assert numbers[0] ^ numbers[size] == high


def tree_sum(values):
    """Add along the tree: the highest bit of a shard's number first."""
    while len(values) > 1:
        half = len(values) // 2
        values = values[:half] + values[half:]
    return values[0]


def uneven_rows():
    """Of odd size, so that halving pads; large and small, so that order counts."""
    drawn = np.random.RandomState(0)
    rows = drawn.normal(size=(SHARDS, 37)) * 10.0 ** drawn.randint(-4, 5, (SHARDS, 37))
    return rows.astype(np.float32)


def total_step(state, frozen, batch, root_key, *, reduce):
    """Sum what only its order of addition tells apart."""

    def gradients(state, frozen, batch, root_key, *, axis_name):
        del axis_name
        return BatchGradients({"w": batch.sum(0), "b": batch[:, :1].sum()}, batch[0, 1])

    return state, reduce(gradients, state, frozen, batch, root_key)


def test_the_sum_is_that_of_the_tree_on_any_number_of_devices():
    batch = uneven_rows()
    wanted = tree_sum(batch) / np.float32(SHARDS)
    plain = batch.sum(0) / np.float32(SHARDS)
    assert not np.array_equal(wanted, plain)
    for devices in (1, 2, 4, 8):
        layout = exact_layout(devices)
        key = layout.place(root_key(0))
        args = layout.place(jnp.zeros(())), None, layout.split(batch), key
        _, found = layout.map_step(total_step)(*args)
        gradients = jax.tree.map(np.asarray, found.gradients)
        for i in range(devices):
            assert np.array_equal(gradients["w"][i], wanted)
            assert gradients["b"][i] == wanted[0]
            assert np.asarray(found.means)[i] == wanted[1]


def test_under_fsdp_the_sum_is_that_of_the_tree_too():
    batch = uneven_rows()
    wanted = tree_sum(batch) / np.float32(SHARDS)
    for devices in (1, 2, 8):
        layout = exact_layout(devices, FsdpLayout)
        key = layout.place(root_key(0))
        args = layout.place(jnp.zeros(())), None, layout.split(batch), key
        _, found = layout.map_step(total_step)(*args)
        assert np.array_equal(layout.local(found.gradients["w"]), wanted)


def stage_of(name, config):
    model = build_model(config)
    if name == "autoencoder":
        return autoencoder_stage(config, model, Path())
    params = jax.jit(functools.partial(init_autoencoder, model))(root_key(1))
    frozen = FrozenParams(params, jnp.float32(0.7), {})
    return diffusion_stage(config, model, frozen, Path())


def test_the_latent_scale_has_the_same_bits(tmp_path):
    config = get_config()
    model = build_model(config)
    params = jax.jit(functools.partial(init_autoencoder, model))(root_key(1))
    scales = set()
    for devices in (1, 4):
        folder = tmp_path / f"{devices}"
        (folder / "autoencoder").mkdir(parents=True)
        layout = exact_layout(devices)
        scales.add(float(latent_scale(config, model, params, layout, folder)))
    assert len(scales) == 1


def shapes_of_batch(config):
    batches = open_iterator(config, batch_size=8, layout=exact_layout(1))
    batch = Prefetch(batches, exact_layout(1)).peek(1)
    batches.close()
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), batch
    )


@pytest.mark.parametrize("name", ["autoencoder", "diffusion"])
def test_no_sum_over_devices_is_left_to_the_compiler(name):
    config = get_config()
    stage = stage_of(name, config)
    shapes, batch = jax.eval_shape(stage.init), shapes_of_batch(config)
    for layout in (exact_layout(8), PmapLayout(DEVICES)):
        text = layout.lower(stage.step, shapes, stage.frozen, batch).as_text()
        assert bool(UNORDERED.search(text)) == (layout.shards == 0)
        assert ("stablehlo.collective_permute" in text) == (layout.shards > 0)


def test_under_fsdp_the_compiler_adds_no_sum_of_floats():
    config = with_optimizer(get_config(), algorithm="muon")
    wide = dataclasses.replace(config.diffusion, channels=32)  # sharded parameters
    config = dataclasses.replace(config, diffusion=wide)
    stage = stage_of("diffusion", config)
    shapes, batch = jax.eval_shape(stage.init), shapes_of_batch(config)
    sums = re.compile(r"^.*f32\[.* (all-reduce|reduce-scatter)(-start)?\(", re.M)
    for layout in (exact_layout(8, FsdpLayout), FsdpLayout(DEVICES)):
        lowered = layout.lower(stage.step, shapes, stage.frozen, batch)
        text = lowered.compile().as_text()
        assert bool(sums.search(text)) == (layout.shards == 0)
        assert " all-gather" in text


def with_optimizer(config, **fields):
    optim = dataclasses.replace(config.diffusion.optim, **fields)
    diffusion = dataclasses.replace(config.diffusion, optim=optim)
    return dataclasses.replace(config, diffusion=diffusion)


def softmaxes(part):
    """Softmaxes, plain and in what holds programs of its own, and their gradients."""
    x, scale = part

    def total(x):
        plain = jax.nn.softmax(x)
        again = jax.checkpoint(jax.nn.softmax)(2.0 * plain)
        picked = jax.lax.cond(scale > 0.0, jax.nn.softmax, jnp.square, again)
        _, each = jax.lax.scan(lambda c, y: (c, jax.nn.softmax(y)), 0.0, picked)
        spread = jnp.broadcast_to(x.sum(1, keepdims=True), x.shape)
        return (jax.jit(jax.nn.softmax)(each) * x / spread / scale + x / 3.0).sum()

    return jax.value_and_grad(total)(x)


def test_no_division_by_a_spread_array_is_left():
    x = jnp.asarray(np.random.RandomState(0).normal(size=(3, 9)), jnp.float32)
    part = x, jnp.float32(1.5)
    for found, wanted in zip(
        with_rewrites(softmaxes)(part), softmaxes(part), strict=True
    ):
        assert np.allclose(found, wanted, rtol=2e-5, atol=1e-6)
    large = re.compile(r"f32\[(?:3,)?9\] = div \w+ [a-z]+\b")  # not by a number
    before, after = (
        len(large.findall(str(jax.make_jaxpr(fn)(part))))
        for fn in (softmaxes, with_rewrites(softmaxes))
    )
    assert (before, after) == (14, 0)


def test_sums_of_transposed_arrays_are_sums_of_the_arrays():
    def sums(x):
        turned = x.transpose(2, 0, 1)  # as Muon turns stacks of tall matrices
        return (
            jnp.linalg.norm(x.mT, axis=(1, 2)),
            turned.sum(axis=1),
            (turned * turned).sum(axis=(0, 2)),
            (turned * x.mT.mT.transpose(2, 0, 1)).sum(),
            (x.transpose(1, 0, 2) * x.transpose(1, 0, 2)).sum(axis=2),
        )

    x = jnp.asarray(np.random.RandomState(0).normal(size=(2, 5, 3)), jnp.float32)
    for found, wanted in zip(with_rewrites(sums)(x), sums(x), strict=True):
        assert np.allclose(found, wanted, rtol=1e-6)
    # Arrays of the shape of x are summed, and none of the shape of a turned one.
    text = str(jax.make_jaxpr(with_rewrites(sums))(x))
    shapes = dict(re.findall(r"(\w+):(\S+) = ", text))
    summed = re.findall(r"reduce_sum\[.*?\] (\w+)", text, flags=re.DOTALL)
    assert len(summed) == 5
    assert {shapes.get(name, "f32[2,5,3]") for name in summed} == {"f32[2,5,3]"}


def test_what_is_compiled_alone_is_a_loop_where_programs_are_to_be_alike():
    @compiled_alone
    def mixed(x, y):
        return 0.95 * x + 0.05 * y, x.sum()

    def around(x):
        first, total = mixed(x[1:], x[:-1])
        return first[::2] * total

    x = jnp.asarray(np.random.RandomState(0).normal(size=9), jnp.float32)
    assert np.allclose(with_rewrites(around)(x), around(x), rtol=1e-6)
    plain, alone = (
        jax.jit(fn).lower(x).as_text().count("stablehlo.while")
        for fn in (around, lambda x: with_rewrites(around, turns=x.astype(int)[0])(x))
    )
    assert (plain, alone) == (0, 1)


def test_kernels_are_left_as_they_are():
    def kernel(x_ref, out_ref):
        x = x_ref[...]
        out_ref[...] = x / x.sum(axis=-1, keepdims=True)

    def scaled(x):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return jax.nn.silu(pl.pallas_call(kernel, out_shape=shape, interpret=True)(x))

    x = jnp.arange(16.0).reshape(2, 8)
    assert np.allclose(with_rewrites(scaled)(x), scaled(x), rtol=1e-6)


def with_parallel(**fields):
    return dataclasses.replace(
        get_config(), parallel=dataclasses.replace(EXACT, **fields)
    )


def test_an_exact_run_is_another_run_and_a_plain_one_is_what_it_was():
    plain, exact = get_config(), with_parallel()
    assert set(differences(plain, exact)) == {"parallel.reduction"}
    assert set(differences(exact, with_parallel(shards=16))) == {"parallel.shards"}
    assert differences(exact, with_parallel(steps_per_dispatch=4)) == {}
    assert digest(exact) != digest(plain) != digest(Config())
    assert from_json(to_json(exact)) == exact and from_json(to_json(plain)) == plain
    assert '"shards"' not in to_json(plain)  # earlier versions read it
    assert digest(exact) == digest(with_parallel(steps_per_dispatch=4, layout="fsdp"))
    four = dataclasses.replace(plain, parallel=ParallelConfig(steps_per_dispatch=4))
    assert digest(four) == digest(plain)


@pytest.mark.parametrize("shards", [0, 1, 6, -8, 2**17])
def test_shards_are_a_power_of_two(shards):
    with pytest.raises(InputError, match=r"shards: got .*wanted a power of two"):
        ParallelConfig(shards=shards)


def test_an_exact_reduction_has_shards_where_a_plain_one_accumulates():
    with pytest.raises(InputError, match=r"parallel\.accumulate: got 2, wanted 1 with"):
        with_parallel(accumulate=2)


def with_adversary(**fields):
    config = with_parallel()
    adversary = dataclasses.replace(
        config.autoencoder.adversary, enabled=True, **fields
    )
    first = dataclasses.replace(config.autoencoder, adversary=adversary)
    return dataclasses.replace(config, autoencoder=first)


def test_the_statistics_of_an_adversary_are_those_of_a_shard():
    with pytest.raises(InputError, match=r"sync_batch_norm: got True, wanted False "):
        with_adversary()
    with_adversary(sync_batch_norm=False)


def test_devices_batches_and_threads_must_fit_the_shards(monkeypatch):
    with pytest.raises(InputError, match=r"shards: got 8, wanted a multiple of the 3"):
        exact_layout(3)
    layout = make_layout(EXACT, DEVICES[:2])
    layout.check_batch_size(24, "batch")
    with pytest.raises(InputError, match=r"batch: got 12, wanted a multiple of the 8 "):
        layout.check_batch_size(12, "batch")
    with pytest.raises(InputError, match=r"exact with 8 threads.*wanted 16; try NP"):
        PmapLayout(DEVICES[:8], shards=16)
    monkeypatch.setenv("NPROC", "16")
    assert PmapLayout(DEVICES[:2], shards=16).shards == 16
    with pytest.raises(InputError, match=r"try at most 2 CPU devices and NPROC=2 "):
        PmapLayout(DEVICES[:2], shards=2)


@pytest.mark.parametrize("layout", ["pmap", "fsdp"])
def test_a_lone_process_uses_as_many_devices_as_there_are_shards(
    layout, monkeypatch, caplog
):
    monkeypatch.setenv("NPROC", "2")
    monkeypatch.setattr(jax, "local_device_count", lambda: 2)  # as chips beside a CPU
    made = make_layout(ParallelConfig(layout=layout, reduction="exact", shards=2))
    assert (made.num_devices, made.devices) == (2, DEVICES[:2])
    assert caplog.messages == ["parallel.shards: 2, so 2 of the 8 devices are used"]
