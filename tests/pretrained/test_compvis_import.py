"""Import of checkpoints in CompVis naming."""

import numpy as np
import pytest

from ldm_jax.diffusion.schedules import make_schedule
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
from tests.support.pretrained import compvis_arrays, read_arrays, refusal, trees


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
