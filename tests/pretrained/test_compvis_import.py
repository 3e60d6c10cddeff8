"""Import of checkpoints in CompVis naming."""

import dataclasses
import re

import jax
import ml_dtypes
import numpy as np
import pytest

from ldm_jax.diffusion.schedules import make_schedule
from ldm_jax.pretrained.compvis_import import is_first_stage
from ldm_jax.pretrained.compvis_names import (
    UNET_PREFIX,
    ema_key,
)
from ldm_jax.pretrained.model_weights import (
    file_scale,
)
from ldm_jax.pretrained.tensors import Tensors
from ldm_jax.types import InputError
from tests.support.models import config_of, same
from tests.support.pretrained import (
    compvis_arrays,
    read_arrays,
    refusal,
    trees,
    with_first,
)


def test_compvis_import_reads_the_average_of_the_unet():
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


def test_compvis_import_ignores_buffers_and_losses():
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
def test_compvis_import_refuses_any_other_set_of_tensors(change, words):
    weights, tensors = compvis_arrays()
    change(tensors)
    with pytest.raises(InputError) as caught:
        read_arrays(weights, tensors)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_compvis_import_checks_the_noise_levels():
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


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("cast_up", [False, True])
def test_noise_levels_are_compared_in_the_precision_they_have(dtype, cast_up):
    weights, tensors = compvis_arrays()
    settings = {"beta_start": 0.0015, "beta_end": 0.0195, "num_timesteps": 1000}
    for zero in (False, True):
        table = make_schedule("ldm_linear", zero_terminal_snr=zero, **settings).abar
        stored = table.astype(dtype)
        tensors["alphas_cumprod"] = stored.astype(np.float32) if cast_up else stored
        fields = {"zero_terminal_snr": zero, "prediction": "v"}
        theirs = weights._replace(config=config_of("label", **fields))
        assert same(read_arrays(theirs, tensors).unet, weights.unet)
        fields["zero_terminal_snr"] = not zero
        with pytest.raises(InputError, match="noise levels"):
            read_arrays(weights._replace(config=config_of("label", **fields)), tensors)


@pytest.mark.parametrize(
    "table",
    [np.full(1000, np.nan), np.ones(3), np.ones(()), np.ones((1000, 1)), np.ones(0)],
    ids=lambda table: str(table.shape),
)
def test_a_table_of_something_else_is_refused(table):
    weights, tensors = compvis_arrays()
    tensors["alphas_cumprod"] = table.astype(np.float32)
    assert "alphas_cumprod" in refusal(read_arrays, weights, tensors)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_a_latent_scale_in_half_precision_is_the_config_s(dtype):
    weights, tensors = compvis_arrays()
    config = with_first(weights.config, latent_scale=0.18215)
    for stored in (np.asarray(0.18215, dtype), np.asarray([0.18215], dtype)):
        tensors["scale_factor"] = stored
        found = read_arrays(weights._replace(config=config), tensors)
        assert found.latent_scale == 0.18215
    tensors["scale_factor"] = np.asarray(0.25, dtype)
    found = read_arrays(weights._replace(config=config), tensors)
    assert found.latent_scale == 0.25


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_latent_scale_is_the_shortest_decimal_of_the_stored_one(dtype):
    weights, tensors = compvis_arrays()
    stored = np.full((), 0.18215, dtype)
    found = read_arrays(weights, tensors | {"scale_factor": stored})
    assert found.latent_scale == 0.18215


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_a_latent_scale_in_half_precision_keeps_its_value_in_float32(dtype):
    weights, tensors = compvis_arrays()
    stored = np.full((), 0.18215, dtype)
    found = read_arrays(weights, tensors | {"scale_factor": stored})
    assert np.float32(found.latent_scale) == stored.astype(np.float32)


COUNTERS = {"model_ema.decay": np.ones(()), "model_ema.num_updates": np.ones(())}
AVERAGE = {"model_ema.encoderconv_inweight": np.ones((16, 3, 3, 3), np.float32)}


@pytest.mark.parametrize("average", [COUNTERS, COUNTERS | AVERAGE])
@pytest.mark.parametrize("place", ["", "first_stage_model.", "cond_stage_model."])
def test_the_average_of_a_first_stage_is_passed_over(place, average):
    kind = "masked_image" if place.startswith("cond") else "label"
    weights, tensors = compvis_arrays(kind)
    prefix = "first_stage_model."
    if place.startswith("cond"):
        firsts = [key for key in tensors if key.startswith(prefix)]
        tensors |= {key.replace(prefix, place): tensors[key] for key in firsts}
    if not place:
        tensors = Tensors.from_arrays(tensors).under(prefix)
    beside = {place + key: value for key, value in average.items()}
    found = read_arrays(weights, {**tensors, **beside})
    assert same(found.autoencoder, weights.autoencoder)


def test_a_config_of_an_autoencoder_reads_that_of_a_whole_file():
    weights, tensors = compvis_arrays()
    config = dataclasses.replace(weights.config, stages=("autoencoder",))
    found = read_arrays(weights._replace(config=config), tensors)
    assert same(found.autoencoder, weights.autoencoder) and found.unet is None


def test_a_first_stage_under_its_prefix_is_a_first_stage():
    weights, tensors = compvis_arrays()
    first = {k: v for k, v in tensors.items() if k.startswith("first_stage_model.")}
    assert is_first_stage(Tensors.from_arrays(first))
    assert not is_first_stage(Tensors.from_arrays(tensors))
    assert same(read_arrays(weights, first).autoencoder, weights.autoencoder)


def test_attention_of_a_first_stage_may_be_matrices():
    weights, tensors = compvis_arrays()
    flat = {
        key: value.reshape(value.shape[:2])
        if re.search(r"\.attn_1\.\w+\.weight$", key)
        else value
        for key, value in tensors.items()
    }
    assert sum(flat[key].ndim != tensors[key].ndim for key in flat) == 8
    assert same(read_arrays(weights, flat).autoencoder, weights.autoencoder)


BESIDE = {
    "embedding_manager.initial_embeddings": np.zeros(3, np.float32),
    "control_model.input_blocks.0.0.weight": np.zeros(3, np.float32),
    "denoiser.sigmas": np.zeros(1000, np.float32),
    "v_pred": np.zeros(0, np.float32),
    "epoch": np.zeros((), np.int64),
}


def test_tensors_beside_the_networks_are_named_and_not_read(caplog):
    weights, tensors = compvis_arrays()
    assert same(trees(read_arrays(weights, tensors | BESIDE)), trees(weights))
    (record,) = caplog.records
    message = record.getMessage()
    assert all(key in message for key in BESIDE) and "\n" not in message


def test_tensors_beside_a_first_stage_alone_are_named_and_not_read(caplog):
    weights, tensors = compvis_arrays()
    stored = Tensors.from_arrays(tensors).under("first_stage_model.")
    first = {key: stored[key] for key in stored}
    found = read_arrays(weights, first | BESIDE)
    assert same(found.autoencoder, weights.autoencoder)
    (record,) = caplog.records
    assert all(key in record.getMessage() for key in BESIDE)
    message = refusal(read_arrays, weights, first | {"encoder.stray": np.ones(1)})
    assert "1 extra (encoder.stray)" in message


def test_a_file_of_something_else_is_refused_by_its_keys():
    weights, _ = compvis_arrays()
    message = refusal(read_arrays, weights, BESIDE)
    assert "5 keys" in message and "epoch" in message


TEXTS_UNUSED = {
    "clip": [
        "logit_scale",
        "text_projection",
        "transformer.text_projection.weight",
        "transformer.text_model.embeddings.position_ids",
        "transformer.logit_scale",
        "transformer.vision_model.post_layernorm.weight",
        "transformer.visual_projection.weight",
    ],
    "open_clip": ["model.logit_scale", "model.attn_mask", "model.visual.proj"],
    "text": ["transformer.to_logits.weight", "position_ids"],
}


@pytest.mark.parametrize("kind", TEXTS_UNUSED)
def test_what_no_text_depends_on_is_passed_over(kind):
    weights, tensors = compvis_arrays(kind)
    for key in TEXTS_UNUSED[kind]:
        tensors[f"cond_stage_model.{key}"] = np.zeros(2, np.float32)
    assert same(trees(read_arrays(weights, tensors)), trees(weights))


def test_openai_s_text_encoder_may_lack_its_inner_name():
    weights, tensors = compvis_arrays("clip")
    old = {key.replace(".text_model.", "."): v for key, v in tensors.items()}
    assert set(old) != set(tensors)
    assert same(read_arrays(weights, old).conditioner, weights.conditioner)


@pytest.mark.parametrize("kind", ["clip", "open_clip"])
def test_the_text_encoder_of_sd_turbo_has_another_prefix(kind):
    weights, tensors = compvis_arrays(kind)
    prefix = "conditioner.embedders.0."
    new = {k.replace("cond_stage_model.", prefix): v for k, v in tensors.items()}
    assert same(read_arrays(weights, new).conditioner, weights.conditioner)


def test_open_clip_may_lack_the_layer_that_nothing_reads():
    weights, tensors = compvis_arrays("open_clip")
    few = {key: v for key, v in tensors.items() if ".resblocks.2." not in key}
    assert len(few) < len(tensors)
    found = read_arrays(weights, few).conditioner["encoder"]
    assert not any(map(np.any, jax.tree.leaves(found.pop("layer_2"))))
    ours = dict(weights.conditioner["encoder"])
    ours.pop("layer_2")
    assert same(found, ours)


@pytest.mark.parametrize("kind", ["clip", "open_clip", "text", "class"])
def test_a_file_without_text_encoder_says_so(kind):
    weights, tensors = compvis_arrays(kind)
    few = {k: v for k, v in tensors.items() if not k.startswith("cond_stage_model.")}
    message = refusal(read_arrays, weights, few)
    assert "cond_stage_model." in message and "try " in message


def test_compvis_import_names_the_first_ten_faults():
    weights, tensors = compvis_arrays()
    few = {k: v for k, v in tensors.items() if "input_blocks" not in k}
    with pytest.raises(InputError) as caught:
        read_arrays(weights, few)
    assert str(caught.value).count("input_blocks.") == 10


def test_compvis_import_reads_inpainting_files_with_two_first_stages():
    weights, tensors = compvis_arrays("masked_image")
    twice = {
        key.replace("first_stage_model.", "cond_stage_model."): value
        for key, value in tensors.items()
        if key.startswith("first_stage_model.")
    }
    assert same(trees(read_arrays(weights, tensors | twice)), trees(weights))


def test_compvis_import_ignores_counters_of_a_missing_average():
    weights, tensors = compvis_arrays()
    counters = {"model_ema.decay": np.ones(()), "model_ema.num_updates": np.ones(())}
    assert same(trees(read_arrays(weights, tensors | counters)), trees(weights))


def test_a_missing_null_class_becomes_zeros():
    weights, tensors = compvis_arrays("class")
    table = np.asarray(weights.conditioner["encoder"]["table"]["embedding"])
    few = {"cond_stage_model.embedding.weight": table[:10]}
    found = read_arrays(weights, tensors | few).conditioner["encoder"]["table"]
    assert np.array_equal(found["embedding"][:10], table[:10])
    assert not found["embedding"][10].any()


def test_extra_tensors_beside_a_class_table_are_refused():
    weights, tensors = compvis_arrays("class")
    table = np.asarray(weights.conditioner["encoder"]["table"]["embedding"])
    few = {
        "cond_stage_model.embedding.weight": table[:10],
        "cond_stage_model.stray": np.zeros(1, np.float32),
    }
    with pytest.raises(InputError, match=r"1 extra \(stray\)"):
        read_arrays(weights, tensors | few)


@pytest.mark.parametrize("text", ["wide", "", "nan", "inf", "-1", "0"])
def test_file_scale_refuses_all_but_numbers_above_zero(text):
    stored = Tensors.from_arrays({}, {"ldm_jax.latent_scale": text})
    assert "ldm_jax.latent_scale: got" in refusal(file_scale, stored)


def test_file_scale_refuses_an_array():
    weights, tensors = compvis_arrays()
    with pytest.raises(InputError, match="scale_factor"):
        read_arrays(weights, tensors | {"scale_factor": np.ones(2, np.float32)})
