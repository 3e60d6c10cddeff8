"""Helpers of the tests of weights: files of every format, and refusals."""

import dataclasses
import json

import pytest

from ldm_jax.config import to_json
from ldm_jax.pretrained.compvis_names import (
    AUTOENCODER_PREFIX,
    CONDITIONER_PREFIX,
    UNET_PREFIX,
    autoencoder_format,
    conditioner_format,
    unet_format,
)
from ldm_jax.pretrained.diffusers_export import write_folder
from ldm_jax.pretrained.layouts import write_tree
from ldm_jax.pretrained.model_weights import (
    ModelWeights,
    write_native,
)
from ldm_jax.pretrained.open_weights import network_shapes
from ldm_jax.pretrained.tensors import Tensors
from ldm_jax.types import InputError
from tests.support.models import config_of, model_of


def trees(weights: ModelWeights):
    return weights.autoencoder, weights.unet, weights.conditioner


def without_own_config(out):
    (out / "ldm_jax.json").unlink()
    return out


def compvis_arrays(kind="label"):
    """Return a small model's weights, and its tensors in CompVis naming."""
    weights = model_of(config_of(kind))
    diffusion, tensors = weights.config.diffusion, {}
    for prefix, tree, format_ in (
        (UNET_PREFIX, weights.unet, unet_format(diffusion)),
        (AUTOENCODER_PREFIX, weights.autoencoder, autoencoder_format),
        (
            CONDITIONER_PREFIX,
            weights.conditioner,
            conditioner_format(diffusion.condition),
        ),
    ):
        written = write_tree(tree, format_)
        tensors |= {prefix + key: value for key, value in written.items()}
    return weights, tensors


def read_arrays(weights, tensors):
    from ldm_jax.pretrained.compvis_import import read_compvis

    config = weights.config
    shapes = network_shapes(config)
    return read_compvis(Tensors.from_arrays(tensors), config, shapes, what="it")


def written(kind, tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    write_folder(model_of(config_of(kind)), path)
    return path


def edit(path, **values):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **values}))


def native(config, path):
    path.mkdir()
    write_native(model_of(config), path)
    (path / "config.json").write_text(to_json(config))
    return path


def with_first(config, **fields):
    first = dataclasses.replace(config.autoencoder, **fields)
    return dataclasses.replace(config, autoencoder=first)


def refusal(call, *args, **kwargs):
    with pytest.raises(InputError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def with_condition(config, **fields):
    condition = dataclasses.replace(config.diffusion.condition, **fields)
    diffusion = dataclasses.replace(config.diffusion, condition=condition)
    return dataclasses.replace(config, diffusion=diffusion)
