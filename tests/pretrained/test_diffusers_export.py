"""Export of diffusers folders."""

import dataclasses
import json

import pytest

from ldm_jax.pretrained.diffusers_export import write_folder
from ldm_jax.pretrained.open_weights import open_weights
from ldm_jax.types import InputError
from tests.data.test_tokenizer import write_clip
from tests.support.models import config_of, model_of
from tests.support.pretrained import (
    with_condition,
)


def test_diffusers_export_writes_the_parts_of_a_pipeline(tmp_path):
    config = with_condition(config_of("clip"), tokenizer=str(write_clip(tmp_path)))
    out = tmp_path / "out"
    out.mkdir()
    write_folder(model_of(config), out)
    index = json.loads((out / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["text_encoder"] == ["transformers", "CLIPTextModel"]
    assert (out / "tokenizer" / "vocab.json").exists()
    assert (
        json.loads((out / "ldm_jax.json").read_text())["diffusion"]["condition"][
            "tokenizer"
        ]
        is None
    )
    opened = open_weights(out)
    assert opened.config.diffusion.condition.tokenizer == str(out / "tokenizer")
    # "" is begin, then padding: the null condition of guidance.
    assert opened.model.null_tokens[0] == 519


def test_diffusers_export_names_the_unsupported_field(tmp_path):
    config = config_of("label", channel_multipliers=(1, 2), attention_downsampling=(1,))
    config = dataclasses.replace(
        config, diffusion=dataclasses.replace(config.diffusion, num_heads=2)
    )
    with pytest.raises(InputError, match=r"num_heads.*compvis"):
        write_folder(model_of(config), tmp_path)


@pytest.mark.parametrize(
    ("kind", "name"), [("clip", "CLIPTokenizer"), ("text", "BertTokenizer")]
)
def test_exported_tokenizer_has_the_class_of_its_encoder(kind, name, tmp_path):
    (tokenizer := tmp_path / "tokenizer").mkdir()
    if kind == "clip":
        write_clip(tokenizer)
    else:
        (tokenizer / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    weights = model_of(config_of(kind))
    config = with_condition(weights.config, tokenizer=str(tokenizer))
    (out := tmp_path / "out").mkdir()
    write_folder(weights._replace(config=config), out)
    settings = json.loads((out / "tokenizer" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == name
