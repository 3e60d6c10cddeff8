"""Around a pure step: skip non-finite updates, make several steps a dispatch."""

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
    """Make a step that only counts itself where a metric is not finite.

    Args:
      step: Its metrics hold the loss and the norm of every gradient, and are equal on
        every device.
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
    """Return whether every number of a tree is finite."""
    leaves = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]
    return jnp.stack(leaves).all()


def several_steps(step: Step) -> Step:
    """Make a step of stacked batches; the metrics get the same leading axis."""

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
