"""Muon for matrices, all matrices of one shape in one operation."""

from collections import defaultdict
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, MuonState, scale_by_muon

from ldm_jax.parallel.rewrites import compiled_alone
from ldm_jax.types import PyTree

Shape = tuple[int, ...]
TABLE = "embedding"
"""Name of an embedding table in linen."""


class LeafGroups(NamedTuple):
    """The leaves of a tree, grouped by shape."""

    structure: Any
    """Structure of the tree."""
    indices: dict[Shape, list[int]]
    """Indices of its leaves, by shape."""


def muon(
    rate: optax.Schedule,
    *,
    b1: float,
    b2: float,
    weight_decay: float,
    moves_tables: bool,
) -> optax.GradientTransformation:
    """Make Muon for matrices and AdamW with Nesterov momentum for other parameters.

    The update of a matrix has singular values of about 1, times the square root of
    `width_out / width_in` where that is above 1. The state is that of
    `optax.contrib.muon`.

    Args:
      rate: Learning rate of Muon and AdamW.
      b1: First decay of AdamW.
      b2: Second decay of AdamW.
      weight_decay: Weight decay of Muon and AdamW.
      moves_tables: Whether Muon updates embedding tables too.

    Source:
      Jordan, "Muon: An optimizer for hidden layers in neural networks" (2024);
      Loshchilov & Hutter, arXiv:1711.05101.
    """

    def kind(path: tuple[Any, ...], leaf: Any) -> str:
        is_table = getattr(path[-1], "key", None) == TABLE
        return "adam" if leaf.ndim != 2 or (is_table and not moves_tables) else "muon"

    matrices = optax.chain(
        orthogonal_momentum(),
        optax.stateless_with_tree_map(_scaled),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(rate),
    )
    rest = optax.adamw(rate, b1=b1, b2=b2, weight_decay=weight_decay, nesterov=True)
    return optax.partition(
        {"muon": matrices, "adam": rest},
        lambda params: jax.tree_util.tree_map_with_path(kind, params),
    )


def gain(shape: Shape) -> float:
    """Return the factor that scales updates of wide matrices as square ones."""
    width_in, width_out = shape
    return max(1.0, width_out / width_in) ** 0.5


def _scaled(update: Any, param: Any) -> jax.Array:
    del param
    return update * gain(update.shape)


def orthogonal_momentum() -> optax.GradientTransformation:
    """Make `optax.contrib.scale_by_muon` for stacks of matrices of one shape.

    Equal up to rounding. Networks have dozens of small matrices of few shapes: one by
    one, their products took a third of a training step on a CPU and minutes to compile.
    """
    inner = scale_by_muon(
        weight_dimension_numbers=lambda stacks: jax.tree.map(
            lambda _: MuonDimensionNumbers(reduction_axis=1, output_axis=2), stacks
        )
    )

    @compiled_alone
    def step(updates: PyTree, state: Any) -> tuple[PyTree, MuonState]:
        updates, after = inner.update(updates, state)
        return updates, cast(MuonState, after)

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None
    ) -> tuple[PyTree, MuonState]:
        del params
        groups = group_leaves(updates)
        stacked = state._replace(mu=replicated(stack(state.mu, groups)))
        orthogonal, after = replicated(
            step(replicated(stack(updates, groups)), stacked)
        )
        return unstack(orthogonal, groups), after._replace(mu=unstack(after.mu, groups))

    return optax.GradientTransformation(inner.init, update)


def replicated(tree: PyTree) -> PyTree:
    """Have every device compute all of a tree, where a mesh is in use.

    Products of matrices in parts would be sums in another order.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.lax.with_sharding_constraint(tree, jax.sharding.PartitionSpec())


def group_leaves(tree: PyTree) -> LeafGroups:
    """Group the leaves of a tree by shape."""
    leaves, structure = jax.tree.flatten(tree)
    indices: dict[Shape, list[int]] = defaultdict(list)
    for index, leaf in enumerate(leaves):
        indices[leaf.shape].append(index)
    return LeafGroups(structure, dict(indices))


def stack(tree: PyTree, groups: LeafGroups) -> dict[str, jax.Array]:
    """Stack the leaves of each shape."""
    leaves = jax.tree.leaves(tree)
    return {
        str(shape): jnp.stack([leaves[index] for index in indices])
        for shape, indices in groups.indices.items()
    }


def unstack(stacks: Any, groups: LeafGroups) -> PyTree:
    """Invert `stack`."""
    leaf_by_index = {
        index: stacks[str(shape)][row]
        for shape, indices in groups.indices.items()
        for row, index in enumerate(indices)
    }
    leaves = [leaf_by_index[index] for index in range(len(leaf_by_index))]
    return jax.tree.unflatten(groups.structure, leaves)
