"""Import of CLIP's text encoder from tensors in transformers' naming."""

import jax
import numpy as np

from ldm_jax.config import ClipConfig
from ldm_jax.pretrained.diffusers_names import UNUSED_TEXT_TENSORS, clip_format
from ldm_jax.pretrained.layouts import read_tree
from ldm_jax.pretrained.tensors import Tensors
from ldm_jax.types import PyTree


def read_clip_tensors(
    tensors: Tensors, clip: ClipConfig, shapes: PyTree, *, what: str
) -> PyTree:
    """Read the text encoder's parameters, with or without the prefix `text_model.`.

    If the model reads the layer before the last, the file may lack the last layer,
    which is then zero.

    Args:
      tensors: Tensors of the text encoder or of a whole CLIP.
      shapes: Shapes of our encoder.
      what: Name of the tensors in an error.

    Raises:
      InputError: If a tensor is missing, unexpected, or of another shape.
    """
    prefix = "text_model." if any(k.startswith("text_model.") for k in tensors) else ""
    used = {
        key: entry
        for key, entry in tensors.entries.items()
        if not UNUSED_TEXT_TENSORS.fullmatch(key)
        and not key.startswith(("vision_model.", "visual_projection."))
        and (clip.output == "pooled" or key != "text_projection.weight")
    }
    last, zeros = f"{prefix}encoder.layers.{clip.depth - 1}.", {}
    if clip.output == "penultimate" and not any(key.startswith(last) for key in used):
        name = f"layer_{clip.depth - 1}"
        zeros[name] = jax.tree.map(
            lambda leaf: np.zeros(leaf.shape, np.float32), shapes[name]
        )
        shapes = {key: shape for key, shape in shapes.items() if key != name}
    tree = read_tree(shapes, clip_format(prefix), Tensors(used), what=what)
    return {**tree, **zeros}
