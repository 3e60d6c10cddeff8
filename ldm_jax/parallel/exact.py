"""Sums over a batch whose bits do not depend on the number of devices.

A batch is V shards, V a power of two. Each device computes its shards one after
another, by a loop whose body is the same program on any number of devices, and adds
them along one binary tree: its own as a binary counter does, those of others by
exchanges between pairs (IEEE addition commutes, so both partners get the same bits).

Shard s holds every V-th example of the batch from the s-th on, and is computed by
device s mod n of n. So the tree joins first the shards whose numbers differ in the
highest bit, last those that differ in the lowest, and a process, which reads every P-th
example, has whole shards.
"""

import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int64, Key

from ldm_jax.parallel.launch import num_cores
from ldm_jax.parallel.reduce import AxisName, BatchGradients, GradientFn, Reduce
from ldm_jax.parallel.rewrites import with_rewrites
from ldm_jax.types import InputError, PyTree


class Shards(NamedTuple):
    """How a batch is computed in shards."""

    number: int
    """Shards of the batch, a power of two."""
    devices: int
    """Devices of all processes; divides `number`."""
    processes: int
    """Processes that the devices are spread over, in order."""


def check_shards(shards: int, devices: list[Any], *, num_devices: int) -> None:
    """Raise `InputError` if devices cannot compute an exact reduction.

    Args:
      devices: Those of this process.
      num_devices: Devices of all processes.
    """
    if shards % num_devices:
        raise InputError(
            f"parallel.shards: got {shards}, wanted a multiple of the {num_devices} "
            "devices; try fewer devices, or another --parallel.shards in a new run"
        )
    if devices[0].platform != "cpu":
        return
    given = os.environ.get("NPROC", "")
    threads = int(given) if given.isdecimal() else num_cores()
    num_here = jax.local_device_count()
    threads = max(threads, num_here)
    if threads != shards:
        few_devices = f"at most {shards} CPU devices and " * (num_here > shards)
        raise InputError(
            f"parallel.reduction: got exact with {threads} threads, on which the order "
            f"of some sums of a CPU depends, wanted {shards}; try {few_devices}"
            f"NPROC={shards} in the environment, before JAX starts"
        )


def reduce_exactly(
    gradient_fn: GradientFn,
    state: PyTree,
    frozen: PyTree,
    batch: PyTree,
    root_key: Key[Array, ""],
    *,
    axis_name: AxisName,
    shards: Shards,
) -> BatchGradients:
    """Average over the shards of a batch: a `Reduce`."""
    local = sum_of_shards(gradient_fn, state, frozen, batch, root_key, shards=shards)
    total = sum_over_devices(local, axis_name, shards=shards)
    # Through a loop, which XLA fuses with nothing: what follows is compiled alike.
    return jax.lax.fori_loop(0, _unknown(1, root_key), _pass_on, total)


def in_a_loop(step: Callable[..., tuple[PyTree, Any]]) -> Callable[..., Any]:
    """Make a step that XLA compiles alike alone and as one of several.

    Its body is that of a loop of one turn, which is fused with nothing around it.
    """

    def looped(
        state: PyTree,
        frozen: PyTree,
        batch: PyTree,
        root_key: Key[Array, ""],
        *,
        reduce: Reduce,
    ) -> tuple[PyTree, Any]:
        def stepped(state: PyTree) -> tuple[PyTree, Any]:
            return step(state, frozen, batch, root_key, reduce=reduce)

        turns = _unknown(1, root_key)
        after = with_rewrites(stepped, turns=turns)

        def turn(_: Array, before: tuple[PyTree, Any]) -> tuple[PyTree, Any]:
            return after(before[0])

        empty = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(after, state)[1]
        )
        return jax.lax.fori_loop(0, turns, turn, (state, empty))

    return looped


def _unknown(number: int, root_key: Key[Array, ""]) -> Array:
    """Return a number that XLA does not know: it would unroll a loop of one turn."""
    never = (jax.random.key_data(root_key).reshape(-1)[0] | 1) == 0
    return jnp.where(never, 0, number)


def rows_of_devices(
    num_rows: int, *, shards: int, devices: int
) -> Int64[np.ndarray, " b"]:
    """Order a process' examples so that each device's are together, shard by shard.

    Args:
      num_rows: Examples of this process, in the order of the batch.
      shards: Shards of this process.
      devices: Devices of this process.

    Returns:
      Indices of the examples: of the first device's first shard, of its second shard,
      and so on in the order in which it computes them.
    """
    turns = shards // devices
    order = [_reversed_bits(turn, turns) for turn in range(turns)]
    rows = np.arange(num_rows).reshape(-1, turns, devices)  # row, turn, device
    return rows[:, order].transpose(2, 1, 0).reshape(-1)


def _reversed_bits(number: int, size: int) -> int:
    """Reverse the bits of a number below a power of two."""
    bits = size.bit_length() - 1
    return int(f"{number:0{bits}b}"[::-1], 2) if bits else 0


def _pass_on(_: Array, total: PyTree) -> PyTree:
    return jax.lax.optimization_barrier(total)  # else XLA takes it out of the loop


def sum_of_shards(
    gradient_fn: GradientFn,
    state: PyTree,
    frozen: PyTree,
    batch: PyTree,
    root_key: Key[Array, ""],
    *,
    shards: Shards,
) -> BatchGradients:
    """Add a device's part of the mean over all shards, along the tree.

    Args:
      batch: This device's examples, as `rows_of_devices` orders them.
    """
    here = shards.number // shards.devices

    def cut(leaf: Array) -> Array:
        parts = leaf.reshape(here, -1, *leaf.shape[1:])
        # The loop reads from arrays of one shape on any number of devices.
        missing = [(0, shards.number - here)] + [(0, 0)] * (parts.ndim - 1)
        return jnp.pad(parts, missing)

    @with_rewrites
    def of(part: PyTree) -> BatchGradients:
        found = gradient_fn(state, frozen, part, root_key, axis_name=None)
        # Exact, since the number of shards is a power of two.
        return jax.tree.map(lambda leaf: leaf / shards.number, found)

    cuts = jax.tree.map(cut, batch)
    levels = here.bit_length() - 1

    def add(turn: Array, carried: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        """Add one shard: carry as long as there is a sum of the same size."""
        sums, total = carried[0], of(jax.tree.map(lambda leaf: _at(leaf, turn), cuts))
        if not levels:
            return sums, total

        def is_full(carried: tuple[Array, PyTree]) -> Array:
            return (turn >> carried[0]) & 1 == 1

        def carry(carried: tuple[Array, PyTree]) -> tuple[Array, PyTree]:
            level, total = carried
            return level + 1, jax.tree.map(
                lambda sums, value: _at(sums, level) + value, sums, total
            )

        level, total = jax.lax.while_loop(is_full, carry, (jnp.int32(0), total))

        def store(sums: Array, value: Array) -> Array:
            # The last shard carries to the end; what it writes is not read.
            return jax.lax.dynamic_update_index_in_dim(sums, value, level, 0)

        return jax.tree.map(store, sums, total), total

    total = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        jax.eval_shape(of, jax.tree.map(lambda leaf: leaf[0], cuts)),
    )
    sums = jax.tree.map(lambda x: jnp.zeros((levels, *x.shape), x.dtype), total)
    return jax.lax.fori_loop(0, _unknown(here, root_key), add, (sums, total))[1]


def _at(leaf: Array, index: Array) -> Array:
    return jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False)


def sum_over_devices(tree: PyTree, axis_name: AxisName, *, shards: Shards) -> PyTree:
    """Add the sums of all devices along the tree; all get the same bits.

    By halving what is exchanged and doubling it again, which send what a ring sends.

    Args:
      tree: Float32 arrays, each device's own.
    """
    devices, processes = shards.devices, shards.processes
    if devices == 1:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    sizes = [math.prod(leaf.shape) for leaf in leaves]
    flat = jnp.concatenate([leaf.reshape(-1) for leaf in leaves])
    flat = jnp.pad(flat, (0, -len(flat) % devices))
    local = devices // processes
    # A process has every P-th shard: its devices differ in the high bits.
    distances = [*_halves(local), *(local * d for d in _halves(processes))]
    place = jax.lax.axis_index(axis_name)

    def swap(sent: Array, distance: int) -> Array:
        pairs = [(i, i ^ distance) for i in range(devices)]
        return jax.lax.ppermute(sent, axis_name, pairs)

    for distance in distances:
        half, is_upper = len(flat) // 2, (place // distance) % 2
        kept, sent = (
            jax.lax.dynamic_slice_in_dim(flat, which * half, half)
            for which in (is_upper, 1 - is_upper)
        )
        flat = kept + swap(sent, distance)
    for distance in reversed(distances):
        is_upper, other = (place // distance) % 2 == 1, swap(flat, distance)
        lower, upper = (
            jnp.where(is_upper, other, flat),
            jnp.where(is_upper, flat, other),
        )
        flat = jnp.concatenate([lower, upper])
    ends = np.cumsum(sizes)
    cuts = [
        flat[end - size : end].reshape(leaf.shape)
        for leaf, size, end in zip(leaves, sizes, ends, strict=True)
    ]
    return jax.tree.unflatten(structure, cuts)


def _halves(number: int) -> list[int]:
    """Return n/2, n/4 ... 1 for a power of two."""
    return [number >> bit for bit in range(1, number.bit_length())]
