"""The layout of `jax.pmap`: every device holds the whole state.

The state has a leading axis of local devices, in which form donation works on one
process and on several. No other file sees that axis.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Key

from ldm_jax.parallel.exact import check_shards
from ldm_jax.parallel.layout import Layout, devices_here
from ldm_jax.parallel.reduce import reduce_over_axis
from ldm_jax.types import PyTree

AXIS_NAME = "devices"
MappedImages = Callable[[Any, Any, Any], Any]


class PmapLayout(Layout):
    """Replicates the state, splits the batch, averages with `pmean`."""

    def __init__(self, devices: list[Any] | None = None, *, shards: int = 0) -> None:
        """Use some devices, of this process or of all processes, or all.

        Args:
          shards: Shards of a batch whose sums are exact; 0 for sums by `pmean`.
        """
        self.shards = shards
        self._all_devices = devices or jax.devices()
        self.num_devices = len(self._all_devices)
        self.devices = devices_here(self._all_devices)
        if shards:
            check_shards(shards, self.devices, num_devices=self.num_devices)
        mesh = Mesh(np.asarray(self.devices), (AXIS_NAME,))
        self._stacked = NamedSharding(mesh, PartitionSpec(AXIS_NAME))

    def place(self, tree: PyTree) -> PyTree:
        """Give every device a copy of a tree of arrays."""

        def widen(leaf: Any) -> Any:
            is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            if self.platform == "cpu" and not is_key:
                leaf = np.asarray(leaf)  # JAX would compile a program for each shape
            return leaf[None]

        return self._spread(jax.tree.map(widen, tree))

    def init(self, make: Callable[[], PyTree]) -> PyTree:
        """Make a tree by one program and give every device a copy."""

        def made() -> PyTree:
            return jax.tree.map(lambda leaf: leaf[None], jax.jit(make)())

        return self._spread(self.run_once(made))

    def _spread(self, tree: PyTree) -> PyTree:
        """Give every device a copy of a tree of arrays with a leading axis of one."""

        def stack(leaf: Any) -> Array:
            shape = (len(self.devices), *np.shape(leaf)[1:])
            copies = [jax.device_put(leaf, device) for device in self.devices]
            return jax.make_array_from_single_device_arrays(
                shape, self._stacked, copies
            )

        return jax.tree.map(stack, tree)

    def split(self, batch: PyTree, *, stacked: bool = False) -> PyTree:
        """Split the axis of examples over the devices."""

        def cut(leaf: np.ndarray) -> Array:
            leaf = self.in_order(leaf, axis=int(stacked))
            if stacked:
                num_steps, _, *rest = leaf.shape
                parts = leaf.reshape(num_steps, len(self.devices), -1, *rest)
                parts = parts.swapaxes(0, 1)
            else:
                parts = leaf.reshape(len(self.devices), -1, *leaf.shape[1:])
            return jax.device_put(parts, self._stacked)

        return jax.tree.map(cut, batch)

    def local(self, tree: PyTree) -> PyTree:
        """Return the first device's copy, without moving it."""

        def first(leaf: Array) -> Array:
            return leaf.addressable_shards[0].data.reshape(leaf.shape[1:])

        return jax.tree.map(first, tree)

    def saved(self, tree: PyTree) -> PyTree:
        """Join the first copies of all processes to replicated arrays."""
        if self.process_count == 1:
            return self.local(tree)
        firsts = {device.process_index: device for device in reversed(jax.devices())}
        mesh = Mesh(np.asarray([firsts[i] for i in sorted(firsts)]), (AXIS_NAME,))
        everywhere = NamedSharding(mesh, PartitionSpec())

        def join(leaf: Array) -> Array:
            return jax.make_array_from_single_device_arrays(
                leaf.shape, everywhere, [leaf]
            )

        return jax.tree.map(join, self.local(tree))

    def restore_shardings(self, shapes: PyTree) -> None:
        """Return None: `place` copies from the host to every device."""
        del shapes

    def map_step(
        self, step: Callable[..., tuple[PyTree, Any]], *, accumulate: int = 1
    ) -> Any:
        """Map a step by `jax.pmap`."""
        reduce = self.exact_reduce(AXIS_NAME)
        if not self.shards:
            reduce = functools.partial(
                reduce_over_axis, axis_name=AXIS_NAME, accumulate=accumulate
            )

        def named(
            state: PyTree, frozen: PyTree, batch: PyTree, root_key: Key[Array, ""]
        ) -> tuple[PyTree, Any]:
            return step(state, frozen, batch, root_key, reduce=reduce)

        return jax.pmap(
            named, axis_name=AXIS_NAME, devices=self._all_devices, donate_argnums=0
        )

    def stand_ins(self, state: PyTree, frozen: PyTree, batch: PyTree) -> tuple:
        """Add the leading axis of devices."""
        num = len(self.devices)

        def stack(leaf: Any) -> jax.ShapeDtypeStruct:
            shape = (num, *leaf.shape)
            return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=self._stacked)

        def cut(leaf: Any) -> jax.ShapeDtypeStruct:
            shape = (num, leaf.shape[0] // num, *leaf.shape[1:])
            return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=self._stacked)

        key = jax.eval_shape(lambda: jax.random.key(0))
        state, frozen, key = jax.tree.map(stack, (state, frozen, key))
        return state, frozen, jax.tree.map(cut, batch), key

    def map_images(self, fn: MappedImages) -> MappedImages:
        """Map `fn(placed, shared, inputs)` over the devices, each with its own images.

        Args:
          fn: From replicated arrays, arrays for all images, and arrays by image to
            arrays by image.

        Returns:
          A function of the same arguments, whose images divide by the devices.
        """
        mapped = jax.pmap(fn, in_axes=(0, None, 0), devices=self.devices)

        def cut(leaf: Array | np.ndarray) -> Array | np.ndarray:
            return leaf.reshape(len(self.devices), -1, *leaf.shape[1:])

        def join(leaf: Array) -> np.ndarray:
            return np.concatenate(list(np.asarray(leaf)))

        def spread(placed: PyTree, shared: PyTree, inputs: PyTree) -> PyTree:
            outputs = mapped(placed, shared, jax.tree.map(cut, inputs))
            return jax.tree.map(join, outputs)

        return spread
