"""Exact conversion between our parameter trees and the tensors of other programs.

A `Format` maps the path of one of our leaves to the keys it is stored under and its
layout there. The table of keys and shapes of a file, reading and writing all follow
from it. A layout only moves numbers, so reading what was written is the identity, bit
for bit.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from ldm_jax.pretrained.tensors import Tensors, match_keys, warn_of_unused
from ldm_jax.types import PyTree

Path = tuple[str, ...]
Parts = list[np.ndarray]


@runtime_checkable
class Layout(Protocol):
    """Conversion between one of our leaves and its stored tensors."""

    def write(self, ours: np.ndarray) -> Parts:
        """Return the stored tensors, as views where possible."""
        ...

    def read(self, theirs: Parts) -> np.ndarray:
        """Return our leaf."""
        ...


class Stored(NamedTuple):
    """Keys and layout of one of our leaves in a file."""

    keys: tuple[str, ...]
    """Keys of the tensors, one for each part of the layout."""
    layout: Layout
    """Axis order and packing of the tensors."""


Format = Callable[[Path], Stored]


@dataclasses.dataclass(frozen=True)
class Same:
    """Store the leaf unchanged: norms, biases, tables."""

    def write(self, ours: np.ndarray) -> Parts:
        """Return the leaf itself."""
        return [ours]

    def read(self, theirs: Parts) -> np.ndarray:
        """Return the tensor itself."""
        return theirs[0]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Store a matrix or convolution: ours (..., in, out), theirs (out, in, ...)."""

    ones: int = 0
    """Trailing axes of length 1 of a stored matrix: 2 as a 1x1 convolution of images,
    1 as one of sequences."""

    def write(self, ours: np.ndarray) -> Parts:
        """Move the channels to the front."""
        if ours.ndim == 4:
            return [ours.transpose(3, 2, 0, 1)]
        return [ours.T.reshape(*ours.T.shape, *[1] * self.ones)]

    def read(self, theirs: Parts) -> np.ndarray:
        """Move the channels to the back."""
        tensor = theirs[0]
        if tensor.ndim == 2 + self.ones:
            return tensor.reshape(tensor.shape[:2]).T
        return tensor.transpose(2, 3, 1, 0)


@dataclasses.dataclass(frozen=True)
class Split:
    """Store a leaf as equal parts of its last axis: q, k, v."""

    parts: int
    """Number of parts."""
    each: Layout
    """Layout of each part."""

    def write(self, ours: np.ndarray) -> Parts:
        """Split, then write each part."""
        return [
            self.each.write(part)[0] for part in np.split(ours, self.parts, axis=-1)
        ]

    def read(self, theirs: Parts) -> np.ndarray:
        """Read each part, then join."""
        return np.concatenate([self.each.read([part]) for part in theirs], axis=-1)


@dataclasses.dataclass(frozen=True)
class HeadsFirst:
    """Store fused q, k, v packed as (head, qkv, d); ours is (qkv, head, d).

    Source:
      latent-diffusion `QKVAttentionLegacy`.
    """

    num_heads: int
    """Attention heads."""
    inner: Layout
    """Layout of the repacked leaf."""

    def write(self, ours: np.ndarray) -> Parts:
        """Repack, then write."""
        return self.inner.write(self._swap(ours, 3, self.num_heads))

    def read(self, theirs: Parts) -> np.ndarray:
        """Read, then repack."""
        return self._swap(self.inner.read(theirs), self.num_heads, 3)

    @staticmethod
    def _swap(array: np.ndarray, outer: int, inner: int) -> np.ndarray:
        split = array.reshape(*array.shape[:-1], outer, inner, -1)
        return np.swapaxes(split, -3, -2).reshape(array.shape)


def module_leaf(
    path: Path,
    prefix: str,
    *,
    ones: int = 0,
    leaf_names: Mapping[str, str] | None = None,
) -> Stored:
    """Store a leaf of a norm, convolution, matrix or table.

    Args:
      path: Our path; its last name says whether the leaf is a kernel.
      prefix: Their name of the module.
      ones: Trailing axes of length 1, if a matrix is stored as a convolution.
      leaf_names: Their names of leaves other than `weight` and `bias`.
    """
    leaf = path[-1]
    usual = "bias" if leaf == "bias" else "weight"
    key = f"{prefix}.{(leaf_names or {}).get(leaf, usual)}".removeprefix(".")
    return Stored((key,), Kernel(ones) if leaf == "kernel" else Same())


def own_format(path: Path) -> Stored:
    """Store every leaf unchanged under its path, joined by slashes."""
    return Stored(("/".join(path),), Same())


def stored_leaves(tree: PyTree, format_: Format) -> Iterator[tuple[str, Any, Stored]]:
    """Yield the path, joined by slashes, the value and the storage of every leaf."""
    for name, leaf in sorted(flatten(tree).items()):
        yield name, leaf, format_(tuple(name.split("/")))


def key_shapes(shapes: PyTree, format_: Format) -> dict[str, tuple[int, ...]]:
    """Return the shape of every key that a file of this format must have.

    Args:
      shapes: Our tree, of arrays or of their shapes.
    """
    table: dict[str, tuple[int, ...]] = {}
    for _, leaf, stored in stored_leaves(shapes, format_):
        # A broadcast scalar has the shape and takes no memory.
        parts = stored.layout.write(np.broadcast_to(np.float32(0.0), leaf.shape))
        table |= {k: part.shape for k, part in zip(stored.keys, parts, strict=True)}
    return table


def read_tree(
    shapes: PyTree, format_: Format, tensors: Tensors, *, what: str
) -> PyTree:
    """Read our parameter tree from stored tensors.

    Args:
      shapes: Our tree, of arrays or of their shapes.
      tensors: Exactly the tensors of this network.
      what: Name of the tensors in an error.

    Returns:
      The tree, float32 NumPy arrays.

    Raises:
      InputError: If a key is missing, unexpected, or of another shape.
    """
    match_keys(key_shapes(shapes, format_), tensors, what=what)
    flat: dict[str, np.ndarray] = {}
    for name, _, stored in stored_leaves(shapes, format_):
        leaf = stored.layout.read([tensors[key] for key in stored.keys])
        flat[name] = np.asarray(leaf, np.float32, order="C")
    return unflatten(flat)


def used_tensors(
    shapes: PyTree, format_: Format, tensors: Tensors, *, what: str
) -> Tensors:
    """Return the tensors of a network whose own config stands beside the file.

    Others are named in a warning, as by the program that wrote both. If one is missing,
    all are returned: the network is another one, which `read_tree` tells.

    Args:
      shapes: Our tree, of arrays or of their shapes.
      what: Name of the tensors in a warning.
    """
    wanted = key_shapes(shapes, format_)
    if any(key not in tensors for key in wanted):
        return tensors
    warn_of_unused([key for key in tensors if key not in wanted], what=what)
    return Tensors({key: tensors.entries[key] for key in wanted})


def write_tree(tree: PyTree, format_: Format) -> dict[str, np.ndarray]:
    """Convert our parameter tree to stored tensors, float32 arrays by key."""
    tensors: dict[str, np.ndarray] = {}
    for _, leaf, stored in stored_leaves(tree, format_):
        parts = stored.layout.write(np.asarray(leaf, np.float32))
        for key, part in zip(stored.keys, parts, strict=True):
            tensors[key] = np.asarray(part, order="C")
    return tensors


def flatten(tree: PyTree, prefix: str = "") -> dict[str, PyTree]:
    """Return every leaf of nested dictionaries under its path, joined by slashes."""
    flat: dict[str, PyTree] = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        if isinstance(value, dict):
            flat |= flatten(value, f"{path}/")
        else:
            flat[path] = value
    return flat


def unflatten(flat: Mapping[str, np.ndarray]) -> PyTree:
    """Undo `flatten`."""
    tree: dict[str, PyTree] = {}
    for path, value in flat.items():
        *parents, name = path.split("/")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[name] = value
    return tree
