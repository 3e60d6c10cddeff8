"""Means over a batch, whoever computes its parts, one after the other or side by side.

A step learns from the examples of one device and updates with the mean over all. How
that mean is taken is the layout's business: it hands every step an `Average`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from ldm_jax.models.kernels.convolution import in_a_loop
from ldm_jax.types import PyTree

AxisName = str | tuple[str, ...] | None
"""Of one axis of devices, or of several together; None for a device alone."""
T = TypeVar("T")


class Learned(NamedTuple):
    """What examples teach."""

    gradients: PyTree
    """In the state's parameters, means over the examples; None if there are none."""
    means: PyTree
    """Other means over the examples."""
    agreed: PyTree = None
    """What is the same on every device already."""


@runtime_checkable
class Learn(Protocol):
    """Learns from the examples of one device."""

    def __call__(
        self,
        state: PyTree,
        frozen: PyTree,
        batch: PyTree,
        root_key: Key[Array, ""],
        *,
        axis_name: AxisName,
    ) -> Learned:
        """Return means over this device's examples.

        Args:
          state: With its parameters whole; of the rest of it, only the step and an
            adversary may be read.
          frozen: What is not trained, whole.
          batch: This device's examples, or a part of them.
          axis_name: Device axis, for what needs all devices; None for one device.
        """
        ...


@runtime_checkable
class Average(Protocol):
    """Takes the mean of what is learned over all parts and devices."""

    def __call__(
        self,
        learn: Learn,
        state: PyTree,
        frozen: PyTree,
        batch: PyTree,
        root_key: Key[Array, ""],
        *,
        parts: int,
    ) -> Learned:
        """Return what `learn` would say of the whole batch, up to rounding.

        Args:
          learn: Learns from examples.
          state: The state, as the step was given it.
          parts: Parts that a device's examples are computed in, one after the other.
        """
        ...


def average_here(
    learn: Learn,
    state: PyTree,
    frozen: PyTree,
    batch: PyTree,
    root_key: Key[Array, ""],
    *,
    parts: int,
    axis_name: AxisName = None,
) -> Learned:
    """Average over one device or, with the name of an axis, over those of the axis.

    The `Average` of a device alone, and of `jax.pmap`.
    """

    def of(part: PyTree) -> Learned:
        return learn(state, frozen, part, root_key, axis_name=axis_name)

    learned = mean_over_parts(of, batch, parts=parts)
    gradients, means = mean_over((learned.gradients, learned.means), axis_name)
    return Learned(gradients, means, learned.agreed)


def average_over(axis_name: AxisName) -> Average:
    """Make the `Average` over the devices of an axis."""
    return functools.partial(average_here, axis_name=axis_name)


def mean_over(tree: Any, axis_name: AxisName) -> Any:
    """Average every leaf over the devices of an axis; None leaves them alone."""
    return tree if axis_name is None else jax.lax.pmean(tree, axis_name)


def mean_over_parts(fn: Callable[[PyTree], T], batch: PyTree, *, parts: int) -> T:
    """Average what a function says of the parts of a batch, one after the other.

    A part takes every `parts`-th example, so that each device has its share of every
    part without moving an example.

    Args:
      fn: From a batch to arrays, each a mean over its examples.
      batch: Arrays with a leading axis of examples, which `parts` divides.
      parts: How many; 1 calls `fn` once.

    Returns:
      What `fn` would say of the whole batch, up to rounding.
    """
    if parts == 1:
        return fn(batch)

    def cut(leaf: Array) -> Array:
        return leaf.reshape(-1, parts, *leaf.shape[1:]).swapaxes(0, 1)

    def add(total: T, part: PyTree) -> tuple[T, None]:
        with in_a_loop():
            return jax.tree.map(jnp.add, total, fn(part)), None

    cuts = jax.tree.map(cut, batch)
    shapes = jax.eval_shape(fn, jax.tree.map(lambda leaf: leaf[0], cuts))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, cuts)
    return jax.tree.map(lambda leaf: leaf / jnp.asarray(parts, leaf.dtype), total)
