"""The parameter names of every shipped config, by shapes only.

`golden/compvis_tables.json` holds digests of the tables of names and shapes of the
original classes at full size; `tests.parity.test_golden_files` makes them again. One
config differs from a released checkpoint: the class embedding of latent-diffusion's
`cin256` has 1000 rows, that of `imagenet256_vq8` one more, for the null class.
"""

import functools
import math
import os

import jax
import pytest

from ldm_jax.config import Config
from ldm_jax.config.load_config import load_config
from ldm_jax.pretrained.compvis_names import ema_key
from ldm_jax.pretrained.layouts import key_shapes, stored_leaves
from tests.support.commands import ROOT
from tests.support.golden_cases import (
    FORMATS,
    Table,
    digest,
    formats,
    read_golden,
    stored_table,
    tree_shapes,
)

CONFIGS = {path.stem: path for path in sorted((ROOT / "configs").glob("**/*.py"))}
TABLES = {case.pop("name"): case for case in read_golden("compvis_tables.json")}
QUICK = {
    *(name for name, path in CONFIGS.items() if path.parent.name != "ldm"),
    "celebahq256_vq4",
    "imagenet256_vq8",
    "lsun_churches256_kl8",
    "sd15",
    "sd21_base",
    "semantic256",
    "text2img256_kl8_1p4b",
}
slow = pytest.mark.skipif("LDM_JAX_SLOW" not in os.environ, reason="make recipes")
every_config = pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in QUICK else slow) for n in CONFIGS],
)


@functools.cache
def load(name: str) -> Config:
    return load_config(str(CONFIGS[name]))


def kinds(name: str) -> list[str]:
    """List a config's own networks; its first stage has a config of its own."""
    if CONFIGS[name].parent.name == "ldm":
        return ["unet", "conditioner"]
    return ["autoencoder"] if name in TABLES else ["autoencoder", "unet"]


def table(name: str, kind: str) -> Table:
    config = load(name)
    return stored_table(config, kind, FORMATS["compvis", kind](config))


@every_config
def test_every_parameter_is_stored_once_in_every_format(name):
    config = load(name)
    for kind in kinds(name):
        shapes = tree_shapes(config, kind)
        numbers = sum(leaf.size for leaf in jax.tree.leaves(shapes))
        for format_ in formats(config, kind):
            stored = key_shapes(shapes, format_)
            keys = [key for *_, x in stored_leaves(shapes, format_) for key in x.keys]
            assert len(keys) == len(set(keys))
            assert set(keys) == set(stored)
            assert sum(map(math.prod, stored.values())) == numbers


@every_config
def test_names_and_shapes_are_those_of_the_original_classes(name):
    if name not in TABLES:
        pytest.skip("a model of this library's own")
    found = {kind: digest(table(name, kind)) for kind in kinds(name)}
    wanted = {kind: tuple(stored) for kind, stored in TABLES[name].items()}
    assert {kind: stored for kind, stored in found.items() if stored.keys} == wanted


def test_every_published_model_has_a_table():
    published = {n for n, path in CONFIGS.items() if path.parent.name != "configs"}
    assert set(TABLES) == published


def assert_contains(table: Table, wanted: Table) -> None:
    assert {key: table.get(key) for key in wanted} == wanted


def test_stable_diffusion_1_has_its_well_known_names():
    unet = table("sd15", "unet")
    assert_contains(
        unet,
        {
            "time_embed.0.weight": (1280, 320),
            "input_blocks.0.0.weight": (320, 4, 3, 3),
            "input_blocks.1.0.emb_layers.1.weight": (320, 1280),
            "input_blocks.1.1.proj_in.weight": (320, 320, 1, 1),
            "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
            "input_blocks.1.1.transformer_blocks.0.ff.net.0.proj.weight": (2560, 320),
            "input_blocks.3.0.op.weight": (320, 320, 3, 3),
            "input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
            "middle_block.1.proj_in.weight": (1280, 1280, 1, 1),
            "output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
            "output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
            "output_blocks.11.1.transformer_blocks.0.attn1.to_out.0.bias": (320,),
            "out.2.weight": (4, 320, 3, 3),
        },
    )
    assert len(unet) == 686
    layer = "transformer.text_model.encoder.layers.11"
    assert_contains(
        table("sd15", "conditioner"),
        {
            "transformer.text_model.embeddings.token_embedding.weight": (49408, 768),
            "transformer.text_model.embeddings.position_embedding.weight": (77, 768),
            f"{layer}.self_attn.q_proj.weight": (768, 768),
            f"{layer}.mlp.fc1.weight": (3072, 768),
            "transformer.text_model.final_layer_norm.bias": (768,),
        },
    )


def test_the_autoencoder_of_stable_diffusion_has_its_well_known_names():
    assert_contains(
        table("kl_f8", "autoencoder"),
        {
            "encoder.conv_in.weight": (128, 3, 3, 3),
            "encoder.down.0.downsample.conv.weight": (128, 128, 3, 3),
            "encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
            "encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
            "encoder.conv_out.weight": (8, 512, 3, 3),
            "quant_conv.weight": (8, 8, 1, 1),
            "post_quant_conv.weight": (4, 4, 1, 1),
            "decoder.mid.block_2.norm2.weight": (512,),
            "decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
            "decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
            "decoder.norm_out.bias": (128,),
        },
    )


def test_codebook_and_encoder_attention_have_their_original_names():
    assert_contains(
        table("vq_f8", "autoencoder"),
        {
            "quantize.embedding.weight": (16384, 4),
            "encoder.down.3.attn.1.proj_out.weight": (512, 512, 1, 1),
            "decoder.up.3.attn.2.norm.weight": (512,),
        },
    )


def test_stable_diffusion_2_has_linear_projections_and_fused_text_attention():
    assert_contains(
        table("sd21_base", "unet"),
        {
            "input_blocks.1.1.proj_in.weight": (320, 320),
            "middle_block.1.proj_out.weight": (1280, 1280),
            "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024),
        },
    )
    block = "model.transformer.resblocks.23"
    assert_contains(
        table("sd21_base", "conditioner"),
        {
            "model.positional_embedding": (77, 1024),
            "model.token_embedding.weight": (49408, 1024),
            f"{block}.attn.in_proj_weight": (3072, 1024),
            f"{block}.attn.in_proj_bias": (3072,),
            f"{block}.attn.out_proj.weight": (1024, 1024),
            f"{block}.mlp.c_fc.weight": (4096, 1024),
            f"{block}.ln_1.weight": (1024,),
            "model.ln_final.weight": (1024,),
        },
    )


def test_latent_diffusion_blocks_have_their_original_names():
    assert_contains(
        table("lsun_churches256_kl8", "unet"),
        {
            "input_blocks.1.1.qkv.weight": (576, 192, 1),
            "input_blocks.3.0.in_layers.2.weight": (192, 192, 3, 3),
            "middle_block.1.proj_out.weight": (768, 768, 1),
            "output_blocks.2.1.in_layers.2.weight": (768, 768, 3, 3),
            "output_blocks.5.2.emb_layers.1.weight": (1536, 768),
            "output_blocks.5.2.out_layers.3.weight": (768, 768, 3, 3),
        },
    )
    assert_contains(
        table("text2img256_kl8_1p4b", "conditioner"),
        {
            "transformer.token_emb.weight": (30522, 1280),
            "transformer.pos_emb.emb.weight": (77, 1280),
            "transformer.attn_layers.layers.0.1.to_q.weight": (512, 1280),
            "transformer.attn_layers.layers.63.1.net.0.0.weight": (5120, 1280),
            "transformer.norm.weight": (1280,),
        },
    )
    rescaler = {"channel_mapper.weight": (3, 182, 1, 1)}
    assert table("semantic256", "conditioner") == rescaler
    assert table("imagenet256_vq8", "conditioner") == {"embedding.weight": (1001, 512)}


def test_ema_key_drops_the_dots_of_a_name():
    key = ema_key("input_blocks.0.0.weight")
    assert key == "diffusion_modelinput_blocks00weight"
