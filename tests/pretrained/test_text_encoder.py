"""Import of frozen text encoders from weights."""

import dataclasses

from ldm_jax.pretrained.diffusers_export import write_folder
from ldm_jax.pretrained.open_weights import network_shapes
from ldm_jax.pretrained.text_encoder import import_clip
from tests.data.test_tokenizer import write_clip
from tests.support.models import config_of, model_of, same
from tests.support.pretrained import (
    refusal,
    with_condition,
)


def clip_folder(kind, tmp_path):
    tokenizer = str(write_clip(tmp_path))
    weights = model_of(config_of(kind))
    config = with_condition(weights.config, tokenizer=tokenizer)
    (out := tmp_path / "out").mkdir()
    write_folder(weights._replace(config=config), out)
    return weights, out


def import_conditioner(path, config):
    shapes = network_shapes(config).conditioner
    return import_clip(path, config.diffusion.condition.clip, shapes)


OTHER_TEXT_ENCODERS = [
    ({"num_heads": 4}, "num_heads (2 there, 4 here)"),
    ({"epsilon": 1e-6}, "epsilon (1e-05 there, 1e-06 here)"),
    ({"activation": "gelu"}, "activation ('quick_gelu' there, 'gelu' here)"),
    ({"width": 32}, "width (16 there, 32 here)"),
    ({"depth": 3}, "depth (2 there, 3 here)"),
]


def test_a_text_encoder_of_another_network_is_refused_by_field(tmp_path):
    weights, out = clip_folder("clip", tmp_path)
    found = import_conditioner(out / "text_encoder", weights.config)
    assert same(found, weights.conditioner)
    for fields, words in OTHER_TEXT_ENCODERS:
        clip = dataclasses.replace(weights.config.diffusion.condition.clip, **fields)
        other = with_condition(weights.config, clip=clip)
        for path in (out, out / "text_encoder"):
            assert words in refusal(import_conditioner, path, other)


def test_a_text_encoder_may_lack_its_unused_last_layer(tmp_path):
    weights, out = clip_folder("open_clip", tmp_path)
    found = import_conditioner(out / "text_encoder", weights.config)
    wanted = dict(weights.conditioner["encoder"])
    del wanted["layer_2"], found["encoder"]["layer_2"]
    assert same(found["encoder"], wanted)
