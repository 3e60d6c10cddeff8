"""JSON configs of diffusers and transformers models."""

import json

import pytest

from ldm_jax.pretrained.diffusers_configs import (
    UNSUPPORTED_FIELDS,
    read_autoencoder,
    read_clip,
    read_scheduler,
    read_unet,
)
from ldm_jax.pretrained.diffusers_import import assemble_config
from ldm_jax.pretrained.open_weights import open_weights
from tests.data.test_tokenizer import write_clip
from tests.support.models import config_of
from tests.support.pretrained import edit, refusal, without_own_config, written

# Network configs of the published Stable Diffusion folders.
SD_UNET = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
}


SD2_UNET = {
    **SD_UNET,
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "sample_size": 96,
    "upcast_attention": True,
    "use_linear_projection": True,
}


SD_VAE = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}


SD2_CLIP = {
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "projection_dim": 512,
    "vocab_size": 49408,
}


SD2_SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}


@pytest.mark.parametrize("name", ["sd15", "sd21_v"])
def test_stable_diffusion_folders_give_our_configs(name):
    from ldm_jax.config.load_config import load_config

    two = name == "sd21_v"
    unet = SD2_UNET if two else SD_UNET
    clip = (
        SD2_CLIP
        if two
        else {
            **SD2_CLIP,
            "hidden_act": "quick_gelu",
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_attention_heads": 12,
            "num_hidden_layers": 12,
        }
    )
    scheduler = dict(SD2_SCHEDULER)
    if not two:
        scheduler |= {"_class_name": "PNDMScheduler", "prediction_type": None}
    found = assemble_config(
        autoencoder=read_autoencoder("AutoencoderKL", SD_VAE),
        unet=read_unet("UNet2DConditionModel", unet),
        clip=read_clip("CLIPTextModel", clip),
        scheduler=read_scheduler(scheduler["_class_name"], scheduler),
    )
    ours = load_config(f"configs/ldm/{name}.py")
    assert found.latent_shape == ours.latent_shape
    assert found.autoencoder.latent_scale == ours.autoencoder.latent_scale
    assert found.diffusion.prediction == ours.diffusion.prediction
    assert found.diffusion.beta_end == ours.diffusion.beta_end
    from ldm_jax.build import build_model

    # Where levels differ, heads are a number there and a width here.
    assert build_model(found).unet == build_model(ours).unet.clone(
        num_heads=found.diffusion.num_heads, remat=False
    )
    assert found.diffusion.linear_projection == ours.diffusion.linear_projection
    a, b = found.diffusion.condition.clip, ours.diffusion.condition.clip
    # The folder of 2.1 has no last layer, because no model reads it.
    assert (a.width, a.depth) == (b.width, b.depth - two)
    assert (a.activation, a.num_heads) == (b.activation, b.num_heads)


WRONG_WIDTHS = [
    ("block_out_channels", value)
    for value in ([], [0, 0], [-16, 16], [16.0, 32], [True, 2], 16, None, ["16"], {})
]


WRONG_COUNTS = (0, -1, 1.5, True, "2", [2], {}, 10**400, float("nan"))


WRONG_TYPES = (5, "DownBlock2D", [], [["DownBlock2D"]] * 2, [None] * 2, [{}] * 2, {})


PLAIN_UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [32, 64],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}


CROSSED_UNET = {
    **PLAIN_UNET,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
}


VQ = {
    "block_out_channels": [32, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}


def assembled(kind, **values):
    """Return the config of a small diffusers model with some fields changed."""
    unet, first = None, read_autoencoder("AutoencoderKL", SD_VAE)
    if kind == "VQModel":
        first = read_autoencoder(kind, {**VQ, **values})
    else:
        fields = PLAIN_UNET if kind == "UNet2DModel" else CROSSED_UNET
        unet = read_unet(kind, {**fields, **values})
    return assemble_config(autoencoder=first, unet=unet)


@pytest.mark.parametrize("kind", ["UNet2DModel", "UNet2DConditionModel", "VQModel"])
def test_the_small_models_of_these_tests_are_valid(kind):
    assembled(kind)


def test_a_unet_with_more_inputs_than_the_latent_is_refused(tmp_path):
    path = written("masked_image", tmp_path)
    assert open_weights(path).config == config_of("masked_image")
    message = refusal(assembled, "UNet2DModel", in_channels=9)
    assert "in_channels: got 9, wanted the 4" in message and "not supported" in message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *WRONG_WIDTHS,
        *(("down_block_types", value) for value in WRONG_TYPES),
        *(("up_block_types", value) for value in WRONG_TYPES),
        *(("layers_per_block", value) for value in WRONG_COUNTS),
        *(("attention_head_dim", value) for value in (*WRONG_COUNTS, 7)),
        *(("norm_num_groups", value) for value in (*WRONG_COUNTS, 7)),
        *(("num_class_embeds", value) for value in (*WRONG_COUNTS, 1)),
        *(("sample_size", value) for value in (*WRONG_COUNTS, None, 3)),
        *(("in_channels", value) for value in WRONG_COUNTS),
        *(("norm_eps", value) for value in (0, -1, "1", [1], 10**400, float("inf"))),
        ("resnet_time_scale_shift", ["default"]),
        ("attn_norm_num_groups", 0),
        ("dropout", [0.0]),
    ],
)
def test_a_unet_with_a_wrong_value_is_refused_in_one_line(field, value):
    assert refusal(assembled, "UNet2DModel", **{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(
            ("attention_head_dim", value)
            for value in (0, -2, True, "2", 7, [2], [0, 2], [3, 8], [2, 2.0], [None, 2])
        ),
        *(("num_attention_heads", value) for value in (0, "2", [2], {})),
        *(("cross_attention_dim", value) for value in WRONG_COUNTS),
        *(("transformer_layers_per_block", value) for value in WRONG_COUNTS),
        ("use_linear_projection", "yes"),
    ],
)
def test_a_crossed_unet_with_a_wrong_value_is_refused_in_one_line(field, value):
    assert refusal(assembled, "UNet2DConditionModel", **{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *WRONG_WIDTHS,
        *(("down_block_types", value) for value in WRONG_TYPES),
        *(("up_block_types", value) for value in WRONG_TYPES),
        *(("layers_per_block", value) for value in WRONG_COUNTS),
        *(("norm_num_groups", value) for value in (*WRONG_COUNTS, 7)),
        *(("latent_channels", value) for value in WRONG_COUNTS),
        *(("vq_embed_dim", value) for value in WRONG_COUNTS),
        *(("num_vq_embeddings", value) for value in WRONG_COUNTS),
        *(("in_channels", value) for value in (*WRONG_COUNTS, 4)),
        *(("scaling_factor", value) for value in (0, -1, "1", [1], 10**400)),
        ("mid_block_add_attention", "yes"),
    ],
)
def test_an_autoencoder_with_a_wrong_value_is_refused_in_one_line(field, value):
    assert refusal(assembled, "VQModel", **{field: value})


def test_null_attention_head_dim_is_one_head():
    settings = assembled("UNet2DModel", attention_head_dim=None).diffusion
    assert (settings.num_heads, settings.head_channels) == (1, 0)
    # This is the only field where null and absent differ.
    assert assembled("UNet2DModel").diffusion.head_channels == 8


AVERAGE = {"decay": 0.9999, "optimization_step": 15000, "use_ema_warmup": False}


@pytest.mark.parametrize("version", ["0.2.4", "0.6.0", "0.10.0.dev0", "0.42.1"])
def test_a_field_that_means_nothing_to_diffusers_is_passed_over(version):
    written_by = {"_diffusers_version": version}
    for kind in ("UNet2DModel", "UNet2DConditionModel", "VQModel"):
        assert assembled(kind, **AVERAGE, **written_by) == assembled(kind)


@pytest.mark.parametrize("version", ["0.43.0", "1.0.0", "x", "", None, 3])
def test_an_unknown_field_of_an_unknown_version_is_refused(version):
    values = {"_diffusers_version": version, "decay": 0.9999}
    assert "decay" in refusal(assembled, "UNet2DModel", **values)


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (kind, field, 2)
        for kind in ("UNet2DModel", "UNet2DConditionModel")
        for field in UNSUPPORTED_FIELDS[kind]
    ],
)
def test_a_field_that_builds_another_network_is_refused(kind, field, value):
    values = {"_diffusers_version": "0.6.0", field: value}
    assert field in refusal(assembled, kind, **values)


@pytest.mark.parametrize(
    "field", ["mid_block_type", "norm_num_groups", "flip_sin_to_cos"]
)
def test_null_is_refused_where_it_is_not_the_default(field):
    assert field in refusal(assembled, "UNet2DModel", **{field: None})


def test_widths_and_blocks_that_a_config_omits_are_those_of_its_class():
    fewer = {k: v for k, v in SD_UNET.items() if not k.endswith(("types", "channels"))}
    kind = "UNet2DConditionModel"
    assert read_unet(kind, fewer) == read_unet(kind, SD_UNET)


def test_latents_may_be_given_by_height_and_width():
    square = assembled("UNet2DModel", sample_size=[8, 8])
    assert square == assembled("UNet2DModel", sample_size=8)
    for value in ([8, 16], [8, 8, 8], [], [None, None], [[8], [8]]):
        assert "sample_size" in refusal(assembled, "UNet2DModel", sample_size=value)


def test_the_text_part_of_a_whole_clip_is_read():
    whole = {"model_type": "clip", "text_config": SD2_CLIP, "vision_config": {}}
    assert read_clip("CLIPModel", whole) == read_clip("CLIPTextModel", SD2_CLIP)


@pytest.mark.parametrize(
    ("version", "side", "found"),
    [("0.6.0", 8, 64), ("0.8.1", 32, 64), ("0.8.1", 96, 96), ("0.9.0", 8, 8)],
)
def test_old_folders_of_stable_diffusion_state_half_of_their_side(
    version, side, found, tmp_path
):
    path = without_own_config(written("clip", tmp_path))
    for part in ("scheduler", "tokenizer"):
        (path / part).mkdir(exist_ok=True)
    write_clip(path / "tokenizer")
    (path / "scheduler" / "scheduler_config.json").write_text("{}")
    edit(path / "unet" / "config.json", sample_size=side, _diffusers_version=version)
    index = {"_class_name": "StableDiffusionPipeline"}
    for name, class_name in {
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
        "scheduler": "DDIMScheduler",
        "text_encoder": "CLIPTextModel",
        "tokenizer": "CLIPTokenizer",
    }.items():
        index[name] = ["library", class_name]
    (path / "model_index.json").write_text(json.dumps(index))
    assert open_weights(path).config.latent_shape[0] == found
