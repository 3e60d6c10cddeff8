"""Models out and in: bit for bit, strict, and never half."""

import dataclasses
import json

import numpy as np
import pytest

from ldm_jax.config import to_json
from ldm_jax.diffusion.schedules import make_schedule
from ldm_jax.files import write_safetensors
from ldm_jax.pretrained.compvis_export import write_compvis
from ldm_jax.pretrained.compvis_names import (
    AUTOENCODER_PREFIX,
    CONDITIONER_PREFIX,
    UNET_PREFIX,
    autoencoder_format,
    conditioner_format,
    ema_key,
    unet_format,
)
from ldm_jax.pretrained.diffusers_configs import (
    read_autoencoder,
    read_clip,
    read_scheduler,
    read_unet,
)
from ldm_jax.pretrained.diffusers_export import write_folder
from ldm_jax.pretrained.diffusers_import import assemble_config
from ldm_jax.pretrained.first_stage import different_autoencoder, import_first_stage
from ldm_jax.pretrained.inspect_weights import inspect
from ldm_jax.pretrained.layouts import write_tree
from ldm_jax.pretrained.model_weights import (
    WEIGHTS_FILE,
    ModelWeights,
    file_scale,
    write_native,
)
from ldm_jax.pretrained.open_weights import is_run, network_shapes, open_weights
from ldm_jax.pretrained.tensors import Tensors, open_tensors
from ldm_jax.pretrained.text_encoder import import_clip
from ldm_jax.types import InputError
from tests.data.test_tokenizer import write_clip
from tests.support import models
from tests.support.models import config_of, model_of, same

KINDS = sorted(models.CONDITIONS)


def trees(weights: ModelWeights):
    return weights.autoencoder, weights.unet, weights.conditioner


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
def test_out_and_in_again_is_the_identity(kind, format_, tmp_path):
    if format_ == "diffusers" and kind == "open_clip":
        pytest.skip("the last layer is not used there, so it is not written")
    weights, found = out_and_in(kind, tmp_path, format_)
    assert found.config == weights.config
    assert found.latent_scale == weights.latent_scale
    assert same(trees(found), trees(weights))


def test_only_the_unused_layer_is_lost_on_the_way_through_diffusers(tmp_path):
    weights, found = out_and_in("open_clip", tmp_path, "diffusers")
    lost = found.conditioner["encoder"].pop("layer_2")
    del weights.conditioner["encoder"]["layer_2"]
    assert not any(leaf.any() for leaf in lost["norm1"].values())
    assert same(trees(found), trees(weights))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_halves_the_file_and_is_read(dtype, tmp_path):
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


def test_a_number_too_large_for_float16_is_refused_and_nothing_written(tmp_path):
    weights = model_of(config_of("label"))
    weights.unet["conv_in"]["kernel"][0, 0, 0, 0] = 1e6
    with pytest.raises(InputError, match=r"input_blocks\.0\.0.*float16"):
        write_compvis(weights, tmp_path / "a.safetensors", dtype="float16")
    assert not list(tmp_path.iterdir())


def test_the_parts_of_a_pipeline_are_those_diffusers_wants(tmp_path):
    config = config_of("clip")
    tokenizer = write_clip(tmp_path)
    condition = dataclasses.replace(
        config.diffusion.condition, tokenizer=str(tokenizer)
    )
    diffusion = dataclasses.replace(config.diffusion, condition=condition)
    config = dataclasses.replace(config, diffusion=diffusion)
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


def without_own_config(out):
    (out / "ldm_jax.json").unlink()
    return out


@pytest.mark.parametrize("kind", ["none", "clip", "open_clip"])
def test_a_pipeline_without_our_config_builds_the_same_networks(kind, tmp_path):
    config = config_of(kind)
    weights = model_of(config)
    if kind != "none":
        tokenizer = str(write_clip(tmp_path))
        condition = dataclasses.replace(config.diffusion.condition, tokenizer=tokenizer)
        diffusion = dataclasses.replace(config.diffusion, condition=condition)
        weights = weights._replace(
            config=dataclasses.replace(config, diffusion=diffusion)
        )
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


def compvis_arrays(kind="label"):
    """The tensors of a CompVis file of a small model, and its config."""
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


def test_the_average_is_taken_where_a_checkpoint_has_one():
    weights, tensors = compvis_arrays()
    average = {
        "model_ema." + ema_key(key.removeprefix(UNET_PREFIX)): 2 * value
        for key, value in tensors.items()
        if key.startswith(UNET_PREFIX)
    }
    found = read_arrays(weights, tensors | average | {"model_ema.decay": np.ones(())})
    kernel = found.unet["conv_in"]["kernel"]
    assert np.array_equal(kernel, 2 * weights.unet["conv_in"]["kernel"])
    incomplete = dict(list(average.items())[1:])
    with pytest.raises(InputError, match="1 missing"):
        read_arrays(weights, tensors | incomplete)


def test_what_a_checkpoint_holds_beside_the_model_is_passed_over():
    weights, tensors = compvis_arrays()
    beside = {
        "betas": np.zeros(1000, np.float32),
        "sqrt_recipm1_alphas_cumprod": np.zeros(1000, np.float32),
        "posterior_mean_coef1": np.zeros(1000, np.float32),
        "logvar": np.zeros(1000, np.float32),
        "first_stage_model.loss.logvar": np.zeros((), np.float32),
        "first_stage_model.loss.discriminator.main.0.weight": np.zeros(3, np.float32),
    }
    assert same(trees(read_arrays(weights, tensors | beside)), trees(weights))
    found = read_arrays(weights, tensors | {"scale_factor": np.full((), 0.25)})
    assert found.latent_scale == 0.25


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(next(iter(t))), ["1 missing"]),
        (lambda t: t.update({"model.diffusion_model.x": np.zeros(1)}), ["x", "extra"]),
        (lambda t: t.update({"stray": np.zeros(1)}), ["stray"]),
        (
            lambda t: t.update({"alphas_cumprod": np.linspace(1, 0.5, 1000)}),
            ["noise levels", "0.5", "--config"],
        ),
        (
            lambda t: t.update({"first_stage_model.quant_conv.bias": np.zeros(3)}),
            ["quant_conv.bias", "(3,)", "(8,)"],
        ),
        (
            lambda t: t.update(
                {"first_stage_model.quant_conv.bias": np.zeros(8, np.int64)}
            ),
            ["quant_conv.bias", "not floating"],
        ),
    ],
)
def test_a_checkpoint_that_is_not_exactly_the_model_is_refused(change, words):
    weights, tensors = compvis_arrays()
    change(tensors)
    with pytest.raises(InputError) as caught:
        read_arrays(weights, tensors)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_a_table_of_noise_levels_must_be_that_of_the_configs_schedule():
    weights, tensors = compvis_arrays()
    settings = {"beta_start": 0.0015, "beta_end": 0.0195, "num_timesteps": 1000}
    table = make_schedule("ldm_linear", zero_terminal_snr=True, **settings).abar
    tensors["alphas_cumprod"] = table.astype(np.float32)

    def read(**fields):
        return read_arrays(
            weights._replace(config=config_of("label", **fields)), tensors
        )

    zero = {"zero_terminal_snr": True, "prediction": "v"}
    assert same(read(**zero).unet, weights.unet)
    with pytest.raises(InputError, match="noise levels"):
        read(prediction="v")
    with pytest.raises(InputError, match=r"alphas_cumprod.*schedule flow"):
        read(schedule="flow", prediction="flow")


def test_the_first_ten_of_many_faults_are_named():
    weights, tensors = compvis_arrays()
    few = {k: v for k, v in tensors.items() if "input_blocks" not in k}
    with pytest.raises(InputError) as caught:
        read_arrays(weights, few)
    assert str(caught.value).count("input_blocks.") == 10


def test_a_file_that_does_not_say_what_it_is_asks_for_a_config(tmp_path):
    _, tensors = compvis_arrays()
    path = tmp_path / "a.safetensors"
    write_safetensors(path, tensors)
    with pytest.raises(InputError, match="--config"):
        open_weights(path)
    with pytest.raises(InputError, match="not there"):
        open_weights(tmp_path / "b")


def written(kind, tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    write_folder(model_of(config_of(kind)), path)
    return path


def edit(path, **values):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **values}))


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
def test_a_folder_that_is_built_otherwise_is_refused(part, values, words, tmp_path):
    path = without_own_config(written("none", tmp_path))
    edit(path / part / "config.json", **values)
    if "_class_name" in values:
        edit(path / "model_index.json", unet=["diffusers", values["_class_name"]])
    with pytest.raises(InputError) as caught:
        open_weights(path).read()
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_old_names_of_the_autoencoders_attention_are_read(tmp_path):
    path = written("clip", tmp_path)
    file = path / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = open_tensors(file)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for key in tensors:
        name = key
        for new, before in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
        renamed[name] = tensors[key]
    assert set(renamed) != set(tensors)
    write_safetensors(file, renamed)
    found = open_weights(path).read()
    assert same(found.autoencoder, model_of(config_of("clip")).autoencoder)


def test_an_inspection_counts_without_reading(tmp_path):
    path = written("label", tmp_path)
    report = inspect(path)
    weights = model_of(config_of("label"))
    count = sum(leaf.size for leaf in _leaves(weights.unet))
    assert report["parts"]["unet"]["parameters"] == count
    assert report["parts"]["unet"]["class"] == "UNet2DModel"
    native = tmp_path / "native"
    native.mkdir()
    write_native(weights, native)
    assert inspect(native)["parameters"] > count
    assert (native / WEIGHTS_FILE).exists()


def _leaves(tree):
    for value in tree.values():
        if isinstance(value, dict):
            yield from _leaves(value)
        else:
            yield value


def test_a_model_that_diffusers_cannot_hold_says_which_field(tmp_path):
    config = config_of("label", channel_multipliers=(1, 2), attention_downsampling=(1,))
    config = dataclasses.replace(
        config, diffusion=dataclasses.replace(config.diffusion, num_heads=2)
    )
    with pytest.raises(InputError, match=r"num_heads.*compvis"):
        write_folder(model_of(config), tmp_path)


def test_inpainting_files_hold_their_first_stage_twice():
    weights, tensors = compvis_arrays("masked_image")
    twice = {
        key.replace("first_stage_model.", "cond_stage_model."): value
        for key, value in tensors.items()
        if key.startswith("first_stage_model.")
    }
    assert same(trees(read_arrays(weights, tensors | twice)), trees(weights))


def test_counters_of_an_average_without_one_are_passed_over():
    weights, tensors = compvis_arrays()
    counters = {"model_ema.decay": np.ones(()), "model_ema.num_updates": np.ones(())}
    assert same(trees(read_arrays(weights, tensors | counters)), trees(weights))


def test_a_class_model_without_a_null_class_gets_one_of_zeros():
    weights, tensors = compvis_arrays("class")
    table = np.asarray(weights.conditioner["encoder"]["table"]["embedding"])
    few = {"cond_stage_model.embedding.weight": table[:10]}
    found = read_arrays(weights, tensors | few).conditioner["encoder"]["table"]
    assert np.array_equal(found["embedding"][:10], table[:10])
    assert not found["embedding"][10].any()


# What the published folders of Stable Diffusion say of their networks.
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


@pytest.mark.parametrize("recipe", ["sd15", "sd21_v"])
def test_the_published_folders_of_stable_diffusion_are_our_recipes(recipe):
    from ldm_jax.config.load_config import load_config

    two = recipe == "sd21_v"
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
    ours = load_config(f"configs/ldm/{recipe}.py")
    assert found.latent_shape == ours.latent_shape
    assert found.autoencoder.latent_scale == ours.autoencoder.latent_scale
    assert found.diffusion.prediction == ours.diffusion.prediction
    assert found.diffusion.beta_end == ours.diffusion.beta_end
    from ldm_jax.build import build_model

    # Heads are told as a number there and as a width here where levels differ.
    assert build_model(found).unet == build_model(ours).unet.clone(
        num_heads=found.diffusion.num_heads, remat=False
    )
    assert found.diffusion.linear_projection == ours.diffusion.linear_projection
    a, b = found.diffusion.condition.clip, ours.diffusion.condition.clip
    # The folder of 2.1 leaves out the last layer, which nothing reads.
    assert (a.width, a.depth) == (b.width, b.depth - two)
    assert (a.activation, a.num_heads) == (b.activation, b.num_heads)


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


# None of these changes the shape of a tensor, or it comes before any is read.
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


def test_the_codebook_counts_only_where_there_is_one():
    config = config_of("label")
    assert not different_autoencoder(with_first(config, codebook_size=7), config)
    config = config_of("none")
    found = different_autoencoder(with_first(config, codebook_size=7), config)
    assert found == ["codebook_size (7 there, 24 here)"]


def test_a_first_stage_may_be_of_another_image_size():
    config = with_first(config_of("label"), attention_resolutions=(8,))
    larger = dataclasses.replace(
        with_first(config, attention_resolutions=(16,)),
        data=dataclasses.replace(config.data, image_size=32),
    )
    assert not different_autoencoder(larger, config)


def test_the_scale_of_a_whole_file_is_read_with_its_first_stage(tmp_path):
    weights, tensors = compvis_arrays()
    path = tmp_path / "a.safetensors"
    write_safetensors(path, tensors | {"scale_factor": np.float32(0.25).reshape(())})
    params, scale = import_first_stage(path, weights.config)
    assert scale == 0.25
    assert same(params, weights.autoencoder)


def clip_folder(kind, tmp_path):
    tokenizer = str(write_clip(tmp_path))
    weights = model_of(config_of(kind))
    config = with_condition(weights.config, tokenizer=tokenizer)
    (out := tmp_path / "out").mkdir()
    write_folder(weights._replace(config=config), out)
    return weights, out


def with_condition(config, **fields):
    condition = dataclasses.replace(config.diffusion.condition, **fields)
    diffusion = dataclasses.replace(config.diffusion, condition=condition)
    return dataclasses.replace(config, diffusion=diffusion)


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


def test_a_text_encoder_may_come_without_the_layer_that_nothing_reads(tmp_path):
    weights, out = clip_folder("open_clip", tmp_path)
    found = import_conditioner(out / "text_encoder", weights.config)
    wanted = dict(weights.conditioner["encoder"])
    del wanted["layer_2"], found["encoder"]["layer_2"]
    assert same(found["encoder"], wanted)


PARTS_BESIDE = [
    ("bert", "LDMBertModel", "config.json"),
    ("text_encoder", "CLIPTextModel", "config.json"),
    ("tokenizer", "CLIPTokenizer", "tokenizer_config.json"),
    ("words", "BertTokenizer", "tokenizer_config.json"),
    ("other", "AutoencoderKL", "config.json"),
]


def test_a_part_that_nothing_reads_is_refused_by_name(tmp_path):
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


def test_a_text_to_image_pipeline_with_bert_is_refused(tmp_path):
    path = without_own_config(written("none", tmp_path))
    edit(path / "model_index.json", _class_name="LDMTextToImagePipeline")
    message = refusal(open_weights, path)
    assert "LDMTextToImagePipeline" in message and "--config" in message


def test_a_foreign_unet_that_reads_more_than_the_latent_is_refused(tmp_path):
    path = written("masked_image", tmp_path)
    assert open_weights(path).config == config_of("masked_image")
    message = refusal(assembled, "UNet2DModel", in_channels=9)
    assert "in_channels: got 9, wanted the 4" in message and "not supported" in message


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
    """Read a small stranger's model with some fields changed."""
    unet, first = None, read_autoencoder("AutoencoderKL", SD_VAE)
    if kind == "VQModel":
        first = read_autoencoder(kind, {**VQ, **values})
    else:
        fields = PLAIN_UNET if kind == "UNet2DModel" else CROSSED_UNET
        unet = read_unet(kind, {**fields, **values})
    return assemble_config(autoencoder=first, unet=unet)


@pytest.mark.parametrize("kind", ["UNet2DModel", "UNet2DConditionModel", "VQModel"])
def test_the_small_models_of_these_tests_are_read(kind):
    assembled(kind)


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


def test_no_width_of_a_head_is_one_head_over_the_whole_width():
    settings = assembled("UNet2DModel", attention_head_dim=None).diffusion
    assert (settings.num_heads, settings.head_channels) == (1, 0)
    # Null and absent differ here alone.
    assert assembled("UNet2DModel").diffusion.head_channels == 8


def test_a_first_stage_alone_asks_for_a_recipe_of_one(tmp_path):
    config = config_of("label")
    weights = model_of(config)
    path = tmp_path / "a.safetensors"
    tensors = write_tree(weights.autoencoder, autoencoder_format)
    write_safetensors(path, tensors)
    recipes = [tmp_path / f"{name}.py" for name in ("both", "first")]
    lines = "from tests.support.models import config_of\nimport dataclasses\n"
    for recipe, stages in zip(
        recipes, (("autoencoder", "diffusion"), ("autoencoder",)), strict=True
    ):
        recipe.write_text(
            f"{lines}def get_config():\n"
            f"    return dataclasses.replace(config_of('label'), stages={stages})\n"
        )
    message = refusal(open_weights, path, config_file=recipes[0])
    assert "autoencoder/kl_f8" in message
    found = open_weights(path, config_file=recipes[1]).read()
    assert same(found.autoencoder, weights.autoencoder)
    assert found.unet is None
    assert found.latent_scale == config.autoencoder.latent_scale
    params, scale = import_first_stage(path, config)
    assert same(params, weights.autoencoder)
    assert scale is None


def test_a_run_is_told_from_weights_by_its_config(tmp_path):
    config = config_of("label")
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(to_json(config))
    assert is_run(run)
    assert "--workdir" in refusal(open_weights, run)
    assert inspect(run)["format"] == "ldm_jax run"
    ours = native(config, tmp_path / "native")
    assert not is_run(ours)
    assert inspect(ours)["format"] == "ldm_jax"
    for text in ("{", "[]", '"stages"', '{"_class_name": "UNet2DModel"}', "\udcff"):
        (run / "config.json").write_bytes(text.encode(errors="surrogateescape"))
        assert not is_run(run)
    assert not is_run(tmp_path / "nowhere")


@pytest.mark.parametrize("kind", ["label", None])
def test_a_file_is_written_into_a_folder_that_is_not_there_yet(kind, tmp_path):
    config = config_of(kind or "label")
    if kind is None:
        config = dataclasses.replace(config, stages=("autoencoder",))
    weights = model_of(config)
    if kind is None:
        weights = weights._replace(unet=None, conditioner={})
    path = tmp_path / "a" / "b" / "model.safetensors"
    write_compvis(weights, path)
    assert same(open_weights(path).read().autoencoder, weights.autoencoder)


@pytest.mark.parametrize(
    ("kind", "name"), [("clip", "CLIPTokenizer"), ("text", "BertTokenizer")]
)
def test_a_tokenizer_is_of_the_class_of_its_encoder(kind, name, tmp_path):
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


def test_an_export_leaves_the_folders_of_others_alone(tmp_path):
    from ldm_jax.pretrained.convert import export_run

    source, out = native(config_of("label"), tmp_path / "in"), tmp_path / "out"
    (mine := tmp_path / "out.part").mkdir()
    (mine / "mine").write_text("mine")
    export_run(source, out, layout="diffusers")
    assert (mine / "mine").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out", "out.part"]
    # Others may read it, as they may any new folder here.
    assert out.stat().st_mode == mine.stat().st_mode
    found = open_weights(out).read()
    assert same(trees(found), trees(model_of(config_of("label"))))


@pytest.mark.parametrize("format_", ["diffusers", "compvis"])
def test_an_export_of_what_is_no_run_speaks_of_its_path(format_, tmp_path):
    from ldm_jax.pretrained.convert import export_run

    out = tmp_path / "out.safetensors"
    message = refusal(export_run, tmp_path, out, layout=format_)
    assert message.startswith(f"{tmp_path}: not a run") and "--workdir" not in message
    assert not list(tmp_path.iterdir())


def test_what_lies_beside_a_class_table_without_a_null_class_is_noticed():
    weights, tensors = compvis_arrays("class")
    table = np.asarray(weights.conditioner["encoder"]["table"]["embedding"])
    few = {
        "cond_stage_model.embedding.weight": table[:10],
        "cond_stage_model.stray": np.zeros(1, np.float32),
    }
    with pytest.raises(InputError, match=r"1 extra \(stray\)"):
        read_arrays(weights, tensors | few)


@pytest.mark.parametrize("text", ["wide", "", "nan", "inf", "-1", "0"])
def test_a_scale_that_is_no_number_is_refused(text):
    stored = Tensors.from_arrays({}, {"ldm_jax.latent_scale": text})
    assert "ldm_jax.latent_scale: got" in refusal(file_scale, stored)


def test_a_scale_of_many_numbers_is_refused():
    weights, tensors = compvis_arrays()
    with pytest.raises(InputError, match="scale_factor"):
        read_arrays(weights, tensors | {"scale_factor": np.ones(2, np.float32)})


def test_a_damaged_config_of_ours_is_refused_by_name(tmp_path):
    path = written("label", tmp_path)
    for content in (b"\xff", b"{", b"[]", b"", b"[" * 99_999):
        (path / "ldm_jax.json").write_bytes(content)
        assert "ldm_jax.json" in refusal(open_weights, path)
    (path / "ldm_jax.json").write_text("{}")
    assert "fields missing" in refusal(open_weights, path)
