"""TODO."""

import functools
import json
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from ldm_jax.pretrained.tensors import Tensors, match_keys, open_tensors
from ldm_jax.training.ema import (
    DIGESTS,
    Mixture,
    Profile,
    _digest,
    _key,
    kept_steps,
    mixture,
)
from ldm_jax.types import InputError, PyTree

MOST_ERROR = 0.25
"""Of a profile, as a share: one that is further off is another length's."""


class Made(NamedTuple):
    """An average that was made of others."""

    tree: PyTree
    """Its parameters, NumPy arrays."""
    step: int
    """The last one in it."""
    mixture: Mixture
    """How it was made."""


def make_average(
    folder: Path,
    shapes: PyTree,
    *,
    lengths: tuple[float, ...],
    length: float,
    step: int | None,
    newest: int,
) -> Made:
    """Make the average of any relative length of those that were kept.

    Args:
      folder: Of the snapshots.
      shapes: Of the parameters.
      lengths: Those that were kept.
      length: The one to make.
      step: Its last one, at which there is a snapshot; None for the newest there is.
      newest: The run's own last step; a snapshot after it is of a run that was killed.

    Returns:
      The average.

    Raises:
      InputError: If there is no snapshot, one of them is damaged or of another model,
        or the length is too far from all that was kept.
    """
    steps = [kept for kept in kept_steps(folder) if kept <= newest]
    if not steps or step not in (None, *steps):
        there = ", ".join(map(str, steps)) or "none yet"
        raise InputError(
            f"--ema-length: {folder} has no averages of step {step or newest}; there "
            f"are {there}"
        )
    end = steps[-1] if step is None else step
    steps = [kept for kept in steps if kept <= end]
    kept = [Profile(one, at) for at in steps for one in lengths]
    found = mixture(kept, Profile(length, end))
    if found.error > MOST_ERROR:
        raise InputError(
            f"--ema-length: got {length:g}, but the nearest average that {len(steps)} "
            f"snapshots of {' and '.join(f'{one:g}' for one in lengths)} make is "
            f"{100 * found.error:.0f} % off, wanted at most {100 * MOST_ERROR:.0f} %; "
            "try a length nearer to those that were kept"
        )
    files = {at: folder / f"{at:06d}.safetensors" for at in steps}
    opened = {at: open_tensors(path) for at, path in files.items()}
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    for at, path in files.items():
        wanted = {_key(one, p): leaf.shape for one in lengths for p, leaf in leaves}
        match_keys(wanted, opened[at], what=str(path))
    digests = {at: json.loads(one.metadata[DIGESTS]) for at, one in opened.items()}
    read = functools.partial(_read, files=files, opened=opened, digests=digests)

    def make(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        # One leaf at a time: all snapshots together may be larger than memory.
        total = np.zeros(leaf.shape, np.float64)
        for profile, weight in zip(kept, found.weights, strict=True):
            total += weight * read(profile.step, _key(profile.length, path))
        return total.astype(leaf.dtype)

    return Made(jax.tree_util.tree_map_with_path(make, shapes), end, found)


def _read(
    step: int,
    key: str,
    *,
    files: dict[int, Path],
    opened: dict[int, Tensors],
    digests: dict[int, dict[str, str]],
) -> np.ndarray:
    array = opened[step][key]
    if _digest(array) != digests[step].get(key):
        raise InputError(
            f"{files[step]}: {key} is not what was saved; try moving the file away: "
            "the length is made of the others then"
        )
    return array
