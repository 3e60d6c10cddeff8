"""Around a pure step: skip what is not finite, several steps a dispatch, in parts."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Key

from ldm_jax.training.state import AnyState
from ldm_jax.types import PyTree

Step = Callable[..., tuple[AnyState, Any]]
T = TypeVar("T")


def skip_nonfinite(step: Step) -> Step:
    """Make a step that changes nothing but its number where it is not finite.

    Args:
      step: A pure step whose metrics hold the loss and the norm of every gradient, and
        are the same on every device.

    Returns:
      The same step; parameters, average and optimiser stay as they were wherever a
      metric is not finite.
    """

    def guarded(
        state: AnyState,
        frozen: PyTree,
        batch: PyTree,
        root_key: Key[Array, ""],
        *,
        axis_name: str | None,
    ) -> tuple[AnyState, Any]:
        after, metrics = step(state, frozen, batch, root_key, axis_name=axis_name)
        good = all_finite(metrics)
        kept = jax.tree.map(lambda new, old: jnp.where(good, new, old), after, state)
        return kept._replace(step=after.step), metrics

    return guarded


def all_finite(tree: PyTree) -> Bool[Array, ""]:
    """Say whether every number of a tree is finite."""
    leaves = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]
    return jnp.stack(leaves).all()


def several_steps(step: Step) -> Step:
    """Make a function that takes as many steps as it is given batches, by a scan.

    Args:
      step: A pure step.

    Returns:
      The same with an axis of steps before every array of the batch and, in what it
      returns, of the metrics.
    """

    def steps(
        state: AnyState,
        frozen: PyTree,
        batches: PyTree,
        root_key: Key[Array, ""],
        *,
        axis_name: str | None,
    ) -> tuple[AnyState, Any]:
        def body(state: AnyState, batch: PyTree) -> tuple[AnyState, Any]:
            return step(state, frozen, batch, root_key, axis_name=axis_name)

        return jax.lax.scan(body, state, batches)

    return steps


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
        return jax.tree.map(jnp.add, total, fn(part)), None

    cuts = jax.tree.map(cut, batch)
    shapes = jax.eval_shape(fn, jax.tree.map(lambda leaf: leaf[0], cuts))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, cuts)
    return jax.tree.map(lambda leaf: leaf / jnp.asarray(parts, leaf.dtype), total)
