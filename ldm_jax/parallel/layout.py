"""The interface of layouts: where arrays are placed, how a step is mapped."""

import abc
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ldm_jax.parallel.exact import (
    Shards,
    in_a_loop,
    reduce_exactly,
    rows_of_devices,
)
from ldm_jax.parallel.reduce import AxisName, Reduce
from ldm_jax.types import InputError, PyTree

QUICKLY_COMPILED = {
    "xla_backend_optimization_level": 1,
    "xla_disable_hlo_passes": "small-while-loop-hoisting",
}
"""Options of a program that runs once on a CPU; its random draws keep their bits."""


def devices_here(everyone: list[Any]) -> list[Any]:
    """Return those of this process; all of a topology, which has no local devices."""
    local = set(jax.local_devices())
    return [device for device in everyone if device in local] or everyone


class Layout(abc.ABC):
    """Places the state, the batch and frozen parameters on devices."""

    devices: list[Any]
    """Devices of this process, in order."""
    num_devices: int
    """Devices of all processes."""
    shards: int = 0
    """Shards of a batch whose sums are exact; 0 for sums in any order."""

    @property
    def platform(self) -> str:
        """JAX's name of the platform of the devices."""
        return self.devices[0].platform

    @property
    def emulated(self) -> bool:
        """Whether several devices share one CPU."""
        return self.num_devices > 1 and self.platform == "cpu"

    @property
    def process_index(self) -> int:
        """Index of this process."""
        return jax.process_index()

    @property
    def process_count(self) -> int:
        """Number of processes."""
        return jax.process_count()

    def check_batch_size(
        self, batch_size: int, name: str, *, accumulate: int = 1
    ) -> None:
        """Raise `InputError` if a global batch does not divide by devices and parts."""
        if self.shards and batch_size % self.shards:
            low = batch_size // self.shards * self.shards
            raise InputError(
                f"{name}: got {batch_size}, wanted a multiple of the {self.shards} "
                f"parallel.shards; try {low + self.shards}"
            )
        unit = self.num_devices * accumulate
        if batch_size % unit:
            low = batch_size // unit * unit
            try_sizes = [size for size in (low, low + unit) if size]
            parts = f", each in {accumulate} parts" if accumulate > 1 else ""
            raise InputError(
                f"{name}: got {batch_size}, wanted a multiple of the "
                f"{self.num_devices} devices{parts}; try "
                f"{' or '.join(map(str, try_sizes))}"
            )

    def in_order(self, leaf: np.ndarray, *, axis: int) -> np.ndarray:
        """Bring this process' examples into the order of its devices and shards."""
        if not self.shards:
            return leaf
        num_devices = len(self.devices)
        here = self.shards * num_devices // self.num_devices
        order = rows_of_devices(leaf.shape[axis], shards=here, devices=num_devices)
        return leaf.take(order, axis=axis)

    @abc.abstractmethod
    def place(self, tree: PyTree) -> PyTree:
        """Place a tree that every process holds whole."""

    @abc.abstractmethod
    def init(self, make: Callable[[], PyTree]) -> PyTree:
        """Make a tree and place it; no device holds more of it than its share."""

    def run_once(self, make: Callable[[], PyTree], **options: Any) -> PyTree:
        """Compile a program for one call, by the options of `jax.jit`."""
        quickly: Any = QUICKLY_COMPILED if self.platform == "cpu" else None
        return jax.jit(make, compiler_options=quickly, **options)()

    @abc.abstractmethod
    def split(self, batch: PyTree, *, stacked: bool = False) -> PyTree:
        """Send this process' part of a batch to its devices, without waiting.

        Args:
          batch: Arrays with a leading axis of examples.
          stacked: Whether an axis of steps precedes it.
        """

    @abc.abstractmethod
    def local(self, tree: PyTree) -> PyTree:
        """Return a whole copy of a tree on this process' first device.

        A collective where other processes hold parts of the tree.
        """

    @abc.abstractmethod
    def saved(self, tree: PyTree) -> PyTree:
        """Return a tree as arrays over all processes, as a checkpoint holds them."""

    @abc.abstractmethod
    def restore_shardings(self, shapes: PyTree) -> PyTree | None:
        """Return the shardings of restored arrays; None restores to the host."""

    def alike(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Return a step whose bits are those of one of several, if sums are exact."""
        return in_a_loop(step) if self.shards else step

    def exact_reduce(self, axis_name: AxisName) -> Reduce:
        """Return the exact mean over the shards of all devices of an axis."""
        num_processes = self.num_devices // len(self.devices)
        shards = Shards(self.shards, self.num_devices, num_processes)
        return functools.partial(reduce_exactly, axis_name=axis_name, shards=shards)

    @abc.abstractmethod
    def map_step(
        self, step: Callable[..., tuple[PyTree, Any]], *, accumulate: int = 1
    ) -> Any:
        """Map `step(state, frozen, batch, root_key, *, reduce)` over the devices.

        The state is donated: its buffers become those of the next state.

        Args:
          accumulate: Parts that each device computes its examples in.
        """

    @abc.abstractmethod
    def stand_ins(self, state: PyTree, frozen: PyTree, batch: PyTree) -> tuple:
        """Return the shapes of the mapped step's arguments, from logical shapes."""

    def lower(
        self,
        step: Callable[..., tuple[PyTree, Any]],
        state: PyTree,
        frozen: PyTree,
        batch: PyTree,
        *,
        accumulate: int = 1,
    ) -> jax.stages.Lowered:
        """Lower the mapped step by shapes alone, on one process.

        Args:
          state: Shapes of the state.
          frozen: Shapes of what the step only reads.
          batch: Shapes of a global batch.
        """
        mapped = self.map_step(self.alike(step), accumulate=accumulate)
        return mapped.lower(*self.stand_ins(state, frozen, batch))
