"""Averages of weights by a power of the step, and any of them from a few of them.

An average whose weight of step tau grows as tau**gamma keeps its shape, relative to the
training so far, however long that is. So its length is a share of training: the
standard deviation of its profile over its end, `sigma_rel`. From what two such averages
were at several steps, that of any other length follows afterwards, by least squares.

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
"""Cells that steps are grouped into, where there are more steps."""


class Profile(NamedTuple):
    """Which average it is, and when."""

    length: float
    """Relative; standard deviation of its profile over its last step."""
    step: int
    """The last one in it."""


class Mixture(NamedTuple):
    """How an average is made of others."""

    weights: Float[np.ndarray, " n"]
    """Of each of them; their sum is 1."""
    error: float
    """Distance of the profile that results from the one that is wanted, as a share of
    the norm of that."""


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
    """Return how much of an average becomes the newest parameters: 1 - beta.

    `1 - (1 - 1 / step) ** (gamma + 1)`, without its loss of digits late in training. At
    step 1 it is 1.

    Args:
      step: Updates made, the newest one counted; at least 1.
      length: Of the average.

    Source:
      Karras et al., arXiv:2312.02696, equation 3.
    """
    power = power_of(length) + 1.0
    return -jnp.expm1(power * jnp.log1p(-1.0 / step.astype(jnp.float32)))


def mixture(kept: list[Profile], wanted: Profile) -> Mixture:
    """Make an average of others, as near to the wanted one as can be.

    Least squares between the profiles, over all steps (or cells of several steps, where
    there are very many), among weights whose sum is 1: so parameters that stand still
    are left as they are. The profile of an average over cell (a, b] of steps has the
    mass `(b / step)**(gamma + 1) - (a / step)**(gamma + 1)`: with cells of one step,
    that is what `share_of_new` makes, exactly.

    Args:
      kept: The averages there are.
      wanted: The one to make.

    Returns:
      The weight of each, and how well the profiles agree.

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
    """Return the steps at which averages are kept, evenly, the last step the last."""
    steps = [round(i * num_steps / snapshots) for i in range(1, snapshots + 1)]
    return sorted({step for step in steps if step})


FOLDER = "averages"
DIGESTS = "digests"


def write_snapshot(
    folder: Path, lengths: tuple[float, ...], averages: tuple[PyTree, ...], step: int
) -> None:
    """Write averages as they are at a step, whole or not at all; the same bytes again.

    Args:
      folder: Of these files alone; made if it is not there.
      lengths: Relative lengths.
      averages: Their parameters, whole.
      step: Updates made.

    Raises:
      InputError: If they cannot be written.
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
    write_safetensors(folder / f"{step:06d}.safetensors", arrays, texts)


def kept_steps(folder: Path) -> list[int]:
    """List the steps of a folder's snapshots, in order."""
    names = (path.stem for path in folder.glob("*.safetensors"))
    return sorted(int(name) for name in names if name.isdigit())


def snapshot_key(length: float, path: tuple) -> str:
    """Return the key of a leaf of an average in a snapshot."""
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return f"{length!r}/{name}"


def array_digest(array: np.ndarray) -> str:
    """Return the sha256 of an array's bytes."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
