"""Around a pure step: skip what is not finite, several steps a dispatch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Key

from ldm_jax.parallel.reduce import Reduce
from ldm_jax.training.state import TrainState
from ldm_jax.types import PyTree

Step = Callable[..., tuple[TrainState, Any]]


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
        state: TrainState,
        frozen: PyTree,
        batch: PyTree,
        root_key: Key[Array, ""],
        *,
        reduce: Reduce,
    ) -> tuple[TrainState, Any]:
        after, metrics = step(state, frozen, batch, root_key, reduce=reduce)
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
        state: TrainState,
        frozen: PyTree,
        batches: PyTree,
        root_key: Key[Array, ""],
        *,
        reduce: Reduce,
    ) -> tuple[TrainState, Any]:
        def body(state: TrainState, batch: PyTree) -> tuple[TrainState, Any]:
            return step(state, frozen, batch, root_key, reduce=reduce)

        return jax.lax.scan(body, state, batches)

    return steps
