"""Golden files: the tensor names of a network, and a summary of its outputs.

A case is a small config and a seed. Weights are drawn from the names and shapes of the
original's tensors, inputs from the seed, so a file holds neither.
"""

import functools
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax import config as config_lib
from ldm_jax.build import build_model
from ldm_jax.config import Config
from ldm_jax.latent_diffusion import (
    init_autoencoder,
    init_conditioner,
    init_unet,
    param_shapes,
)
from ldm_jax.models.autoencoder import Autoencoder
from ldm_jax.models.conditioning import Condition, ConditionInputs
from ldm_jax.pretrained import compvis_names, diffusers_names
from ldm_jax.pretrained.layouts import Format, key_shapes
from ldm_jax.types import PyTree
from tests.support.weights import random_tensors

GOLDEN = Path(__file__).parents[1] / "golden"
NUM_VALUES = 16
NUM_PROJECTIONS = 4
CONTEXT_LENGTH = 5
FAST_TO_COMPILE = {"xla_backend_optimization_level": 0}
BATCH = 2

INSIDE_A_BRANCH = re.compile(
    r"\.(qkv|(to_)?[qkv](_proj)?|net\.0\.(proj|0)|c_fc|fc1)\.|in_proj_"
)
"""Layers that read a norm and are read by another layer."""

INIT = {
    "unet": init_unet,
    "autoencoder": init_autoencoder,
    "conditioner": init_conditioner,
}
FORMATS = {
    ("compvis", "unet"): lambda c: compvis_names.unet_format(c.diffusion),
    ("compvis", "autoencoder"): lambda c: compvis_names.autoencoder_format,
    ("compvis", "conditioner"): lambda c: compvis_names.conditioner_format(
        c.diffusion.condition
    ),
    ("diffusers", "unet"): lambda c: diffusers_names.unet_format(c.diffusion),
    ("diffusers", "autoencoder"): lambda c: diffusers_names.autoencoder_format(
        c.autoencoder
    ),
}

Table = dict[str, tuple[int, ...]]
Inputs = dict[str, np.ndarray]


def formats(config: Config, kind: str) -> list[Format]:
    """List every naming of a network's parameters."""
    # No UNet of diffusers has a pooled context: its export is refused.
    without = {"diffusers"} if config.diffusion.condition.pooled else set()
    found = [
        make(config)
        for (format_, named), make in FORMATS.items()
        if named == kind and format_ not in without
    ]
    if kind == "conditioner" and config.diffusion.condition.context == "clip":
        clip = diffusers_names.clip_format()
        found.append(lambda path: clip(path[1:]))
    return found


class Digest(NamedTuple):
    """A table of names and shapes, shortened.

    Attributes:
      keys: The number of names.
      sha256: Of its lines, sorted: the key, then its sides.
    """

    keys: int
    sha256: str


def digest(table: Mapping[str, tuple[int, ...]]) -> Digest:
    """Shorten a table of names and shapes."""
    lines = [" ".join([key, *map(str, table[key])]) + "\n" for key in sorted(table)]
    return Digest(len(lines), hashlib.sha256("".join(lines).encode()).hexdigest())


def make_config(fields: Mapping[str, Any]) -> Config:
    """Return the default config with some fields, nested as in JSON, put in."""
    tree = json.loads(config_lib.to_json(Config()))
    _put(tree, fields)
    return config_lib.from_json(json.dumps(tree))


def _put(tree: dict[str, Any], fields: Mapping[str, Any]) -> None:
    for name, value in fields.items():
        if isinstance(value, dict):
            _put(tree[name], value)
        else:
            tree[name] = value


@functools.cache
def tree_shapes(config: Config, kind: str) -> PyTree:
    """Return the shapes of the parameters of a network."""
    return param_shapes(INIT[kind], build_model(config))


def stored_table(config: Config, kind: str, format_: Format) -> Table:
    """List the names and shapes in a file, with fused tensors as the file has them."""
    table = key_shapes(tree_shapes(config, kind), format_)
    # One byte a number: only the shapes are read, and joined tensors are allocated.
    arrays = {k: np.broadcast_to(np.int8(0), shape) for k, shape in table.items()}
    return {k: array.shape for k, array in compvis_names.join_in_proj(arrays).items()}


def draw_tensors(table: Table, seed: int, gain: float) -> dict[str, np.ndarray]:
    """Draw a network's weights from their names.

    Args:
      table: Names and shapes.
      seed: Of the draw.
      gain: Scale of the weights whose output a norm reads. A small gain gives the norms
        so little variance that a wrong epsilon shows; a gain of 1 does not.

    Returns:
      Tensors by name.
    """
    tensors = random_tensors(table, seed)
    for key, tensor in tensors.items():
        scales_norm = tensor.ndim == 1 and not key.endswith("bias")
        if not scales_norm and not INSIDE_A_BRANCH.search(key):
            tensors[key] = np.float32(gain) * tensor
    return tensors


def make_inputs(config: Config, kind: str, seed: int) -> Inputs:
    """Draw what a network reads, with channels last."""
    draw = np.random.RandomState(seed)

    def normal(*shape: int) -> np.ndarray:
        return draw.normal(size=(BATCH, *shape)).astype(np.float32)

    def whole(end: int, *shape: int) -> np.ndarray:
        return draw.randint(0, end, (BATCH, *shape)).astype(np.int32)

    condition, data, side = config.diffusion.condition, config.data, config.latent_side
    inputs: Inputs = {}
    if kind == "autoencoder":
        inputs["images"] = normal(data.image_size, data.image_size, data.image_channels)
        inputs["latents"] = normal(*config.latent_shape)
        return inputs
    if kind == "unet":
        inputs |= {"x": normal(*config.latent_shape), "t": whole(1000)}
        if condition.context != "none":
            inputs["context"] = normal(CONTEXT_LENGTH, condition.context_width)
        if config.concat_channels:
            inputs["concat"] = normal(side, side, config.concat_channels)
    elif condition.concat == "segmentation":
        inputs["image"] = normal(
            data.image_size, data.image_size, condition.num_segments
        )
    if kind == "conditioner" and condition.uses_tokens:
        known = condition.text if condition.context == "text" else condition.clip
        inputs["tokens"] = whole(known.vocab_size, condition.num_tokens)
    if condition.label or (kind == "conditioner" and condition.uses_classes):
        inputs["label"] = whole(data.num_classes + 1)
    return inputs


def run_ours(
    config: Config, kind: str, params: PyTree, inputs: Inputs, *, gradient: bool
) -> dict[str, np.ndarray]:
    """Compute the outputs that a golden file summarises.

    Args:
      config: Of the networks.
      kind: Which of them.
      params: Its own.
      inputs: As `make_inputs` draws them.
      gradient: Whether the gradient of `projected(output)` is wanted, too.

    Returns:
      Outputs by name.
    """
    model = build_model(config)
    arrays = {name: jnp.asarray(value) for name, value in inputs.items()}

    def apply(module, params, *args, **kwargs):
        return module.apply({"params": params}, *args, **kwargs)

    def unet(params, x):
        names = ("label", "context", "concat")
        cond = Condition(**{name: arrays.get(name) for name in names})
        return apply(model.unet, params, x, arrays["t"], cond)

    def encode(params, images):
        method = Autoencoder.encode
        encoded = apply(model.autoencoder, params, images, method=method)
        if config.autoencoder.regularizer == "kl":
            return jnp.concatenate([encoded.mean, encoded.log_variance], axis=-1)
        return encoded.latents

    def decode(params, latents):
        method = Autoencoder.decode
        return apply(model.autoencoder, params, latents, method=method)

    def condition(params, inputs):
        given = apply(model.conditioner, params, ConditionInputs(**inputs))
        return given.concat if given.context is None else given.context

    if kind == "conditioner":
        return {"output": _run(condition, params, arrays)}
    if kind == "unet":
        return _with_gradient("output", unet, params, arrays["x"], gradient)
    return {
        **_with_gradient("moments", encode, params, arrays["images"], gradient),
        **_with_gradient("images", decode, params, arrays["latents"], gradient),
    }


def _with_gradient(
    name: str, function: Callable, params: PyTree, x: jax.Array, gradient: bool
) -> dict[str, np.ndarray]:
    if not gradient:
        return {name: _run(function, params, x)}

    def objective(x, params):
        output = function(params, x)
        weight = jnp.asarray(projections(output.size)[0])
        return weight @ output.ravel(), output

    both = jax.value_and_grad(objective, has_aux=True)
    (_, output), back = _run(both, x, params)
    return {name: output, f"{name}_gradient": back}


def _run(function: Callable, *args: PyTree) -> Any:
    """Run a function once, compiled as fast as possible, not optimised."""
    compiled = jax.jit(function).lower(*args).compile(compiler_options=FAST_TO_COMPILE)
    return jax.tree.map(np.asarray, compiled(*args))


def projections(size: int) -> np.ndarray:
    """Draw the directions that an array of this size is projected to, float32."""
    draw = np.random.RandomState(size).normal(size=(NUM_PROJECTIONS, size))
    return draw.astype(np.float32)


def summary(array: np.ndarray) -> list[float]:
    """Shorten an array to some of its values and projections of the whole.

    A projection is divided by the root of the size, so that it is as large as a value.
    """
    flat = np.asarray(array, np.float64).ravel()
    places = np.linspace(0, flat.size - 1, NUM_VALUES).astype(int)
    projected = projections(flat.size).astype(np.float64) @ flat / math.sqrt(flat.size)
    return [float(f"{x:.6g}") for x in (*flat[places], *projected)]


def summary_error(ours: list[float], theirs: list[float]) -> float:
    """Return the largest difference over the largest value."""
    difference = np.abs(np.asarray(ours) - np.asarray(theirs))
    return float(difference.max() / np.abs(theirs).max())


def write_golden(name: str, cases: list[dict[str, Any]]) -> None:
    """Write a golden file, a line a case."""
    lines = ",\n".join(json.dumps(case) for case in cases)
    (GOLDEN / name).write_text(f"[\n{lines}\n]\n")


def read_golden(name: str) -> list[dict[str, Any]]:
    """Read a golden file."""
    return json.loads((GOLDEN / name).read_text())
