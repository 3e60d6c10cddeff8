"""Recorded outputs of the original networks for the same names, seeds and inputs.

latent-diffusion's classes (commit a506df57 of CompVis/latent-diffusion, 3ba01b24 of
CompVis/taming-transformers, open_clip_torch 3.3.0) and those of diffusers 0.42 and
transformers 5.24 ran on torch 2.13. `tests.parity.test_golden_files` defines the cases
and writes the files.
"""

import jax
import numpy as np
import pytest

from ldm_jax.config import Config
from ldm_jax.pretrained import compvis_names
from ldm_jax.pretrained.layouts import read_tree, write_tree
from ldm_jax.pretrained.tensors import Tensors
from ldm_jax.types import PyTree
from tests.parity import diffusers_models
from tests.support.golden_cases import (
    FORMATS,
    digest,
    draw_tensors,
    formats,
    make_config,
    make_inputs,
    read_golden,
    run_ours,
    stored_table,
    summary,
    summary_error,
    tree_shapes,
)
from tests.support.weights import random_tensors

CASES = [
    (family, case)
    for family in ("compvis", "diffusers")
    for case in read_golden(f"{family}.json")
]
every_case = pytest.mark.parametrize(
    ("family", "case"),
    CASES,
    ids=[f"{family}: {case['name']}" for family, case in CASES],
)


def config_and_kind(case: dict) -> tuple[Config, str]:
    if "config" in case:
        return make_config(case["config"]), case["kind"]
    return diffusers_models.config_and_kind(case["class_name"], case["settings"])


@every_case
def test_parameter_names_and_shapes_equal_the_originals(family, case):
    config, kind = config_and_kind(case)
    format_ = FORMATS[family, kind](config)
    assert digest(stored_table(config, kind, format_)) == (case["keys"], case["sha256"])


@every_case
def test_outputs_and_gradients_equal_the_originals(family, case):
    config, kind = config_and_kind(case)
    format_ = FORMATS[family, kind](config)
    table = stored_table(config, kind, format_)
    tensors = draw_tensors(table, case["seed"], case["gain"])
    stored = Tensors.from_arrays(compvis_names.split_in_proj(tensors))
    params = read_tree(tree_shapes(config, kind), format_, stored, what=kind)
    ours = run_ours(
        config,
        kind,
        params,
        make_inputs(config, kind, case["seed"]),
        gradient=any(name.endswith("_gradient") for name in case["outputs"]),
    )
    assert ours.keys() == case["outputs"].keys()
    for name, theirs in case["outputs"].items():
        # Another order of summation makes at most 1e-5. The smallest errors to detect:
        # a wrong epsilon of layer norms makes 6e-5, the tanh form of GELU 9e-5.
        assert summary_error(summary(ours[name]), theirs) < 3e-5


def draw(shapes: PyTree, seed: int) -> PyTree:
    normal = np.random.RandomState(seed).normal
    return jax.tree.map(lambda x: normal(size=x.shape).astype(np.float32), shapes)


@every_case
def test_parameters_round_trip_through_every_format(family, case):
    config, kind = config_and_kind(case)
    params = draw(tree_shapes(config, kind), case["seed"])
    for format_ in formats(config, kind):
        stored = Tensors.from_arrays(write_tree(params, format_))
        back = read_tree(params, format_, stored, what=kind)
        assert jax.tree.structure(back) == jax.tree.structure(params)
        jax.tree.map(np.testing.assert_array_equal, back, params)


def test_split_in_proj_inverts_join_in_proj():
    names = {f"a.{part}_in_proj.weight": (6, 4) for part in "qkv"}
    names |= {f"a.{part}_in_proj.bias": (6,) for part in "qkv"} | {"b.weight": (3, 2)}
    split = random_tensors(names, 0)
    joined = compvis_names.join_in_proj(split)
    assert {key: tensor.shape for key, tensor in joined.items()} == {
        "a.in_proj_weight": (18, 4),
        "a.in_proj_bias": (18,),
        "b.weight": (3, 2),
    }
    back = compvis_names.split_in_proj(joined)
    assert back.keys() == split.keys()
    for key in split:
        np.testing.assert_array_equal(back[key], split[key])
