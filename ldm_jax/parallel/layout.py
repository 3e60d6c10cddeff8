"""What the loop asks of the machine: where arrays live and how a step is mapped."""

import abc
from collections.abc import Callable
from typing import Any

import jax

from ldm_jax.types import InputError, PyTree


class Layout(abc.ABC):
    """Where the state, the batch and what is frozen live.

    Attributes:
      devices: This process' devices, in order.
      num_devices: Devices over all processes.
      process_index: Which process this is.
      process_count: How many there are.
    """

    devices: list[Any]
    num_devices: int

    @property
    def platform(self) -> str:
        """What the devices are, in JAX's words."""
        return self.devices[0].platform

    @property
    def emulated(self) -> bool:
        """Whether several devices share one CPU."""
        return self.num_devices > 1 and self.platform == "cpu"

    @property
    def process_index(self) -> int:
        """Which process this is."""
        return jax.process_index()

    @property
    def process_count(self) -> int:
        """How many processes there are."""
        return jax.process_count()

    def check_batch_size(
        self, batch_size: int, name: str, *, accumulate: int = 1
    ) -> None:
        """Raise `InputError` if a global batch does not divide by devices and parts."""
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

    @abc.abstractmethod
    def place(self, tree: PyTree) -> PyTree:
        """Lay out a tree that every process holds as the step takes it."""

    @abc.abstractmethod
    def init(self, make: Callable[[], PyTree]) -> PyTree:
        """Make a tree and lay it out; nowhere is more of it than the layout keeps."""

    @abc.abstractmethod
    def split(self, batch: PyTree, *, stacked: bool = False) -> PyTree:
        """Send the devices this process' part of a batch, without waiting.

        Args:
          batch: Arrays with a leading axis of examples.
          stacked: Whether an axis of steps stands before it.

        Returns:
          The batch as the step takes it.
        """

    @abc.abstractmethod
    def local(self, tree: PyTree) -> PyTree:
        """Take a whole copy of a tree on this process' first device.

        Every process must ask, where parts of it lie with others.
        """

    @abc.abstractmethod
    def saved(self, tree: PyTree) -> PyTree:
        """View a tree as arrays over all processes, as a checkpoint holds them."""

    @abc.abstractmethod
    def restore_shardings(self, shapes: PyTree) -> PyTree | None:
        """Return where a checkpoint's arrays are to be read to; None for the host."""

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
        """Turn logical shapes and a global batch's into those the mapped step takes."""

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
          step: As for `map_step`.
          state: Shapes of the state.
          frozen: Shapes of what the step only reads.
          batch: Shapes of a batch of all the layout's devices.
          accumulate: As for `map_step`.

        Returns:
          The program that training runs, ready to be compiled.
        """
        mapped = self.map_step(step, accumulate=accumulate)
        return mapped.lower(*self.stand_ins(state, frozen, batch))
