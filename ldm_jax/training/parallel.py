"""Where arrays live: the only file that knows of devices.

`pmap` is the layout: the state is stacked on a leading axis of local devices (the
form in which donation works on one process and on several), batches are cut along
it, and nobody outside this file sees that axis.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Key

from ldm_jax.types import InputError, PyTree

AXIS_NAME = "devices"

MappedStep = Callable[[Any, Any, Any, Any], tuple[Any, Any]]
MappedImages = Callable[[Any, Any, Any], Any]


class PmapLayout:
    """Replicate the state, split the batch, average with `pmean`.

    Attributes:
      devices: The local devices, in order.
    """

    def __init__(self, devices: list[Any] | None = None) -> None:
        """Use `devices`, or all local ones."""
        self.devices = devices or jax.local_devices()
        mesh = Mesh(np.asarray(self.devices), (AXIS_NAME,))
        self._stacked = NamedSharding(mesh, PartitionSpec(AXIS_NAME))

    @property
    def num_devices(self) -> int:
        """Devices over all processes."""
        return len(self.devices) * jax.process_count()

    @property
    def platform(self) -> str:
        """What the devices are, in JAX's words."""
        return self.devices[0].platform

    @property
    def emulated(self) -> bool:
        """Whether several devices share one CPU."""
        return len(self.devices) > 1 and self.devices[0].platform == "cpu"

    @property
    def process_index(self) -> int:
        """Which process this is."""
        return jax.process_index()

    @property
    def process_count(self) -> int:
        """How many processes there are."""
        return jax.process_count()

    def check_batch_size(self, batch_size: int, name: str) -> None:
        """Raise `InputError` if a global batch does not divide by the devices."""
        if batch_size % self.num_devices:
            low = batch_size // self.num_devices * self.num_devices
            try_sizes = [size for size in (low, low + self.num_devices) if size]
            raise InputError(
                f"{name}: got {batch_size}, wanted a multiple of the "
                f"{self.num_devices} devices; try {' or '.join(map(str, try_sizes))}"
            )

    def replicate(self, tree: PyTree) -> PyTree:
        """Give every device a copy of a tree of arrays."""

        def stack(leaf: Array) -> Array:
            copies = jnp.broadcast_to(leaf, (len(self.devices), *jnp.shape(leaf)))
            return jax.device_put(copies, self._stacked)

        return jax.tree.map(stack, tree)

    def split(self, batch: PyTree) -> PyTree:
        """Send each device its part of this process' batch, without waiting."""

        def cut(leaf: np.ndarray) -> Array:
            parts = leaf.reshape(len(self.devices), -1, *leaf.shape[1:])
            return jax.device_put(parts, self._stacked)

        return jax.tree.map(cut, batch)

    def local(self, tree: PyTree) -> PyTree:
        """Take one copy of a replicated tree, without moving it off its device."""

        def first(leaf: Array) -> Array:
            return leaf.addressable_shards[0].data.reshape(leaf.shape[1:])

        return jax.tree.map(first, tree)

    def map_step(self, step: Callable[..., tuple[PyTree, Any]]) -> MappedStep:
        """Map `step(state, frozen, batch, root_key, *, axis_name)` over the devices.

        The state is donated: its buffers become those of the next state.
        """

        def named(
            state: PyTree, frozen: PyTree, batch: PyTree, root_key: Key[Array, ""]
        ) -> tuple[PyTree, Any]:
            return step(state, frozen, batch, root_key, axis_name=AXIS_NAME)

        return jax.pmap(
            named, axis_name=AXIS_NAME, devices=self.devices, donate_argnums=0
        )

    def map_images(self, fn: MappedImages) -> MappedImages:
        """Map `fn(models, knobs, inputs)` over the devices, each with its own images.

        Args:
          fn: From replicated arrays, arrays that hold for all images, and arrays by
            image to arrays by image.

        Returns:
          A function of the same arguments, whose images divide by the devices.
        """
        mapped = jax.pmap(fn, in_axes=(0, None, 0), devices=self.devices)

        def cut(leaf: Array) -> Array:
            return leaf.reshape(len(self.devices), -1, *leaf.shape[1:])

        def join(leaf: Array) -> np.ndarray:
            return np.concatenate(list(np.asarray(leaf)))

        def spread(models: PyTree, knobs: PyTree, inputs: PyTree) -> PyTree:
            outputs = mapped(models, knobs, jax.tree.map(cut, inputs))
            return jax.tree.map(join, outputs)

        return spread
