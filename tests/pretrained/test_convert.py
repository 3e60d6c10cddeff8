"""Weights written and read back in every format."""

import dataclasses

import numpy as np
import pytest

from ldm_jax.config import to_json
from ldm_jax.pretrained.compvis_export import write_compvis
from ldm_jax.pretrained.diffusers_export import write_folder
from ldm_jax.pretrained.model_weights import (
    write_native,
)
from ldm_jax.pretrained.open_weights import open_weights
from ldm_jax.types import InputError
from tests.support import models
from tests.support.models import config_of, model_of, same
from tests.support.pretrained import (
    native,
    refusal,
    trees,
)

KINDS = sorted(models.CONDITIONS)


def out_and_in(kind, tmp_path, format_):
    weights = model_of(config_of(kind))
    if format_ == "diffusers":
        path = tmp_path / "folder"
        path.mkdir()
        write_folder(weights, path)
    elif format_ == "compvis":
        path = tmp_path / "model.safetensors"
        write_compvis(weights, path)
    else:
        path = tmp_path
        write_native(weights, path)
        (path / "config.json").write_text(to_json(weights.config))
    return weights, open_weights(path).read()


@pytest.mark.parametrize("format_", ["diffusers", "compvis", "native"])
@pytest.mark.parametrize("kind", KINDS)
def test_export_and_import_is_the_identity(kind, format_, tmp_path):
    if format_ == "diffusers" and kind == "open_clip":
        pytest.skip("the last layer is not used there, so it is not written")
    weights, found = out_and_in(kind, tmp_path, format_)
    assert found.config == weights.config
    assert found.latent_scale == weights.latent_scale
    assert same(trees(found), trees(weights))


def test_diffusers_export_loses_only_the_unused_last_layer(tmp_path):
    weights, found = out_and_in("open_clip", tmp_path, "diffusers")
    lost = found.conditioner["encoder"].pop("layer_2")
    del weights.conditioner["encoder"]["layer_2"]
    assert not any(leaf.any() for leaf in lost["norm1"].values())
    assert same(trees(found), trees(weights))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_halves_the_file(dtype, tmp_path):
    weights = model_of(config_of("label"))
    paths = [tmp_path / f"{name}.safetensors" for name in ("full", "half")]
    write_compvis(weights, paths[0])
    write_compvis(weights, paths[1], dtype=dtype)
    full, half = (path.stat().st_size for path in paths)
    assert half < 0.6 * full
    found = open_weights(paths[1]).read()
    kernel, less = (m.unet["conv_in"]["kernel"] for m in (weights, found))
    assert less.dtype == np.float32
    assert np.abs(less - kernel).max() <= np.abs(kernel).max() / 128
    assert not np.array_equal(less, kernel)


def test_export_refuses_numbers_too_large_for_float16(tmp_path):
    weights = model_of(config_of("label"))
    weights.unet["conv_in"]["kernel"][0, 0, 0, 0] = 1e6
    with pytest.raises(InputError, match=r"input_blocks\.0\.0.*float16"):
        write_compvis(weights, tmp_path / "a.safetensors", dtype="float16")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["label", None])
def test_compvis_export_creates_the_parent_folder(kind, tmp_path):
    config = config_of(kind or "label")
    if kind is None:
        config = dataclasses.replace(config, stages=("autoencoder",))
    weights = model_of(config)
    if kind is None:
        weights = weights._replace(unet=None, conditioner={})
    path = tmp_path / "a" / "b" / "model.safetensors"
    write_compvis(weights, path)
    assert same(open_weights(path).read().autoencoder, weights.autoencoder)


def test_export_leaves_neighbouring_folders_unchanged(tmp_path):
    from ldm_jax.pretrained.convert import export_run

    source, out = native(config_of("label"), tmp_path / "in"), tmp_path / "out"
    (mine := tmp_path / "out.part").mkdir()
    (mine / "mine").write_text("mine")
    export_run(source, out, layout="diffusers")
    assert (mine / "mine").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out", "out.part"]
    # The export has the permissions of any new folder.
    assert out.stat().st_mode == mine.stat().st_mode
    found = open_weights(out).read()
    assert same(trees(found), trees(model_of(config_of("label"))))


@pytest.mark.parametrize("format_", ["diffusers", "compvis"])
def test_export_refuses_a_folder_that_is_not_a_run(format_, tmp_path):
    from ldm_jax.pretrained.convert import export_run

    out = tmp_path / "out.safetensors"
    message = refusal(export_run, tmp_path, out, layout=format_)
    assert message.startswith(f"{tmp_path}: not a run") and "--workdir" not in message
    assert not list(tmp_path.iterdir())
