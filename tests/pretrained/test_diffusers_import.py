"""Import of diffusers folders."""

import re

import numpy as np
import pytest

from ldm_jax.files import write_safetensors
from ldm_jax.pretrained.diffusers_export import write_folder
from ldm_jax.pretrained.open_weights import open_weights
from ldm_jax.pretrained.tensors import open_tensors
from ldm_jax.types import InputError
from tests.data.test_tokenizer import write_clip
from tests.support.models import config_of, model_of, same
from tests.support.pretrained import (
    edit,
    refusal,
    with_condition,
    without_own_config,
    written,
)


@pytest.mark.parametrize("kind", ["none", "clip", "open_clip"])
def test_diffusers_import_without_our_config_builds_the_same_networks(kind, tmp_path):
    config = config_of(kind)
    weights = model_of(config)
    if kind != "none":
        tokenizer = str(write_clip(tmp_path))
        weights = weights._replace(config=with_condition(config, tokenizer=tokenizer))
    out = tmp_path / "out"
    out.mkdir()
    write_folder(weights, out)
    found = open_weights(without_own_config(out)).read()
    assert same(found.unet, weights.unet)
    assert same(found.autoencoder, weights.autoencoder)
    ours, theirs = config.diffusion, found.config.diffusion
    assert theirs.prediction == ours.prediction
    assert (theirs.schedule, theirs.beta_end) == (ours.schedule, ours.beta_end)
    assert found.config.latent_shape == config.latent_shape
    assert found.latent_scale == weights.latent_scale


@pytest.mark.parametrize(
    ("part", "values", "words"),
    [
        ("unet", {"act_fn": "gelu"}, ["act_fn", "gelu", "silu"]),
        ("unet", {"freq_shift": 1}, ["freq_shift"]),
        ("unet", {"a_new_field": 3}, ["a_new_field", "not known"]),
        ("unet", {"block_out_channels": [32, 48]}, ["block_out_channels", "multiples"]),
        ("unet", {"block_out_channels": "wide"}, ["block_out_channels", "list"]),
        ("unet", {"sample_size": None}, ["sample_size", "number"]),
        ("unet", {"in_channels": 5}, ["in_channels"]),
        ("unet", {"out_channels": 6}, ["out_channels"]),
        ("unet", {"_class_name": "UNet3D"}, ["UNet3D"]),
        ("vqvae", {"norm_type": "spatial"}, ["norm_type"]),
        ("vqvae", {"num_vq_embeddings": 7}, ["quantize.embedding.weight", "(7, 3)"]),
        ("vqvae", {"up_block_types": ["UpDecoderBlock2D"]}, ["up_block_types"]),
    ],
)
def test_diffusers_import_refuses_unsupported_fields(part, values, words, tmp_path):
    path = without_own_config(written("none", tmp_path))
    edit(path / part / "config.json", **values)
    if "_class_name" in values:
        edit(path / "model_index.json", unet=["diffusers", values["_class_name"]])
    with pytest.raises(InputError) as caught:
        open_weights(path).read()
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(("kind", "part"), [("clip", "vae"), ("none", "unet")])
def test_diffusers_import_reads_old_attention_names_everywhere(kind, part, tmp_path):
    path = written(kind, tmp_path)
    (file,) = (path / part).glob("*.safetensors")
    tensors = open_tensors(file)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for key in tensors:
        name = key
        for new, before in old.items():
            name = re.sub(
                rf"(attentions\.\d+)\.{re.escape(new)}\.", rf"\1.{before}.", name
            )
        renamed[name] = tensors[key]
    assert sum("proj_attn" in key for key in renamed) >= 4
    write_safetensors(file, renamed)
    found = open_weights(path).read()
    assert same(found.unet, model_of(config_of(kind)).unet)
    assert same(found.autoencoder, model_of(config_of(kind)).autoencoder)


@pytest.mark.parametrize(
    ("part", "key"),
    [
        ("unet", "loss.weight"),
        ("vae", "encoder.mid_block.resnets.7.conv1.bias"),
        ("text_encoder", "text_model.encoder.layers.7.layer_norm1.bias"),
    ],
)
def test_tensors_that_the_config_of_a_folder_does_not_know_are_named(
    part, key, tmp_path, caplog
):
    path = written("clip", tmp_path)
    (file,) = (path / part).glob("*.safetensors")
    stored = open_tensors(file)
    tensors = {name: stored[name] for name in stored}
    write_safetensors(file, {**tensors, key: np.ones(2, np.float32)})
    found = open_weights(path).read()
    weights = model_of(config_of("clip"))
    assert same(
        (found.autoencoder, found.unet, found.conditioner),
        (weights.autoencoder, weights.unet, weights.conditioner),
    )
    (record,) = caplog.records
    assert key in record.getMessage() and part in record.getMessage()
    few = dict(list(tensors.items())[1:])
    write_safetensors(file, {**few, key: np.ones(2, np.float32)})
    message = refusal(open_weights(path).read)
    assert "1 missing" in message and "1 extra" in message


PARTS_BESIDE = [
    ("bert", "LDMBertModel", "config.json"),
    ("text_encoder", "CLIPTextModel", "config.json"),
    ("tokenizer", "CLIPTokenizer", "tokenizer_config.json"),
    ("words", "BertTokenizer", "tokenizer_config.json"),
    ("other", "AutoencoderKL", "config.json"),
]


def test_diffusers_import_refuses_unused_components_by_name(tmp_path):
    path = without_own_config(written("none", tmp_path))
    index = path / "model_index.json"
    text = index.read_text()
    open_weights(path)
    for name, class_name, file in PARTS_BESIDE:
        edit(index, **{name: ["transformers", class_name]})
        (path / name).mkdir()
        (path / name / file).write_text("{}")
        message = refusal(open_weights, path)
        assert class_name in message and f" {name}," in message
        index.write_text(text)


def test_diffusers_import_refuses_a_pipeline_with_bert(tmp_path):
    path = without_own_config(written("none", tmp_path))
    edit(path / "model_index.json", _class_name="LDMTextToImagePipeline")
    message = refusal(open_weights, path)
    assert "LDMTextToImagePipeline" in message and "--config" in message


def test_diffusers_import_names_our_damaged_config(tmp_path):
    path = written("label", tmp_path)
    for content in (b"\xff", b"{", b"[]", b"", b"[" * 99_999):
        (path / "ldm_jax.json").write_bytes(content)
        assert "ldm_jax.json" in refusal(open_weights, path)
    (path / "ldm_jax.json").write_text("{}")
    assert "fields missing" in refusal(open_weights, path)
