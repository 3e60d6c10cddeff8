"""Between our tree of parameters and a stranger's table of tensors, exactly.

A format is a function from the path of one of our leaves to a `Home`: the keys it is
stored under, and how the numbers are laid out there. Everything else follows from it:
the table of keys and shapes a file must have, reading, and writing. Reading what was
written is the identity, bit for bit, since a layout only moves numbers.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

from ldm_jax.pretrained.tensors import Tensors, match_keys
from ldm_jax.types import PyTree

Path = tuple[str, ...]
Parts = list[np.ndarray]


@runtime_checkable
class Layout(Protocol):
    """How one of our leaves is laid out in a stranger's tensors."""

    def write(self, ours: np.ndarray) -> Parts:
        """Return the stranger's tensors, as views where possible."""
        ...

    def read(self, theirs: Parts) -> np.ndarray:
        """Return our leaf."""
        ...


class Home(NamedTuple):
    """Where one of our leaves lives."""

    keys: tuple[str, ...]
    """The stranger's keys, as many as the layout has parts."""
    layout: Layout
    """How it is laid out there."""


Format = Callable[[Path], Home]


@dataclasses.dataclass(frozen=True)
class Same:
    """The same numbers in the same order: norms, biases, tables."""

    def write(self, ours: np.ndarray) -> Parts:
        """Return the leaf itself."""
        return [ours]

    def read(self, theirs: Parts) -> np.ndarray:
        """Return the tensor itself."""
        return theirs[0]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A matrix or convolution: ours (..., in, out), theirs (out, in, ...)."""

    ones: int = 0
    """Axes of length 1 that they append to a matrix: 2 where it is stored as a
    convolution of images, 1 of sequences."""

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
    """One of our leaves, cut along its last axis into equal parts: q, k, v."""

    parts: int
    """How many."""
    each: Layout
    """Layout of a part."""

    def write(self, ours: np.ndarray) -> Parts:
        """Cut, then lay out each part."""
        return [
            self.each.write(part)[0] for part in np.split(ours, self.parts, axis=-1)
        ]

    def read(self, theirs: Parts) -> np.ndarray:
        """Read each part, then join."""
        return np.concatenate([self.each.read([part]) for part in theirs], axis=-1)


@dataclasses.dataclass(frozen=True)
class HeadsFirst:
    """Fused q, k, v whose last axis is packed (head, qkv, d); ours is (qkv, head, d).

    Source:
      latent-diffusion `QKVAttentionLegacy`.
    """

    num_heads: int
    """Heads."""
    inner: Layout
    """Layout after the packing is changed."""

    def write(self, ours: np.ndarray) -> Parts:
        """Pack by heads."""
        return self.inner.write(self._swap(ours, 3, self.num_heads))

    def read(self, theirs: Parts) -> np.ndarray:
        """Pack by q, k, v."""
        return self._swap(self.inner.read(theirs), self.num_heads, 3)

    def _swap(self, array: np.ndarray, outer: int, inner: int) -> np.ndarray:
        split = array.reshape(*array.shape[:-1], outer, inner, -1)
        return np.swapaxes(split, -3, -2).reshape(array.shape)


def plain(
    path: Path,
    prefix: str,
    *,
    ones: int = 0,
    leaf_names: Mapping[str, str] | None = None,
) -> Home:
    """Give a leaf of a plain module its home: a norm, convolution, matrix or table.

    Args:
      path: Ours; its last name tells the kind.
      prefix: Their name of the module.
      ones: Trailing axes of length 1, if a matrix is stored as a convolution.
      leaf_names: Their names of leaves where they are unusual.

    Returns:
      The home.
    """
    leaf = path[-1]
    usual = "bias" if leaf == "bias" else "weight"
    key = f"{prefix}.{(leaf_names or {}).get(leaf, usual)}".removeprefix(".")
    return Home((key,), Kernel(ones) if leaf == "kernel" else Same())


def homes(shapes: PyTree, format_: Format) -> dict[Path, Home]:
    """Find the home of every leaf of a tree of nested dictionaries."""
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    paths = [tuple(str(key.key) for key in path) for path, _ in leaves]
    return {path: format_(path) for path in paths}


def key_shapes(shapes: PyTree, format_: Format) -> dict[str, tuple[int, ...]]:
    """List the keys and shapes that a file of this format must have.

    Args:
      shapes: Our tree, of arrays or of their shapes.
      format_: The stranger's.

    Returns:
      Shape by key.
    """
    table: dict[str, tuple[int, ...]] = {}
    for path, home in homes(shapes, format_).items():
        # A leaf of one number seen many times: the shapes without the memory.
        leaf = np.broadcast_to(np.float32(0.0), _get(shapes, path).shape)
        parts = home.layout.write(leaf)
        table |= {key: part.shape for key, part in zip(home.keys, parts, strict=True)}
    return table


def read_tree(
    shapes: PyTree, format_: Format, tensors: Tensors, *, what: str
) -> PyTree:
    """Read our tree from a stranger's tensors.

    Args:
      shapes: Our tree, of arrays or of their shapes.
      format_: The stranger's.
      tensors: Exactly the tensors of this network.
      what: What to call it in an error.

    Returns:
      The tree, float32 NumPy arrays.

    Raises:
      InputError: If a key is missing, unexpected, or of another shape.
    """
    match_keys(key_shapes(shapes, format_), tensors, what=what)
    tree: dict[str, PyTree] = {}
    for path, home in homes(shapes, format_).items():
        leaf = home.layout.read([tensors[key] for key in home.keys])
        branch = tree
        for name in path[:-1]:
            branch = branch.setdefault(name, {})
        branch[path[-1]] = np.ascontiguousarray(leaf, np.float32)
    return tree


def write_tree(tree: PyTree, format_: Format) -> dict[str, np.ndarray]:
    """Write our tree as a stranger's tensors.

    Args:
      tree: Nested dictionaries of arrays.
      format_: The stranger's.

    Returns:
      float32 arrays by key.
    """
    tensors: dict[str, np.ndarray] = {}
    for path, home in homes(tree, format_).items():
        leaf = np.asarray(_get(tree, path), np.float32)
        parts = home.layout.write(leaf)
        tensors |= {
            key: np.ascontiguousarray(part)
            for key, part in zip(home.keys, parts, strict=True)
        }
    return tensors


def _get(tree: PyTree, path: Path) -> PyTree:
    for name in path:
        tree = tree[name]
    return tree


def flatten(tree: PyTree, prefix: str = "") -> dict[str, PyTree]:
    """Name every leaf of nested dictionaries by its path, joined by slashes."""
    flat: dict[str, PyTree] = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        if isinstance(value, dict):
            flat |= flatten(value, f"{path}/")
        else:
            flat[path] = value
    return flat


def unflatten(flat: dict[str, np.ndarray]) -> PyTree:
    """Undo `flatten`."""
    tree: dict[str, PyTree] = {}
    for path, value in flat.items():
        *parents, name = path.split("/")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[name] = value
    return tree
