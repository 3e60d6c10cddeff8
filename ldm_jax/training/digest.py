"""A digest of every leaf of a tree, computed on the devices that hold it.

Orbax restores flipped bits without an error. A cryptographic hash needs a whole leaf on
one host; on a pod leaves are sharded. The digest of a leaf is a sum over its elements,
modulo 2**32, of a mix of the element's bits and index, with four sets of constants. It
does not depend on the sharding, takes one pass on the device, and any change of one
element changes it (the mix is a bijection).
"""

import hashlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Shaped, UInt32

from ldm_jax.files import json_digest
from ldm_jax.types import PyTree

LANES = (0x9E3779B9, 0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F)
MOST_BY_NUMPY = 2**20
"""Elements of a leaf up to which NumPy takes less time than compiling a program."""
PIECE = 2**13
"""Elements of one NumPy operation, which stay in the CPU's cache."""


class LeafDigest(NamedTuple):
    """Digest of a leaf."""

    digest: str
    """32 hexadecimal digits."""
    finite: bool
    """Whether every number is finite."""


def mix(x: UInt32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """Scramble 32 bits, a bijection.

    Source:
      Appleby, MurmurHash3, the finaliser of 32 bits.
    """
    x = x ^ (x >> 16)
    x = x * jnp.uint32(0x85EBCA6B)
    x = x ^ (x >> 13)
    x = x * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


@jax.jit
def examine(leaf: Array) -> tuple[UInt32[Array, " 4"], Bool[Array, ""]]:
    """Return the four sums of a leaf, and whether it is finite."""
    index = jnp.zeros(leaf.shape, jnp.uint32)
    for axis, size in enumerate(leaf.shape):
        place = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        index = index * jnp.uint32(size) + place
    # One loop over lanes and elements: a loop for each lane compiles slower.
    lanes = jnp.asarray(LANES, jnp.uint32).reshape(-1, *(1,) * leaf.ndim)
    words = words_of(leaf)
    mixed = jnp.zeros((), jnp.uint32)
    for number, word in enumerate(words):
        place = mix(index * jnp.uint32(len(words)) + jnp.uint32(number))
        mixed = mixed + mix(word[None] ^ mix(place[None] ^ lanes))
    sums = mixed.sum(tuple(range(1, leaf.ndim + 1)), dtype=jnp.uint32)
    is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
    finite = jnp.isfinite(leaf).all() if is_float else jnp.asarray(True)
    return sums, finite


def examine_here(
    leaf: Shaped[np.ndarray, "*shape"],
) -> tuple[UInt32[np.ndarray, " 4"], bool]:
    """Return the result of `examine` for an array on the host, without compiling."""
    leaf = leaf.astype(jax.dtypes.canonicalize_dtype(leaf.dtype), copy=False)
    flat = np.ascontiguousarray(leaf).reshape(-1)
    if flat.dtype == np.bool_:
        words = flat.astype(np.uint32)
    elif flat.itemsize < 4:
        words = flat.view(f"u{flat.itemsize}").astype(np.uint32)
    else:
        words = flat.view(np.uint32)
    sums = np.zeros(len(LANES), np.uint32)
    for start in range(0, len(words), PIECE):
        piece = words[start : start + PIECE]
        places = np.arange(start, start + len(piece), dtype=np.uint32)
        _mix_here(places)
        for number, lane in enumerate(LANES):
            mixed = places ^ np.uint32(lane)
            _mix_here(mixed)
            mixed ^= piece
            _mix_here(mixed)
            sums[number : number + 1] += mixed.sum(dtype=np.uint32)
    is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
    return sums, bool(np.isfinite(leaf).all()) if is_float else True


def _mix_here(x: UInt32[np.ndarray, " n"]) -> None:
    """Apply `mix` in place."""
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x85EBCA6B)
    x ^= x >> np.uint32(13)
    x *= np.uint32(0xC2B2AE35)
    x ^= x >> np.uint32(16)


def _is_here(leaf: Any) -> bool:
    """Return whether a leaf is small, and whole in this process' memory."""
    if np.size(leaf) > MOST_BY_NUMPY:
        return False
    if isinstance(leaf, Array):
        on_host = all(device.platform == "cpu" for device in leaf.devices())
        return on_host and leaf.is_fully_addressable
    return isinstance(leaf, np.ndarray)


def words_of(leaf: Shaped[Array, "*shape"]) -> list[UInt32[Array, "*shape"]]:
    """Return the bits of every element as words of 32."""
    if leaf.dtype == jnp.bool_:
        return [leaf.astype(jnp.uint32)]
    bits = jnp.dtype(leaf.dtype).itemsize * 8
    if bits <= 32:
        whole = jax.lax.bitcast_convert_type(leaf, f"uint{bits}")
        return [whole.astype(jnp.uint32)]
    parts = jax.lax.bitcast_convert_type(leaf, jnp.uint32)
    return [parts[..., i] for i in range(parts.shape[-1])]


def leaf_digests(tree: PyTree) -> dict[str, LeafDigest]:
    """Return the digest of every leaf by its path.

    Args:
      tree: Arrays, whole or sharded; if over several processes, a collective.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    found = jax.device_get(
        [
            examine_here(np.asarray(leaf)) if _is_here(leaf) else _first(examine(leaf))
            for _, leaf in leaves
        ]
    )
    return {
        jax.tree_util.keystr(path): LeafDigest(
            "".join(f"{int(lane):08x}" for lane in sums), bool(finite)
        )
        for (path, _), (sums, finite) in zip(leaves, found, strict=True)
    }


def join_digests(tree: PyTree, digests: dict[str, LeafDigest]) -> str:
    """Return the sha256 over path, dtype, shape and digest of every leaf."""
    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path)
        details = (
            f"{name} {np.dtype(leaf.dtype)} {np.shape(leaf)} {digests[name].digest}"
        )
        total.update(f"{details}\n".encode())
    return total.hexdigest()


def tree_digest(tree: PyTree) -> str:
    """Return the sha256 over path, dtype, shape and bytes of every leaf."""
    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.ascontiguousarray(jax.device_get(leaf))
        name = jax.tree_util.keystr(path)
        total.update(f"{name} {array.dtype} {array.shape}\n".encode())
        total.update(array.tobytes())
    return total.hexdigest()


def run_digest(
    digest_by_stage: dict[str, str], *, changes: list[dict[str, Any]]
) -> str:
    """Join the digests of the stages, and the changes of the run, into one sha256.

    Args:
      changes: As `files.read_record` gives them.
    """
    lines = [f"{name} {digest}\n" for name, digest in sorted(digest_by_stage.items())]
    if changes:
        lines.append(f"changes {json_digest({'changes': changes})}\n")
    text = "".join(lines)
    return hashlib.sha256(text.encode()).hexdigest()


def _first(tree: Any) -> Any:
    """Return this process' copy of replicated arrays."""
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)
