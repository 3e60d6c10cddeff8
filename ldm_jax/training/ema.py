"""Power-function averages of parameters, and post-hoc EMA.

An average that weights step tau by tau**gamma has a profile that keeps its shape
relative to the training so far. Its relative length `sigma_rel` is the standard
deviation of the profile divided by its last step. From snapshots of two such averages
an average of any other length can be computed after training, by least squares.

Source: Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion
Models", arXiv:2312.02696, section 3 and equations 2 to 5.
"""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ldm_jax.config.diffusion import LONGEST_AVERAGE
from ldm_jax.files import write_safetensors
from ldm_jax.types import PyTree

MOST_CELLS = 8192
"""Cells of steps in the least-squares problem, where there are more steps."""


class Profile(NamedTuple):
    """The profile of a power-function average: its weight of every step."""

    length: float
    """Relative length: standard deviation over last step."""
    step: int
    """Last step."""


class Mixture(NamedTuple):
    """A weighted sum of averages."""

    weights: Float[np.ndarray, " n"]
    """Weight of each average; their sum is 1."""
    error: float
    """Distance of the resulting profile from the wanted one, relative to its norm."""


def power_of(length: float) -> float:
    """Return the power gamma of a relative length.

    `length**2 = (gamma + 1) / ((gamma + 2)**2 * (gamma + 3))`, a cubic of one root
    above 0.

    Args:
      length: Above 0, at most `LONGEST_AVERAGE`.

    Raises:
      ValueError: If it is outside of that.

    Source:
      Karras et al., arXiv:2312.02696, equation 4 (their sigma_rel).
    """
    if not 0.0 < length <= LONGEST_AVERAGE:
        raise ValueError(f"got {length}, wanted above 0, at most {LONGEST_AVERAGE}")
    inverse = length**-2
    return float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max())


def share_of_new(step: Int[Array, ""], *, length: float) -> Float[Array, ""]:
    """Return the weight of the newest parameters in an average: 1 - beta.

    `1 - (1 - 1 / step) ** (gamma + 1)`, without its loss of digits late in training. At
    step 1 it is 1.

    Args:
      step: Updates made, including the newest; at least 1.
      length: Relative length of the average.

    Source:
      Karras et al., arXiv:2312.02696, equation 3.
    """
    power = power_of(length) + 1.0
    return -jnp.expm1(power * jnp.log1p(-1.0 / step.astype(jnp.float32)))


def mixture(kept: list[Profile], wanted: Profile) -> Mixture:
    """Approximate an average by a weighted sum of others.

    Least squares between the profiles, over all steps (or cells of several steps),
    among weights whose sum is 1, so that constant parameters stay as they are. The
    profile has the mass `(b / step)**(gamma + 1) - (a / step)**(gamma + 1)` in a cell
    (a, b] of steps; in cells of one step that is exactly what `share_of_new` gives.

    Args:
      kept: Profiles of the averages that exist.
      wanted: Profile to approximate.

    Source:
      Karras et al., arXiv:2312.02696, section 3.2 (least squares of profiles).
    """
    end = max(profile.step for profile in (*kept, wanted))
    edges = np.linspace(0.0, end, min(end, MOST_CELLS) + 1)
    masses = np.stack([_masses(profile, edges) for profile in (*kept, wanted)], axis=1)
    # A profile is mass over width; its square, integrated, is mass squared over width.
    columns = masses / np.sqrt(np.diff(edges))[:, None]
    base, others, target = columns[:, -2:-1], columns[:, :-2], columns[:, -1]
    moved, *_ = np.linalg.lstsq(others - base, target - base[:, 0], rcond=None)
    weights = np.append(moved, 1.0 - moved.sum())
    rest = columns[:, :-1] @ weights - target
    return Mixture(weights, float(np.linalg.norm(rest) / np.linalg.norm(target)))


def _masses(
    profile: Profile, edges: Float[np.ndarray, " m"]
) -> Float[np.ndarray, " n"]:
    power = power_of(profile.length) + 1.0
    reached = np.minimum(edges / profile.step, 1.0) ** power
    return np.diff(reached)


def snapshot_steps(num_steps: int, *, snapshots: int) -> list[int]:
    """Return evenly spaced steps for snapshots of averages; the last step is one."""
    steps = [round(i * num_steps / snapshots) for i in range(1, snapshots + 1)]
    return sorted({step for step in steps if step})


FOLDER = "averages"
DIGESTS = "digests"


def write_snapshot(
    folder: Path,
    lengths: tuple[float, ...],
    averages: tuple[PyTree, ...],
    step: int,
    *,
    run: Path | None = None,
) -> None:
    """Write a snapshot of averages atomically; equal averages give equal bytes.

    Args:
      folder: Holds snapshots alone; created if it does not exist.
      lengths: Relative lengths.
      averages: Their parameters, whole on this process.
      step: Updates made.
      run: Folder of the run that it belongs to, if any.

    Raises:
      InputError: If the file cannot be written.
    """
    folder.mkdir(exist_ok=True)
    arrays: dict[str, np.ndarray] = {}
    for length, tree in zip(lengths, averages, strict=True):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        arrays |= {
            snapshot_key(length, path): np.asarray(leaf) for path, leaf in leaves
        }
    digests = {key: array_digest(array) for key, array in arrays.items()}
    texts = {DIGESTS: json.dumps(digests, sort_keys=True)}
    write_safetensors(snapshot_path(folder, step), arrays, texts, run=run)


def snapshot_path(folder: Path, step: int) -> Path:
    """Return the path of the snapshot of a step."""
    return folder / f"{step:06d}.safetensors"


def list_snapshots(folder: Path) -> list[int]:
    """Return the steps of the snapshots in a folder, rising."""
    names = (path.stem for path in folder.glob("*.safetensors"))
    return sorted(int(name) for name in names if name.isdecimal())


def snapshot_key(length: float, path: tuple) -> str:
    """Return the key of a leaf of an average in a snapshot."""
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return f"{length!r}/{name}"


def array_digest(array: np.ndarray) -> str:
    """Return the sha256 of an array's bytes."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
