"""The golden files against the libraries that they were made with.

`python -m tests.parity.test_golden_files` writes them again: diffusers', and
latent-diffusion's where `LDM_ORIGINALS` names its packages (see `compvis_models`).
"""

import json

import pytest

from ldm_jax.config.load_config import load_config
from tests.parity import compvis_models, diffusers_models
from tests.support.commands import ROOT
from tests.support.golden_cases import (
    digest,
    draw_tensors,
    make_config,
    make_inputs,
    read_golden,
    summary,
    summary_error,
    write_golden,
)

torch = pytest.importorskip("torch", reason="parity needs the extra `parity`")
pytest.importorskip("diffusers", reason="parity needs the extra `parity`")

CONFIGS = sorted((ROOT / "configs").glob("*/*.py"))
needs_originals = pytest.mark.skipif(
    compvis_models.ORIGINALS is None, reason="LDM_ORIGINALS names the originals"
)
UNET = {
    "channels": 16,
    "channel_multipliers": [1, 2],
    "num_res_blocks": 1,
    "attention_downsampling": [2],
    "num_heads": 2,
    "num_groups": 4,
}
EVERYWHERE = {"attention_downsampling": [1, 2]}
TRANSFORMER = {
    "transformer_depth": 1,
    "condition": {"context": "embedding", "embedding_width": 12},
}
FIRST = {
    "channels": 8,
    "channel_multipliers": [1, 2],
    "num_res_blocks": 1,
    "num_groups": 4,
    "codebook_size": 24,
}
VQ = {"regularizer": "vq", "z_channels": 5}
TEXT = {"vocab_size": 30, "length": 7, "width": 12, "depth": 2, "num_heads": 3}
PENULTIMATE = {"output": "penultimate", "projection_width": 8, "eos_token_id": 29}
PIXELS = {"image_size": 32}


def unet(*, data: dict | None = None, **fields) -> dict:
    fields = {"diffusion": {**UNET, **fields}}
    return {"data": {**PIXELS, **(data or {})}, **fields}


def first_stage(**fields) -> dict:
    alone = {"stages": ["autoencoder"], "data": {"image_size": 16}}
    return {**alone, "autoencoder": {**FIRST, **fields}}


def conditioner(*, data: dict | None = None, **fields) -> dict:
    fields = {"transformer_depth": 1, "condition": fields}
    return {"data": {**PIXELS, **(data or {})}, "diffusion": fields}


COMPVIS = {
    "heads by number, not at the top": ("unet", unet()),
    "heads by width, three levels": (
        "unet",
        unet(channel_multipliers=[1, 2, 3], head_channels=8, **EVERYWHERE),
    ),
    "resampling in blocks, scale and shift": (
        "unet",
        unet(resblock_updown=True, scale_shift_norm=True, **EVERYWHERE),
    ),
    "resampling in blocks, a masked image": (
        "unet",
        unet(resblock_updown=True, condition={"concat": "masked_image"}),
    ),
    "attention in the middle only, a map": (
        "unet",
        unet(
            num_res_blocks=2,
            attention_downsampling=[8],
            condition={"concat": "segmentation"},
        ),
    ),
    "a class in the time embedding": (
        "unet",
        unet(data={"num_classes": 6}, condition={"label": True}),
    ),
    "one level": (
        "unet",
        unet(channel_multipliers=[1], num_res_blocks=2, attention_downsampling=[1]),
    ),
    "transformers everywhere, heads by width": (
        "unet",
        unet(head_channels=8, **EVERYWHERE, **TRANSFORMER),
    ),
    "transformers of three blocks, not at the top": (
        "unet",
        unet(**{**TRANSFORMER, "transformer_depth": 3}),
    ),
    "transformers of one wide head, 32 groups": (
        "unet",
        unet(channels=32, num_heads=1, num_groups=32, **TRANSFORMER),
    ),
    "kl": ("autoencoder", first_stage()),
    "kl, attention at a height": (
        "autoencoder",
        first_stage(attention_resolutions=[8], latent_channels=4, num_res_blocks=2),
    ),
    "vq, attention at two heights": (
        "autoencoder",
        first_stage(**VQ, attention_resolutions=[16, 8]),
    ),
    "vq, no attention": ("autoencoder", first_stage(**VQ, mid_attention=False)),
    "kl, 32 groups": ("autoencoder", first_stage(channels=32, num_groups=32)),
    "a class as a token": (
        "conditioner",
        conditioner(data={"num_classes": 6}, context="class", class_width=12),
    ),
    "a text": (
        "conditioner",
        conditioner(context="text", text={**TEXT, "head_width": 5}),
    ),
    "a text for Stable Diffusion 2": (
        "conditioner",
        conditioner(
            context="clip",
            clip={**TEXT, "mlp_width": 48, "activation": "gelu", **PENULTIMATE},
        ),
    ),
    "a text for Stable Diffusion 1": (
        "conditioner",
        conditioner(context="clip", clip={**TEXT, "mlp_width": 48, "eos_token_id": 29}),
    ),
    "a map": ("conditioner", conditioner(concat="segmentation", num_segments=9)),
}
WITH_GRADIENT = {
    "heads by number, not at the top",
    "vq, no attention",
}
FAINT = {
    "one level": 0.01,
    "transformers of three blocks, not at the top": 0.01,
    "kl, 32 groups": 0.01,
    "a text": 0.01,
    "a text for Stable Diffusion 1": 0.01,
    "a text for Stable Diffusion 2": 0.01,
    "Stable Diffusion 1": 0.01,
    "resampling in blocks, a class": 0.01,
    "AutoencoderKL": 0.01,
}

SMALL = {"block_out_channels": [16, 32], "layers_per_block": 1, "norm_num_groups": 8}
CROSSED = {
    **SMALL,
    "sample_size": 8,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "attention_head_dim": 2,
    "cross_attention_dim": 12,
}
PLAIN = {
    **SMALL,
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": 8,
    "attn_norm_num_groups": 8,
}
KL = {
    **SMALL,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "latent_channels": 4,
}

# name: the class, its config
DIFFUSERS = {
    "Stable Diffusion 1": ("UNet2DConditionModel", CROSSED),
    "Stable Diffusion 2": (
        "UNet2DConditionModel",
        {
            **CROSSED,
            "attention_head_dim": [2, 4],
            "use_linear_projection": True,
            "upcast_attention": True,
        },
    ),
    "resampling by convolutions": ("UNet2DModel", PLAIN),
    "resampling in blocks, a class": (
        "UNet2DModel",
        {
            **PLAIN,
            "down_block_types": ["AttnDownBlock2D", "ResnetDownsampleBlock2D"],
            "up_block_types": ["ResnetUpsampleBlock2D", "AttnUpBlock2D"],
            "downsample_type": "resnet",
            "upsample_type": "resnet",
            "resnet_time_scale_shift": "scale_shift",
            "num_class_embeds": 7,
        },
    ),
    "AutoencoderKL": ("AutoencoderKL", KL),
    "VQModel": (
        "VQModel",
        {
            **KL,
            "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
            "up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
            "num_vq_embeddings": 24,
            "vq_embed_dim": 3,
        },
    ),
}


def golden(table: dict, outputs: dict, **made_of) -> dict:
    keys, sha256 = digest(table)
    summaries = {key: summary(value) for key, value in outputs.items()}
    return {**made_of, "keys": keys, "sha256": sha256, "outputs": summaries}


def golden_diffusers(name: str) -> dict:
    class_name, settings = DIFFUSERS[name]
    drawn = {"seed": list(DIFFUSERS).index(name), "gain": FAINT.get(name, 1.0)}
    model, tensors = diffusers_models.make_torch(class_name, settings, drawn["seed"])
    table = {key: tensor.shape for key, tensor in tensors.items()}
    tensors = draw_tensors(table, **drawn)
    model.load_state_dict({k: torch.from_numpy(v) for k, v in tensors.items()})
    config, kind = diffusers_models.config_and_kind(class_name, settings)
    inputs = make_inputs(config, kind, drawn["seed"])
    gradient = name in WITH_GRADIENT
    outputs = diffusers_models.run_theirs(class_name, model, inputs, gradient=gradient)
    made_of = {"class_name": class_name, "settings": settings}
    return golden(table, outputs, name=name, **drawn, **made_of)


def golden_compvis(name: str) -> dict:
    kind, fields = COMPVIS[name]
    drawn = {"seed": list(COMPVIS).index(name), "gain": FAINT.get(name, 1.0)}
    config = make_config(fields)
    table = compvis_models.table(config, kind)
    module = compvis_models.build(config, kind)
    compvis_models.load(module, table, **drawn)
    inputs = make_inputs(config, kind, drawn["seed"])
    gradient = name in WITH_GRADIENT
    outputs = compvis_models.run(config, kind, module, inputs, gradient=gradient)
    return golden(table, outputs, name=name, **drawn, kind=kind, config=fields)


def golden_tables(path) -> dict:
    config = load_config(str(path))
    kinds = ["autoencoder"]
    if "diffusion" in config.stages:
        kinds = ["unet", "conditioner"]
    tables = {kind: compvis_models.table(config, kind) for kind in kinds}
    digests = {kind: digest(table) for kind, table in tables.items() if table}
    return {"name": path.stem, **digests}


def assert_same(here: dict, there: dict) -> None:
    ours, theirs = here.pop("outputs"), there.pop("outputs")
    assert here == there
    assert ours.keys() == theirs.keys()
    for name in ours:
        # Six digits are stored, and float32 sums differ with the machine.
        assert summary_error(ours[name], theirs[name]) < 2e-5


def stored(file: str) -> dict[str, dict]:
    return {case["name"]: case for case in read_golden(file)}


def test_the_golden_files_have_every_case():
    assert list(stored("diffusers.json")) == list(DIFFUSERS)
    assert list(stored("compvis.json")) == list(COMPVIS)


@pytest.mark.parametrize("name", DIFFUSERS)
def test_the_golden_file_equals_diffusers(name):
    assert_same(golden_diffusers(name), stored("diffusers.json")[name])


@needs_originals
@pytest.mark.parametrize("name", COMPVIS)
def test_the_golden_file_equals_latent_diffusion(name):
    assert_same(golden_compvis(name), stored("compvis.json")[name])


@needs_originals
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_golden_tables_equal_latent_diffusion(path):
    here, there = golden_tables(path), stored("compvis_tables.json")[path.stem]
    assert json.loads(json.dumps(here)) == there


if __name__ == "__main__":
    write_golden("diffusers.json", [golden_diffusers(name) for name in DIFFUSERS])
    if compvis_models.ORIGINALS:
        write_golden("compvis.json", [golden_compvis(name) for name in COMPVIS])
        write_golden("compvis_tables.json", [golden_tables(path) for path in CONFIGS])
