"""Weights of the Inception network of FID, from the files they come in."""

from pathlib import Path

import jax
import numpy as np

from ldm_jax.interop.names import Home, plain, read_tree
from ldm_jax.interop.names import Path as LeafPath
from ldm_jax.interop.weights import Tensors, open_tensors
from ldm_jax.nn.inception import INCEPTION_SIDE, Inception
from ldm_jax.types import PyTree

UNREAD = ("fc.bias", "num_batches_tracked")
"""Ends of keys of what scores do not use: published scores leave the bias out."""
LEAF_NAMES = {"mean": "running_mean", "variance": "running_var"}


def inception_format(path: LeafPath) -> Home:
    """Return where a leaf of `Inception` is in files of pytorch-fid, torch-fidelity."""
    names = list(path[:-1])
    if names[0] != "fc":
        names[0] = names[0].capitalize()
    return plain(path, ".".join(names), leaf_names=LEAF_NAMES)


def load_inception(file: Path) -> PyTree:
    """Read the parameters of `Inception`.

    Args:
      file: `pt_inception-2015-12-05-6726825d.pth` of pytorch-fid, torch-fidelity's
        `weights-inception-2015-12-05-6726825d.pth`, or the same as safetensors. Read
        without torch; nothing in it is run.

    Returns:
      The tree, NumPy arrays, float32.

    Raises:
      InputError: If it cannot be read, or is of another network.
    """
    tensors = open_tensors(file)
    kept = Tensors.from_arrays(
        {key: tensors[key] for key in tensors if not key.endswith(UNREAD)}
    )
    what = f"{file}: the Inception network of FID"
    return read_tree(inception_shapes(), inception_format, kept, what=what)


def inception_shapes() -> PyTree:
    """Return the shapes of the parameters of `Inception`."""
    side = INCEPTION_SIDE
    image = jax.ShapeDtypeStruct((1, side, side, 3), np.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(Inception().init, key, image)["params"]
