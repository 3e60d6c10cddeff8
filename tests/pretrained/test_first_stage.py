"""Import of first stages from weights."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest

from ldm_jax.build import build_model
from ldm_jax.files import write_safetensors
from ldm_jax.pretrained.compvis_export import write_compvis
from ldm_jax.pretrained.diffusers_export import write_folder
from ldm_jax.pretrained.first_stage import different_autoencoder, import_first_stage
from ldm_jax.pretrained.frozen import PretrainedWeights, load_frozen
from tests.support.models import config_of, model_of, same
from tests.support.pretrained import (
    compvis_arrays,
    native,
    refusal,
    with_first,
)


def test_a_run_of_an_autoencoder_alone_keeps_no_frozen_text_encoder(tmp_path):
    config = dataclasses.replace(config_of("clip"), stages=("autoencoder",))
    found = load_frozen(config, build_model(config), tmp_path)
    assert found == PretrainedWeights(None, None, {})


# These keep the shapes of tensors, or are refused before a tensor is read.
OTHER_AUTOENCODERS = [
    ({"num_groups": 4}, "num_groups (8 there, 4 here)"),
    ({"attention_resolutions": (16,)}, "attention levels (() there, (0,) here)"),
    ({"channels": 32}, "channels (16 there, 32 here)"),
    ({"regularizer": "vq"}, "regularizer ('kl' there, 'vq' here)"),
]


@pytest.mark.parametrize("form", ["native", "diffusers", "component", "file"])
def test_a_first_stage_of_another_network_is_refused_by_field(form, tmp_path):
    config = config_of("label")
    path = tmp_path / "it"
    if form == "native":
        native(config, path)
    elif form == "file":
        write_compvis(model_of(config), path := tmp_path / "it.safetensors")
    else:
        path.mkdir()
        write_folder(model_of(config), path)
    path = path / "vae" if form == "component" else path
    params, scale = import_first_stage(path, config)
    assert same(params, model_of(config).autoencoder)
    assert scale == config.autoencoder.latent_scale
    for fields, words in OTHER_AUTOENCODERS:
        other = with_first(config, **fields)
        message = refusal(import_first_stage, path, other)
        assert words in message and str(path) in message


def test_codebook_size_is_compared_only_for_vq():
    config = config_of("label")
    assert not different_autoencoder(with_first(config, codebook_size=7), config)
    config = config_of("none")
    found = different_autoencoder(with_first(config, codebook_size=7), config)
    assert found == ["codebook_size (7 there, 24 here)"]


def test_first_stages_of_two_image_sizes_are_the_same_network():
    config = with_first(config_of("label"), attention_resolutions=(8,))
    larger = dataclasses.replace(
        with_first(config, attention_resolutions=(16,)),
        data=dataclasses.replace(config.data, image_size=32),
    )
    assert not different_autoencoder(larger, config)


def test_import_first_stage_reads_the_scale_of_a_whole_model(tmp_path):
    weights, tensors = compvis_arrays()
    path = tmp_path / "a.safetensors"
    write_safetensors(path, tensors | {"scale_factor": np.float32(0.25).reshape(())})
    params, scale = import_first_stage(path, weights.config)
    assert scale == 0.25
    assert same(params, weights.autoencoder)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_import_first_stage_reads_a_rounded_scale_as_that_of_the_config(
    tmp_path, dtype
):
    weights, tensors = compvis_arrays()
    config = with_first(weights.config, latent_scale=0.18215)
    path = tmp_path / "a.safetensors"
    write_safetensors(path, tensors | {"scale_factor": np.asarray(0.18215, dtype)})
    assert import_first_stage(path, config)[1] == 0.18215
