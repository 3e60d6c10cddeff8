"""The layout of fully sharded data parallelism: each device holds a part of the state.

One `jit` over a mesh of two axes. State and frozen parameters are sharded over both
axes, batches over their product. Each step gathers the parameters, takes gradients on
every device, scatters their mean, and updates every part in its place. There are two
axes because the widths of these networks divide by 16 twice and not by 256 once.

Source: Rajbhandari et al., arXiv:1910.02054 (ZeRO, stage 3); Xu et al.,
arXiv:2105.04663 (GSPMD).
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Key

from ldm_jax.parallel.exact import check_shards
from ldm_jax.parallel.layout import Layout, devices_here
from ldm_jax.parallel.reduce import (
    BatchGradients,
    GradientFn,
    mean_over,
    mean_over_parts,
)
from ldm_jax.types import PyTree

AXES = ("rows", "columns")
NO_MESH = jax.sharding.AbstractMesh((), ())
MIN_SIZE = 2**12
"""Smaller leaves are replicated: sharding saves less than gathering them costs."""


class FsdpLayout(Layout):
    """Shards the state and the batch over all devices of all processes."""

    def __init__(self, devices: list[Any] | None = None, *, shards: int = 0) -> None:
        """Use some devices of all processes, or all.

        Args:
          shards: Shards of a batch whose sums are exact; 0 for sums in any order.
        """
        everyone = devices or jax.devices()
        self.shards = shards
        self.num_devices = len(everyone)
        self.devices = devices_here(everyone)
        if shards:
            check_shards(shards, self.devices, num_devices=self.num_devices)
        self.mesh = make_mesh(everyone, in_order=bool(shards))
        self._everywhere = NamedSharding(self.mesh, PartitionSpec())

    def shardings(self, shapes: PyTree) -> PyTree:
        """Return the sharding of each leaf of a tree, a function of its shape."""

        def where(leaf: Any) -> NamedSharding:
            return NamedSharding(self.mesh, spec_of(np.shape(leaf), self.mesh))

        return jax.tree.map(where, shapes)

    def place(self, tree: PyTree) -> PyTree:
        """Send every device its part of a tree."""

        def cut(leaf: Any) -> Array:
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                data = cut(jax.random.key_data(leaf))
                return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
            sharding = NamedSharding(self.mesh, spec_of(np.shape(leaf), self.mesh))
            if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
                return leaf
            whole = np.asarray(leaf)
            return jax.make_array_from_callback(
                whole.shape, sharding, lambda index: whole[index]
            )

        return jax.tree.map(cut, tree)

    def init(self, make: Callable[[], PyTree]) -> PyTree:
        """Make a tree in parts; no device ever holds it whole."""
        return self.run_once(make, out_shardings=self.shardings(jax.eval_shape(make)))

    def split(self, batch: PyTree, *, stacked: bool = False) -> PyTree:
        """Split the axis of examples over all devices."""
        spec = PartitionSpec(None, AXES) if stacked else PartitionSpec(AXES)
        send = functools.partial(
            jax.make_array_from_process_local_data, NamedSharding(self.mesh, spec)
        )
        return jax.tree.map(
            lambda leaf: send(self.in_order(leaf, axis=int(stacked))), batch
        )

    def local(self, tree: PyTree) -> PyTree:
        """Gather a tree leaf by leaf, and return the first device's copy."""

        def first(leaf: Array) -> Array:
            if not leaf.is_fully_replicated:
                leaf = _copy_to(self._everywhere)(leaf)
                if self.emulated:  # programs that wait for each other share threads
                    leaf.block_until_ready()
            return leaf.addressable_data(0)

        return jax.tree.map(first, tree)

    def saved(self, tree: PyTree) -> PyTree:
        """Return the tree as it is: its arrays span all processes."""
        return tree

    def restore_shardings(self, shapes: PyTree) -> PyTree:
        """Return the shardings of training: no process restores a whole array."""
        return self.shardings(shapes)

    def map_step(
        self, step: Callable[..., tuple[PyTree, Any]], *, accumulate: int = 1
    ) -> Any:
        """Compile a step as one program over the mesh."""
        reduce = functools.partial(self._reduce, accumulate=accumulate)

        def whole(
            state: PyTree, frozen: PyTree, batch: PyTree, root_key: Key[Array, ""]
        ) -> tuple[PyTree, Any]:
            # With a mesh in use, what has no order in parts is computed whole.
            mesh = self.mesh.abstract_mesh if self.shards else NO_MESH
            with jax.sharding.use_abstract_mesh(mesh):
                after, metrics = step(state, frozen, batch, root_key, reduce=reduce)
            # The shardings of the arguments, or their buffers could not be donated.
            after = jax.lax.with_sharding_constraint(after, self.shardings(after))
            return after, jax.lax.with_sharding_constraint(metrics, self._everywhere)

        return jax.jit(whole, donate_argnums=0)

    def _reduce(
        self,
        gradient_fn: GradientFn,
        state: PyTree,
        frozen: PyTree,
        batch: PyTree,
        root_key: Key[Array, ""],
        *,
        accumulate: int,
    ) -> BatchGradients:
        """Gather the parameters, take gradients on every device, scatter their mean.

        Exact sums stay whole on every device. The collectives are explicit: left alone,
        the compiler shards activations by their width and sends all gradients to every
        device.
        """
        specs = self._specs((state, frozen))
        cuts = self._specs(state.params) if hasattr(state, "params") else None

        def local(
            kept: PyTree, batch: PyTree, root_key: Key[Array, ""]
        ) -> BatchGradients:
            state, frozen = jax.tree.map(gather, kept, specs)
            if self.shards:
                exactly = self.exact_reduce(AXES)
                return exactly(gradient_fn, state, frozen, batch, root_key)

            def of(part: PyTree) -> BatchGradients:
                here = gradient_fn(state, frozen, part, root_key, axis_name=AXES)
                gradients = jax.tree.map(self._scatter, here.gradients, cuts)
                return here._replace(gradients=gradients)

            total = mean_over_parts(of, batch, parts=accumulate)
            return total._replace(means=mean_over(total.means, AXES))

        replicated = PartitionSpec()
        if self.shards:  # norms are sums over whole leaves
            cuts = replicated
        return jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(specs, PartitionSpec(AXES), replicated),
            out_specs=BatchGradients(cuts, replicated, replicated),
            check_vma=False,  # gradients are each device's own until they are scattered
        )((state, frozen), batch, root_key)

    def _specs(self, tree: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: spec_of(np.shape(leaf), self.mesh), tree)

    def _scatter(self, leaf: Array, spec: PartitionSpec) -> Array:
        """Average a leaf over all devices, and return this device's part."""
        left: list[str] = list(AXES)
        for axis, names in enumerate(spec):
            for name in names_of(names):
                # One axis of the mesh at a time: for two, the TPU compiler makes an
                # all-reduce, which sends twice as much.
                leaf = jax.lax.psum_scatter(
                    leaf, name, scatter_dimension=axis, tiled=True
                )
                left.remove(name)
        return (jax.lax.psum(leaf, left) if left else leaf) / self.num_devices

    def stand_ins(self, state: PyTree, frozen: PyTree, batch: PyTree) -> tuple:
        """Add the sharding of every argument."""

        def at(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        cut = NamedSharding(self.mesh, PartitionSpec(AXES))
        key = jax.eval_shape(lambda: jax.random.key(0))
        return (
            jax.tree.map(at, state, self.shardings(state)),
            jax.tree.map(at, frozen, self.shardings(frozen)),
            jax.tree.map(lambda leaf: at(leaf, cut), batch),
            at(key, self._everywhere),
        )


def gather(leaf: Array, spec: PartitionSpec) -> Array:
    """Gather the parts of a leaf on every device."""
    for axis, names in enumerate(spec):
        if names is not None:
            leaf = jax.lax.all_gather(leaf, names, axis=axis, tiled=True)
    return leaf


def names_of(names: Any) -> tuple[str, ...]:
    """Return the mesh axes in an entry of a `PartitionSpec`, outer first."""
    return () if names is None else (names,) if isinstance(names, str) else names


def make_mesh(devices: list[Any], *, in_order: bool = False) -> Mesh:
    """Arrange devices in a rectangle that is as square as their number allows.

    Args:
      in_order: Whether row by row as they are given, or as suits their links.
    """
    num = len(devices)
    columns = next(n for n in range(math.isqrt(num), 0, -1) if num % n == 0)
    shape = (num // columns, columns)
    if devices[0].platform == "tpu" and not in_order:
        return Mesh(mesh_utils.create_device_mesh(shape, devices=devices), AXES)
    return Mesh(np.asarray(devices).reshape(shape), AXES)


def spec_of(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Choose the sharding of a leaf by its shape.

    Returns:
      The largest axis that divides by the whole mesh, sharded over it. If there is
      none, the largest axis for each axis of the mesh that divides by it. Nothing for a
      small leaf.
    """
    spec: list[Any] = [None] * len(shape)
    if math.prod(shape) < MIN_SIZE:
        return PartitionSpec()
    largest_first = sorted(range(len(shape)), key=lambda axis: -shape[axis])
    for axis in largest_first:
        if shape[axis] % mesh.size == 0:
            spec[axis] = AXES
            return PartitionSpec(*spec)
    for name in AXES:
        for axis in largest_first:
            if spec[axis] is None and shape[axis] % mesh.shape[name] == 0:
                spec[axis] = name
                break
    return PartitionSpec(*spec)


@functools.cache
def _copy_to(sharding: NamedSharding) -> Callable[[Array], Array]:
    return jax.jit(lambda leaf: leaf, out_shardings=sharding)
