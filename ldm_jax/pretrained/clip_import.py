"""Import of CLIP's text encoder from tensors in transformers' naming."""

import jax
import numpy as np

from ldm_jax.config import ClipConfig
from ldm_jax.pretrained.diffusers_folder import Component, component_tensors
from ldm_jax.pretrained.diffusers_names import clip_format, text_tensors
from ldm_jax.pretrained.layouts import Format, key_shapes, read_tree, used_tensors
from ldm_jax.pretrained.tensors import Tensors
from ldm_jax.types import PyTree


def read_clip_tensors(
    tensors: Tensors, clip: ClipConfig, shapes: PyTree, *, what: str
) -> PyTree:
    """Read the text encoder's parameters, with or without the prefix `text_model.`.

    Args:
      tensors: Tensors of the text encoder or of a whole CLIP.
      shapes: Shapes of our encoder.
      what: Name of the tensors in an error.

    Raises:
      InputError: If a tensor is missing, unexpected, or of another shape.
    """
    used, format_ = text_tensors(tensors, clip), _text_format(tensors)
    return read_text_tree(shapes, format_, used, clip, what=what)


def read_clip_component(
    component: Component, clip: ClipConfig, shapes: PyTree
) -> PyTree:
    """Read the text encoder of a folder, whose config tells its number of layers.

    Raises:
      InputError: If a tensor is missing or of another shape.
    """
    what = str(component.directory)
    tensors = text_tensors(component_tensors(component), clip)
    format_ = _text_format(tensors)
    used = used_tensors(shapes, format_, tensors, what=what)
    return read_text_tree(shapes, format_, used, clip, what=what)


def _text_format(tensors: Tensors) -> Format:
    has_prefix = any(key.startswith("text_model.") for key in tensors)
    return clip_format("text_model." if has_prefix else "")


def read_text_tree(
    shapes: PyTree, format_: Format, tensors: Tensors, clip: ClipConfig, *, what: str
) -> PyTree:
    """Read the text encoder's parameters from tensors of any format.

    If the model reads the layer before the last, the file may lack the last layer,
    which is then zero.

    Args:
      shapes: Shapes of our encoder.
      tensors: Exactly the tensors of the encoder.
      what: Name of the tensors in an error.

    Raises:
      InputError: If a tensor is missing, unexpected, or of another shape.
    """
    name = f"layer_{clip.depth - 1}"
    last, zeros = {name: shapes[name]}, {}
    if clip.output == "penultimate" and not any(
        key in tensors for key in key_shapes(last, format_)
    ):
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), last)
        shapes = {key: shape for key, shape in shapes.items() if key != name}
    return {**read_tree(shapes, format_, tensors, what=what), **zeros}
