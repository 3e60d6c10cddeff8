"""Post-hoc EMA: an average of any length, made of the averages that a run kept.

Source: Karras et al., arXiv:2312.02696, section 3.2.
"""

import functools
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from ldm_jax.files import check_file, parse_json
from ldm_jax.pretrained.tensors import Tensors, match_keys, open_tensors
from ldm_jax.training.ema import (
    DIGESTS,
    Mixture,
    Profile,
    array_digest,
    list_snapshots,
    mixture,
    snapshot_key,
    snapshot_path,
)
from ldm_jax.types import InputError, PyTree

MAX_ERROR = 0.25
"""Largest relative error of the profile of an average."""


AWAY = "try moving the file away: the average is then made of the others"


class PosthocAverage(NamedTuple):
    """An average made of others."""

    tree: PyTree
    """Parameters, NumPy arrays."""
    step: int
    """Last step in it."""
    mixture: Mixture
    """Weights of the kept averages."""


def make_average(
    folder: Path,
    shapes: PyTree,
    *,
    lengths: tuple[float, ...],
    length: float,
    step: int | None,
    newest: int,
    run: Path | None = None,
) -> PosthocAverage:
    """Make an average of any relative length from the averages that a run kept.

    Args:
      folder: Folder of the snapshots.
      shapes: Shapes of the parameters.
      lengths: Lengths that the run kept.
      length: Length to make.
      step: Last step of the average, at which there is a snapshot; None for the newest.
      newest: Last step of the run; later snapshots are of a run that was killed.
      run: Folder of the run, whose record the snapshots are compared with.

    Raises:
      InputError: If there is no snapshot, one is damaged or of another model, or the
        length is too far from all that were kept.
    """
    steps = [kept for kept in list_snapshots(folder) if kept <= newest]
    if not steps or step not in (None, *steps):
        there = ", ".join(map(str, steps)) or "none yet"
        raise InputError(
            f"--ema-length: got no averages of step {step or newest} in {folder}, "
            f"wanted one of the steps there: {there}"
        )
    end = steps[-1] if step is None else step
    steps = [kept for kept in steps if kept <= end]
    kept = [Profile(one, at) for at in steps for one in lengths]
    found = mixture(kept, Profile(length, end))
    if found.error > MAX_ERROR:
        raise InputError(
            f"--ema-length: got {length:g}, but the nearest average that {len(steps)} "
            f"snapshots of {' and '.join(f'{one:g}' for one in lengths)} make is "
            f"{100 * found.error:.0f} % off, wanted at most {100 * MAX_ERROR:.0f} %; "
            "try a length nearer to those that were kept"
        )
    files = {at: snapshot_path(folder, at) for at in steps}
    if run is not None:
        for path in files.values():
            check_file(run, path, remedy=AWAY)
    opened = {at: open_tensors(path) for at, path in files.items()}
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    for at, path in files.items():
        wanted = {
            snapshot_key(one, p): leaf.shape for one in lengths for p, leaf in leaves
        }
        match_keys(wanted, opened[at], what=str(path))
    digests = {
        at: parse_json(
            one.metadata.get(DIGESTS, ""), what=f"{files[at]}: {DIGESTS}", remedy=AWAY
        )
        for at, one in opened.items()
    }
    read = functools.partial(_read, files=files, opened=opened, digests=digests)

    def make(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        # One leaf at a time: all snapshots together may be larger than memory.
        total = np.zeros(leaf.shape, np.float64)
        for profile, weight in zip(kept, found.weights, strict=True):
            total += weight * read(profile.step, snapshot_key(profile.length, path))
        return total.astype(leaf.dtype)

    return PosthocAverage(jax.tree_util.tree_map_with_path(make, shapes), end, found)


def _read(
    step: int,
    key: str,
    *,
    files: dict[int, Path],
    opened: dict[int, Tensors],
    digests: dict[int, dict[str, str]],
) -> np.ndarray:
    array = opened[step][key]
    if array_digest(array) != digests[step].get(key):
        raise InputError(f"{files[step]}: {key} is damaged; {AWAY}")
    return array
