import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.build import build_model
from ldm_jax.config import AutoencoderConfig, Config, DataConfig, DiffusionConfig
from ldm_jax.latent_diffusion import init_autoencoder, param_shapes
from ldm_jax.models.autoencoder import Autoencoder
from ldm_jax.models.bottleneck import (
    Codebook,
    DiagonalGaussian,
    Quantized,
    Unquantized,
    code_usage,
    nearest,
    perplexity,
    read_moments,
)
from ldm_jax.parallel.make_layout import PmapLayout
from ldm_jax.rng import root_key
from ldm_jax.training.autoencoder_stage import latent_scale
from tests.support.tiny import get_config

BASE = {"channel_multipliers": (1, 2, 4), "latent_channels": 3}
F8 = {"channel_multipliers": (1, 2, 2, 4), "latent_channels": 4}
VQ = {"regularizer": "vq"}
AT_16 = {"attention_resolutions": (16,)}
AT_32 = {"attention_resolutions": (32,)}


# Counts of the original classes, encoder, decoder, both 1x1 convolutions and codebook.
@pytest.mark.parametrize(
    ("fields", "parameters"),
    [
        (BASE, 55_312_063),
        ({"channel_multipliers": (1, 2, 4, 4), "latent_channels": 4}, 83_653_863),
        (
            {"channel_multipliers": (1, 1, 2, 2, 4), "latent_channels": 16, **AT_16},
            69_610_963,
        ),
        (
            {
                "channel_multipliers": (1, 1, 2, 2, 4, 4),
                "latent_channels": 64,
                "attention_resolutions": (16, 8),
            },
            103_880_131,
        ),
        ({**BASE, **VQ, "codebook_size": 8192}, 55_322_782),
        ({**BASE, **VQ, "codebook_size": 8192, "mid_attention": False}, 53_219_486),
        ({**F8, **VQ, **AT_32, "codebook_size": 16384}, 67_717_295),
        ({**F8, **VQ, **AT_32, "codebook_size": 256}, 67_652_783),
        (
            {
                "channel_multipliers": (1, 1, 2, 2, 4),
                "latent_channels": 8,
                "codebook_size": 16384,
                **VQ,
                **AT_16,
            },
            69_593_371,
        ),
    ],
    ids=["kl-f4", "kl-f8", "kl-f16", "kl-f32", "vq-f4", "vq-f4-noattn"]
    + ["vq-f8", "vq-f8-n256", "vq-f16"],
)
def test_autoencoders_of_the_paper_have_their_parameter_counts(fields, parameters):
    config = Config(
        data=DataConfig(image_size=256, image_channels=3),
        autoencoder=AutoencoderConfig(**fields),
        diffusion=DiffusionConfig(channel_multipliers=(1, 2)),
    )
    model = build_model(config)
    shapes = param_shapes(init_autoencoder, model)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameters


def make_networks(**fields):
    config = get_config()
    first = dataclasses.replace(config.autoencoder, codebook_size=8, **fields)
    config = dataclasses.replace(config, autoencoder=first)
    return config, build_model(config)


@functools.cache
def vq():
    """A small autoencoder with a codebook, its parameters, and its jitted methods."""
    config, model = make_networks(regularizer="vq")
    encode, decode = (
        jax.jit(functools.partial(model.autoencoder.apply, method=method))
        for method in (Autoencoder.encode, Autoencoder.decode)
    )
    params = init_autoencoder(model, root_key(config.seed))
    return model, params, encode, decode


def images(side=8):
    return jax.random.uniform(jax.random.key(7), (2, side, side, 1), minval=-1.0)


def noise(model):
    return jax.random.normal(jax.random.key(8), (2, *model.latent_shape))


def test_latent_channels_may_differ_from_z_channels():
    for regularizer, moments in (("kl", 2), ("vq", 1)):
        _, model = make_networks(regularizer=regularizer, z_channels=5)
        params = param_shapes(init_autoencoder, model)
        assert params["encoder"]["conv_out"]["bias"].shape == (moments * 5,)
        assert params["quant_conv"]["kernel"].shape == (1, 1, moments * 5, moments * 2)
        assert params["post_quant_conv"]["kernel"].shape == (1, 1, 2, 5)
        assert params["decoder"]["conv_in"]["kernel"].shape[2] == 5
        apply = model.autoencoder.apply
        output = jax.eval_shape(apply, {"params": params}, images(), noise(model))
        assert output.images.shape == images().shape
        assert output.latents.shape == (2, *model.latent_shape)


def test_attention_level_does_not_depend_on_the_image_size():
    _, model = make_networks(attention_resolutions=(4,))
    params = param_shapes(init_autoencoder, model)
    assert {"attention_0"} <= params["encoder"]["down_1"].keys()
    assert "attention_0" not in params["encoder"]["down_0"]
    init = functools.partial(model.autoencoder.init, jax.random.key(0))
    other = jax.eval_shape(init, images(16), jnp.zeros((2, 8, 8, 2)))["params"]
    assert jax.tree.map(jnp.shape, other) == jax.tree.map(jnp.shape, params)


def test_a_codebook_starts_uniform_within_one_over_its_size():
    codes = vq()[1]["codebook"]["embedding"]
    assert codes.shape == (8, 2)
    assert 0.05 < np.abs(codes).max() <= 1 / 8


def test_the_mode_and_every_sample_of_unquantised_latents_are_the_latents():
    model, params, encode, _ = vq()
    encoded = encode({"params": params}, images())
    assert isinstance(encoded, Unquantized)
    sample = encoded.sample(noise(model))
    assert np.array_equal(encoded.mode(), sample)
    codes = params["codebook"]["embedding"]
    assert not any(np.array_equal(row, sample[0, 0, 0]) for row in codes)


def test_decoding_rounds_latents_to_the_codebook_first():
    model, params, _, decode = vq()
    variables, latents = {"params": params}, noise(model)
    codes = Codebook(8, 2).apply({"params": params["codebook"]}, latents).codes
    assert not np.array_equal(codes, latents)
    assert np.array_equal(decode(variables, latents), decode(variables, codes))
    output = jax.jit(model.autoencoder.apply)(variables, images(), latents)
    decoded = decode(variables, output.latents)
    assert output.images == pytest.approx(np.asarray(decoded), abs=1e-5)


def test_the_mode_of_a_gaussian_is_its_mean():
    mean = noise(vq()[0])
    assert np.array_equal(DiagonalGaussian(mean, mean).mode(), mean)


def test_nearest_code_equals_brute_force():
    latents = jax.random.normal(jax.random.key(0), (3, 5, 4, 3))
    codes = jax.random.normal(jax.random.key(1), (40, 3))
    squares = np.square(np.asarray(latents)[..., None, :] - np.asarray(codes))
    assert np.array_equal(nearest(latents, codes), squares.sum(-1).argmin(-1))


def test_nearest_code_of_a_tie_is_the_first():
    codes = jnp.asarray([[5.0, 5.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    latents = jnp.asarray([[1.0, 0.0], [2.0, 2.0]]).reshape(1, 1, 2, 2)
    # The second latent is as near to code 1 as to 2 and to 3.
    assert nearest(latents, codes).tolist() == [[[1, 1]]]


def quantized():
    latents = jax.random.normal(jax.random.key(2), (2, 3, 3, 4))
    codes = jax.random.normal(jax.random.key(3), latents.shape)
    return Quantized(latents, codes, jnp.zeros((2, 3, 3), jnp.int32))


def test_straight_through_has_values_of_codes_and_gradients_of_latents():
    value = quantized()
    assert np.array_equal(value.straight_through(), value.codes)
    cotangent = jax.random.normal(jax.random.key(4), value.latents.shape)

    def loss(latents, codes):
        passed = Quantized(latents, codes, value.indices).straight_through()
        return jnp.vdot(passed, cotangent)

    to_latents, to_codes = jax.grad(loss, argnums=(0, 1))(value.latents, value.codes)
    assert np.array_equal(to_latents, cotangent)
    assert not to_codes.any()


@pytest.mark.parametrize(
    ("commitment", "on_latents", "on_codes"),
    [("corrected", 0.25, 1.0), ("legacy", 1.0, 0.25)],
)
def test_beta_weights_one_term_of_the_codebook_loss(commitment, on_latents, on_codes):
    value = quantized()

    def loss(latents, codes):
        passed = Quantized(latents, codes, value.indices)
        return passed.loss(beta=0.25, commitment=commitment)

    total, slopes = jax.value_and_grad(loss, argnums=(0, 1))(value.latents, value.codes)
    error = np.asarray(value.latents - value.codes)
    assert total == pytest.approx(1.25 * np.square(error).mean(), rel=1e-6)
    slope = 2.0 * error / error.size
    assert slopes[0] == pytest.approx(on_latents * slope, abs=1e-7)
    assert slopes[1] == pytest.approx(-on_codes * slope, abs=1e-7)


def test_only_used_codes_have_a_gradient():
    model, params, *_ = vq()

    def loss(params):
        output = model.autoencoder.apply({"params": params}, images(), noise(model))
        loss = output.bottleneck.loss(beta=0.25, commitment="corrected")
        return loss, output.bottleneck.indices

    gradients, indices = jax.jit(jax.grad(loss, has_aux=True))(params)
    moved = np.abs(gradients["codebook"]["embedding"]).any(axis=-1)
    assert set(np.flatnonzero(moved)) == set(np.unique(indices))


def test_usage_is_a_distribution_and_perplexity_its_effective_size():
    indices = jnp.asarray([0, 0, 1, 1, 3, 3, 4, 4]).reshape(1, 2, 4)
    usage = code_usage(indices, size=6)
    assert usage.tolist() == [0.25, 0.25, 0.0, 0.25, 0.25, 0.0]
    assert perplexity(usage) == pytest.approx(4.0)
    assert perplexity(jnp.asarray([0.0, 1.0])) == 1.0


def test_configured_latent_scale_is_not_measured(tmp_path):
    config, model = make_networks(latent_scale=0.18215)
    layout = PmapLayout(jax.devices()[:1])
    (tmp_path / "autoencoder").mkdir()
    scale = latent_scale(config, model, {}, layout, tmp_path)
    assert scale == pytest.approx(0.18215)
    assert scale.dtype == jnp.float32


def test_moments_round_trip_exactly():
    mean, spread = jax.random.normal(jax.random.key(0), (2, 3, 4, 4, 2))
    kept = DiagonalGaussian(mean, 40.0 * spread)
    once = read_moments(kept.moments(), regularizer="kl")  # and clamped
    again = read_moments(once.moments(), regularizer="kl")
    assert jax.tree.all(jax.tree.map(np.array_equal, once, again))
    assert np.array_equal(once.mean, mean) and once.log_variance.max() <= 20.0
    latents = Unquantized(mean)
    assert np.array_equal(
        read_moments(latents.moments(), regularizer="vq").latents, mean
    )
