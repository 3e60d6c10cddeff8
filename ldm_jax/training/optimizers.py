"""Muon: updates of matrices made orthogonal, those of one shape all at once."""

from collections import defaultdict
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, MuonState, scale_by_muon

from ldm_jax.types import PyTree

Shape = tuple[int, ...]
TABLE = "embedding"
"""What linen calls a table of vectors, one for each token or position."""


class Places(NamedTuple):
    """Where the leaves of a tree are, sorted by shape."""

    structure: Any
    """Of the tree."""
    indices: dict[Shape, list[int]]
    """Of its leaves, by shape."""


def muon(
    rate: optax.Schedule,
    *,
    b1: float,
    b2: float,
    weight_decay: float,
    moves_tables: bool,
) -> optax.GradientTransformation:
    """Make Muon for matrices and AdamW, with Nesterov's momentum too, for the rest.

    An update of a matrix has singular values of about 1, times the root of its width
    out over its width in where that is more. The state is that of `optax.contrib.muon`.

    Args:
      rate: Learning rate of both.
      b1: Of AdamW.
      b2: Of AdamW.
      weight_decay: Of both.
      moves_tables: Whether tables of embeddings, whose rows no product mixes, count as
        matrices.

    Returns:
      The optimiser.

    Source:
      Jordan, "Muon: An optimizer for hidden layers in neural networks" (2024);
      Loshchilov & Hutter, arXiv:1711.05101.
    """

    def kind(path: tuple[Any, ...], leaf: Any) -> str:
        is_table = getattr(path[-1], "key", None) == TABLE
        return "adam" if leaf.ndim != 2 or (is_table and not moves_tables) else "muon"

    matrices = optax.chain(
        orthogonal_momentum(),
        optax.stateless_with_tree_map(_as_wide),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(rate),
    )
    rest = optax.adamw(rate, b1=b1, b2=b2, weight_decay=weight_decay, nesterov=True)
    return optax.partition(
        {"muon": matrices, "adam": rest},
        lambda params: jax.tree_util.tree_map_with_path(kind, params),
    )


def gain(shape: Shape) -> float:
    """Return what makes an update of a wide matrix as large as that of a square one."""
    width_in, width_out = shape
    return max(1.0, width_out / width_in) ** 0.5


def _as_wide(update: Any, param: Any) -> jax.Array:
    del param
    return update * gain(update.shape)


def orthogonal_momentum() -> optax.GradientTransformation:
    """Make optax's `scale_by_muon` work on all matrices of a shape in one operation.

    The numbers are the same up to rounding. Networks have dozens of small matrices of
    few shapes: products one by one took a third of a training step on a CPU, and
    minutes to compile.
    """
    inner = scale_by_muon(
        weight_dimension_numbers=lambda stacks: jax.tree.map(
            lambda _: MuonDimensionNumbers(reduction_axis=1, output_axis=2), stacks
        )
    )

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None
    ) -> tuple[PyTree, MuonState]:
        del params
        places = places_of(updates)
        stacked = state._replace(mu=stack(state.mu, places))
        turned, after = inner.update(stack(updates, places), stacked)
        after = cast(MuonState, after)
        return unstack(turned, places), after._replace(mu=unstack(after.mu, places))

    return optax.GradientTransformation(inner.init, update)


def places_of(tree: PyTree) -> Places:
    """Sort the leaves of a tree by shape."""
    leaves, structure = jax.tree.flatten(tree)
    indices: dict[Shape, list[int]] = defaultdict(list)
    for index, leaf in enumerate(leaves):
        indices[leaf.shape].append(index)
    return Places(structure, dict(indices))


def stack(tree: PyTree, places: Places) -> dict[str, jax.Array]:
    """Stack the leaves of each shape."""
    leaves = jax.tree.leaves(tree)
    return {
        str(shape): jnp.stack([leaves[index] for index in indices])
        for shape, indices in places.indices.items()
    }


def unstack(stacks: Any, places: Places) -> PyTree:
    """Put stacked leaves back where they were."""
    leaf_by_index = {
        index: stacks[str(shape)][row]
        for shape, indices in places.indices.items()
        for row, index in enumerate(indices)
    }
    leaves = [leaf_by_index[index] for index in range(len(leaf_by_index))]
    return jax.tree.unflatten(places.structure, leaves)
