"""Means over a batch that several devices, or one after another, compute in parts.

A step takes gradients of the examples of one device and updates the parameters with
their mean over all devices. How that mean is taken depends on the layout, which passes
a `Reduce` to every step.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from ldm_jax.types import PyTree

AxisName = str | tuple[str, ...] | None
"""One device axis, or several together; None for a single device."""
T = TypeVar("T")


class BatchGradients(NamedTuple):
    """Gradients over a batch, and the numbers computed beside them."""

    gradients: PyTree
    """Means over the examples, with the structure of the parameters; None without."""
    means: PyTree
    """Other means over the examples."""
    replicated: PyTree = None
    """Values that are already equal on every device."""


@runtime_checkable
class GradientFn(Protocol):
    """Computes gradients over the examples of one device."""

    def __call__(
        self,
        state: PyTree,
        frozen: PyTree,
        batch: PyTree,
        root_key: Key[Array, ""],
        *,
        axis_name: AxisName,
    ) -> BatchGradients:
        """Return means over the examples of this device.

        Args:
          state: Reads only the step, the parameters (whole) and the discriminator.
          frozen: What is not trained, whole.
          batch: This device's examples, or a part of them.
          axis_name: The device axis, for what needs the examples of all devices.
        """
        ...


@runtime_checkable
class Reduce(Protocol):
    """Averages gradients over all parts and devices."""

    def __call__(
        self,
        gradient_fn: GradientFn,
        state: PyTree,
        frozen: PyTree,
        batch: PyTree,
        root_key: Key[Array, ""],
    ) -> BatchGradients:
        """Return what `gradient_fn` gives for the whole batch, up to rounding."""
        ...


def reduce_over_axis(
    gradient_fn: GradientFn,
    state: PyTree,
    frozen: PyTree,
    batch: PyTree,
    root_key: Key[Array, ""],
    *,
    axis_name: AxisName = None,
    accumulate: int = 1,
) -> BatchGradients:
    """Average over the devices of an axis: the `Reduce` of `jax.pmap`.

    Args:
      axis_name: None for a single device.
      accumulate: Parts that a device computes its examples in, one after another.
    """

    def of(part: PyTree) -> BatchGradients:
        return gradient_fn(state, frozen, part, root_key, axis_name=axis_name)

    local = mean_over_parts(of, batch, parts=accumulate)
    gradients, means = mean_over((local.gradients, local.means), axis_name)
    return BatchGradients(gradients, means, local.replicated)


def mean_over(tree: Any, axis_name: AxisName) -> Any:
    """Average every leaf over the devices of an axis; None changes nothing."""
    return tree if axis_name is None else jax.lax.pmean(tree, axis_name)


def mean_over_parts(fn: Callable[[PyTree], T], batch: PyTree, *, parts: int) -> T:
    """Average a function over parts of a batch that are computed one after another.

    A part takes every `parts`-th example, so that each device has its share of every
    part without moving an example.

    Args:
      fn: From a batch to arrays, each a mean over its examples.
      batch: Arrays with a leading axis of examples, a multiple of `parts`.
      parts: 1 calls `fn` once.

    Returns:
      What `fn` gives for the whole batch, up to rounding.
    """
    if parts == 1:
        return fn(batch)

    def cut(leaf: Array) -> Array:
        return leaf.reshape(-1, parts, *leaf.shape[1:]).swapaxes(0, 1)

    def add(total: T, part: PyTree) -> tuple[T, None]:
        return jax.tree.map(jnp.add, total, fn(part)), None

    cuts = jax.tree.map(cut, batch)
    shapes = jax.eval_shape(fn, jax.tree.map(lambda leaf: leaf[0], cuts))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, cuts)
    return jax.tree.map(lambda leaf: leaf / jnp.asarray(parts, leaf.dtype), total)
