"""The precision of products is the model's in every program, and part of a run."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from ldm_jax.build import build_model
from ldm_jax.config import (
    AdversaryConfig,
    ConditionConfig,
    Config,
    OptimConfig,
    digest,
    from_json,
    to_json,
)
from ldm_jax.config.launch import Launch
from ldm_jax.config.serialization import differences
from ldm_jax.latent_diffusion import blank_inputs, encode_images
from ldm_jax.parallel.launch import start
from ldm_jax.parallel.make_layout import PmapLayout
from ldm_jax.pretrained.open_weights import to_sample_params
from ldm_jax.rng import image_keys
from ldm_jax.sampling.editing import make_invert_fn
from ldm_jax.sampling.export import export_sample_program, split_program
from ldm_jax.sampling.sample_fn import make_sample_fn
from ldm_jax.sampling.sampling_config import SamplingConfig
from ldm_jax.training.dry_run import batch_shapes, stages_by_shape
from ldm_jax.training.latent_cache import made_of
from ldm_jax.training.latent_encoders import EncoderInputs, Encoders, make_encode
from ldm_jax.training.workdir import check_workdir
from ldm_jax.types import InputError
from tests.support.models import TEXT, model_of
from tests.support.products import precisions
from tests.support.tiny import get_config

NAMES = ("default", "highest")
ALWAYS = "HIGHEST HIGHEST"


@functools.cache
def config_of(precision: str) -> Config:
    """Return a config with a codebook, a text, an adversary and Muon."""
    config, muon = get_config(), OptimConfig(algorithm="muon")
    adversary = AdversaryConfig(enabled=True, channels=4, num_layers=1, optim=muon)
    text = dataclasses.replace(TEXT, depth=1)
    condition = ConditionConfig(context="text", text=text)
    return dataclasses.replace(
        config,
        precision=precision,
        autoencoder=dataclasses.replace(
            config.autoencoder,
            regularizer="vq",
            codebook_size=8,
            adversary=adversary,
            optim=muon,
        ),
        diffusion=dataclasses.replace(
            config.diffusion,
            channel_multipliers=(1,),
            attention_downsampling=(1,),
            condition=condition,
            transformer_depth=1,
            optim=muon,
        ),
    )


@functools.cache
def model(precision: str):
    return build_model(config_of(precision))


@functools.cache
def weights():
    return to_sample_params(model_of(config_of("default")))


def check(text: str, precision: str, *, always: int = 0) -> None:
    """Assert the precision of all products of a program.

    Args:
      always: Products that have the highest in any run: those with a codebook.
    """
    made = precisions(text)
    if precision == "default":
        assert made.count(ALWAYS) == always
        made = [one for one in made if one != ALWAYS]
    assert set(made) == {f"{precision.upper()} {precision.upper()}"}


@pytest.mark.parametrize("precision", NAMES)
@pytest.mark.parametrize("name", ["autoencoder", "diffusion"])
def test_every_product_of_a_step_has_the_precision_of_its_run(name, precision):
    config = config_of(precision)
    stages = stages_by_shape(config, model(precision))
    (stage,) = (stage for stage in stages if stage.name == name)
    batch = batch_shapes(model(precision), config.data, name, stage.batch_size)
    state = jax.eval_shape(stage.init)
    lowered = PmapLayout(jax.devices()[:1]).lower(
        stage.step, state, stage.frozen, batch
    )
    check(lowered.as_text(), precision, always=int(name == "autoencoder"))


@pytest.mark.parametrize("precision", NAMES)
def test_every_product_of_an_exported_program_has_its_precision_on_any_chip(precision):
    data = export_sample_program(
        model(precision), weights(), platforms=("cpu", "cuda", "tpu")
    )
    module = export.deserialize(bytearray(split_program(data)[1]))
    check(module.mlir_module(), precision, always=3)  # the codebook, by platform


def sampled(model, params):
    keys, cond = image_keys([0]), blank_inputs(model)
    return make_sample_fn(model)(params, keys, cond, SamplingConfig(steps=1)).images


def inverted(model, params):
    image = jnp.zeros((1, *model.image_shape))
    return make_invert_fn(model, num_steps=1)(params, image, blank_inputs(model))


def encoded(model, params):
    return encode_images(model, params, jnp.zeros((1, *model.image_shape)))


@pytest.mark.parametrize(
    ("make", "always"), [(sampled, 1), (inverted, 0), (encoded, 0)]
)
def test_another_precision_is_another_program(make, always):
    """Also in one process, in any order, and under another setting of JAX."""
    for precision in (*NAMES, *NAMES[:1]):
        fn = functools.partial(make, model(precision))
        with jax.default_matmul_precision("bfloat16"):
            text = jax.jit(fn).lower(weights()).as_text()
        check(text, precision, always=always)


@pytest.mark.parametrize("precision", NAMES)
def test_every_product_of_a_latent_cache_has_its_precision(precision, monkeypatch):
    mapped = []
    monkeypatch.setattr(PmapLayout, "map_images", lambda _, fn: mapped.append(fn))
    encoders = Encoders(weights().autoencoder, weights().conditioner)
    make_encode(model(precision), encoders, PmapLayout(jax.devices()[:1]))
    image = np.zeros((1, *model(precision).image_shape), np.uint8)
    inputs = EncoderInputs(image, np.zeros((1, TEXT.length), np.int32))
    (fn,) = mapped
    check(jax.jit(fn).lower(encoders, None, inputs).as_text(), precision)


def test_the_worse_model_of_guidance_multiplies_as_the_model():
    fn = make_sample_fn(model("highest"), weak=model("default"))
    keys, cond = image_keys([0]), blank_inputs(model("highest"))

    def run(params):
        settings = SamplingConfig(steps=1, autoguidance="worse")
        return fn(params, keys, cond, settings, weak_params=params).images

    check(jax.jit(run).lower(weights()).as_text(), "highest")


def test_another_precision_is_another_run_and_the_usual_one_is_not_written(tmp_path):
    plain = get_config()
    highest = dataclasses.replace(plain, precision="highest")
    assert "precision" not in json.loads(to_json(plain))
    assert json.loads(to_json(highest))["precision"] == "highest"
    assert from_json(to_json(highest)) == highest and from_json(to_json(plain)) == plain
    assert differences(plain, highest) == {"precision": ["default", "highest"]}
    assert digest(plain) != digest(highest)
    (tmp_path / "config.json").write_text(to_json(plain))
    with pytest.raises(InputError, match=r"precision \('default' there, 'highest' he"):
        check_workdir(highest, tmp_path)
    with pytest.raises(InputError, match=r"--change: got precision.*another run"):
        check_workdir(highest, tmp_path, ["precision"])


def test_a_latent_cache_names_a_precision_that_is_not_the_usual_one():
    plain = get_config()
    highest = made_of(dataclasses.replace(plain, precision="highest"))
    assert highest == {**made_of(plain), "precision": "highest"}
    assert "precision" not in made_of(plain)


def test_a_setting_of_jax_that_networks_do_not_follow_is_told(caplog):
    with jax.default_matmul_precision("highest"):
        start(Launch())
    (line,) = caplog.messages
    assert "JAX_DEFAULT_MATMUL_PRECISION: got highest" in line
    caplog.clear()
    start(Launch())
    assert caplog.messages == []
