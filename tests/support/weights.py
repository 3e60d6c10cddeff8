"""Random weights that depend on names only, and the names of CLIP's tensors.

NumPy promises never to change what `RandomState` draws, so a golden file needs only a
seed and the shapes.
"""

import math
import re
import zlib

import numpy as np

CLIP_MODULES = {
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding": "position_embedding",
    "layer_norm1": "norm1",
    "self_attn.q_proj": "attention/q",
    "self_attn.k_proj": "attention/k",
    "self_attn.v_proj": "attention/v",
    "self_attn.out_proj": "attention/out",
    "layer_norm2": "norm2",
    "mlp.fc1": "mlp/in",
    "mlp.fc2": "mlp/out",
    "final_layer_norm": "norm_out",
    "text_projection": "projection",
}


def random_tensors(
    shapes: dict[str, tuple[int, ...]], seed: int
) -> dict[str, np.ndarray]:
    """Draw a float32 tensor for each name, as torch lays it out.

    Matrices and more have variance one over their fan-in, the product of all axes but
    the first; biases lie about 0, the scales of norms about 1, both with deviation 0.1.
    Each depends on its own name and the seed alone.
    """
    tensors = {}
    for key in sorted(shapes):
        shape = shapes[key]
        normal = np.random.RandomState(zlib.crc32(key.encode()) ^ seed).normal
        draw = normal(size=shape)
        if len(shape) >= 2:
            draw = draw * math.prod(shape[1:]) ** -0.5
        elif key.endswith("bias"):
            draw = 0.1 * draw
        else:
            draw = 1.0 + 0.1 * draw
        tensors[key] = np.asarray(draw, np.float32)
    return tensors


def clip_shapes(
    *,
    vocab_size: int,
    length: int,
    width: int,
    depth: int,
    mlp_width: int,
    projection_width: int | None = None,
) -> dict[str, tuple[int, ...]]:
    """List the tensors of a CLIP text encoder as transformers names them in a file."""
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.token_embedding.weight": (vocab_size, width),
        "embeddings.position_embedding.weight": (length, width),
        "final_layer_norm.weight": (width,),
        "final_layer_norm.bias": (width,),
    }
    for i in range(depth):
        matrices = {f"self_attn.{x}_proj": (width, width) for x in ("q", "k", "v")}
        matrices["self_attn.out_proj"] = (width, width)
        matrices |= {"mlp.fc1": (mlp_width, width), "mlp.fc2": (width, mlp_width)}
        for name, shape in matrices.items():
            shapes[f"encoder.layers.{i}.{name}.weight"] = shape
            shapes[f"encoder.layers.{i}.{name}.bias"] = shape[:1]
        for name in ("layer_norm1", "layer_norm2"):
            shapes[f"encoder.layers.{i}.{name}.weight"] = (width,)
            shapes[f"encoder.layers.{i}.{name}.bias"] = (width,)
    shapes = {f"text_model.{key}": shape for key, shape in shapes.items()}
    if projection_width is not None:
        shapes["text_projection.weight"] = (projection_width, width)
    return shapes


def clip_tree(state_dict: dict[str, np.ndarray]) -> dict:
    """Rename and transpose a CLIP text encoder to the parameters of ours."""
    flat = {}
    for key, value in state_dict.items():
        name, _, leaf = key.removeprefix("text_model.").rpartition(".")
        layer = ""
        if match := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", name):
            layer, name = f"layer_{match[1]}/", match[2]
        flat[f"{layer}{CLIP_MODULES[name]}", leaf] = value
    return tree_of_modules(flat)


def tree_of_modules(flat: dict[tuple[str, str], np.ndarray]) -> dict:
    """Nest tensors by (path of the module, torch's name of the leaf)."""
    tree = {}
    for (path, leaf), value in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in (*parents, name):
            node = node.setdefault(parent, {})
        if leaf == "bias":
            node["bias"] = value
        elif name.endswith("embedding"):
            node["embedding"] = value
        elif name.startswith("norm"):
            node["scale"] = value
        else:
            node["kernel"] = value.T
    return tree
