import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.build import build_model
from ldm_jax.latent_diffusion import init_autoencoder, init_unet
from ldm_jax.models.attention import attend
from ldm_jax.models.bottleneck import DiagonalGaussian, gaussian_from_moments
from ldm_jax.models.conditioning import Condition
from ldm_jax.models.kernels.convolution import (
    NUMBERS,
    by_rows,
    convolve,
    with_ordered_gradients,
)
from ldm_jax.models.kernels.upsample import in_four_phases, with_gaps
from ldm_jax.models.layers import (
    SYMMETRIC_PADDING,
    TRAILING_PADDING,
    Downsample,
    GroupNorm,
    Upsample,
    conv,
    timestep_embedding,
)
from ldm_jax.models.unet import pixel_coordinates
from ldm_jax.parallel.reduce import mean_over_parts, reduce_over_axis
from ldm_jax.rng import root_key
from ldm_jax.training.dispatch import several_steps
from ldm_jax.training.state import TrainState
from tests.support.tiny import get_config


def normal(seed, shape):
    return jax.random.normal(jax.random.key(seed), shape)


def test_group_norm_equals_its_definition():
    x = 3.0 + 2.0 * normal(0, (2, 5, 3, 8))
    module = GroupNorm(4, 1e-5, jnp.float32)
    params = {"scale": normal(1, (8,)), "bias": normal(2, (8,))}
    y = module.apply({"params": params}, x)
    groups = np.asarray(x, np.float64).reshape(2, 5, 3, 4, 2)
    mean = groups.mean(axis=(1, 2, 4), keepdims=True)
    variance = groups.var(axis=(1, 2, 4), keepdims=True)
    wanted = ((groups - mean) / np.sqrt(variance + 1e-5)).reshape(x.shape)
    wanted = wanted * np.asarray(params["scale"]) + np.asarray(params["bias"])
    assert y == pytest.approx(wanted, abs=2e-5)


def test_group_norm_has_the_gradient_of_flax():
    x = normal(0, (2, 4, 4, 8))
    target = normal(1, x.shape)
    ours = GroupNorm(4, 1e-5, jnp.float32)
    theirs = nn.GroupNorm(4, epsilon=1e-5)
    params = ours.init(jax.random.key(0), x)

    def gradient(module):
        return jax.grad(lambda x: jnp.vdot(module.apply(params, x), target))(x)

    assert gradient(ours) == pytest.approx(np.asarray(gradient(theirs)), abs=1e-5)


def test_the_timestep_embedding_is_cosines_then_sines():
    embedding = timestep_embedding(jnp.asarray([0, 10]), width=4, max_period=100.0)
    angles = [10.0, 10.0 / 10.0]
    wanted = [[1, 1, 0, 0], [*np.cos(angles), *np.sin(angles)]]
    assert embedding == pytest.approx(np.asarray(wanted), abs=1e-6)
    with pytest.raises(ValueError, match="even"):
        timestep_embedding(jnp.asarray([0]), width=3)


def test_downsample_pads_at_the_end_or_on_both_sides():
    # A kernel that copies its first pixel shows where the window starts.
    x = jnp.arange(16, dtype=jnp.float32).reshape(1, 4, 4, 1)
    kernel = jnp.zeros((3, 3, 1, 1)).at[0, 0].set(1.0)
    params = {"params": {"conv": {"kernel": kernel, "bias": jnp.zeros((1,))}}}
    trailing = Downsample(TRAILING_PADDING, jnp.float32).apply(params, x)
    symmetric = Downsample(SYMMETRIC_PADDING, jnp.float32).apply(params, x)
    assert trailing[0, ..., 0].tolist() == [[0, 2], [8, 10]]
    assert symmetric[0, ..., 0].tolist() == [[0, 0], [0, 5]]


def test_upsampling_repeats_pixels():
    x = jnp.asarray([[1.0, 2.0], [3.0, 4.0]]).reshape(1, 2, 2, 1)
    kernel = jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1.0)
    params = {"params": {"conv": {"kernel": kernel, "bias": jnp.zeros((1,))}}}
    y = Upsample(jnp.float32).apply(params, x)[0, ..., 0]
    assert y.tolist() == np.kron([[1, 2], [3, 4]], np.ones((2, 2))).tolist()


def test_attend_equals_jax_attention():
    q, k, v = (normal(i, (2, n, 3, 8)) for i, n in enumerate((5, 7, 7)))
    wanted = jax.nn.dot_product_attention(q, k, v)
    assert attend(q, k, v) == pytest.approx(np.asarray(wanted), abs=1e-5)


def test_gaussian_kl_equals_a_monte_carlo_estimate():
    mean, log_variance = normal(0, (2, 2, 2, 1)), normal(1, (2, 2, 2, 1))
    kl = DiagonalGaussian(mean, log_variance).kl()
    # Monte Carlo of E[log q - log p], 200,000 draws.
    std = np.exp(0.5 * np.asarray(log_variance, np.float64))
    z = np.random.RandomState(0).randn(200_000, 2, 2, 2, 1)
    x = np.asarray(mean) + std * z
    ratio = 0.5 * (x**2 - z**2) - np.log(std)
    assert kl == pytest.approx(ratio.mean(axis=0).sum(axis=(1, 2, 3)), rel=2e-2)
    zero = DiagonalGaussian(jnp.zeros((1, 2, 2, 1)), jnp.zeros((1, 2, 2, 1)))
    assert zero.kl() == 0.0


def test_the_log_variance_is_clamped():
    moments = jnp.asarray([0.0, 0.0, -99.0, 99.0]).reshape(1, 1, 1, 4)
    log_variance = gaussian_from_moments(moments).log_variance
    assert log_variance.ravel().tolist() == [-30.0, 20.0]


def tiny(**data):
    config = get_config()
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **data))


@pytest.mark.parametrize("channels", [1, 3])
def test_autoencoder_keeps_the_shape_of_its_images(channels):
    config = tiny(image_channels=channels)
    model = build_model(config)
    params = init_autoencoder(model, root_key(config.seed))
    images = normal(0, (2, 8, 8, channels))
    noise = normal(1, (2, *model.latent_shape))
    result = model.autoencoder.apply({"params": params}, images, noise)
    assert result.images.shape == images.shape
    assert result.latents.shape == noise.shape


def test_unet_predicts_zero_at_first_and_later_depends_on_time_and_class():
    config = tiny()
    model = build_model(config)
    params = init_unet(model, root_key(config.seed))
    x = normal(0, (2, *model.latent_shape))

    def predict(params, t, label):
        cond = Condition(label=jnp.full((2,), label))
        return model.unet.apply({"params": params}, x, jnp.full((2,), t), cond)

    assert not predict(params, 3, 1).any()
    moved = jax.tree.map(lambda leaf: leaf + 0.1 * normal(2, leaf.shape), params)
    base = predict(moved, 3, 1)
    assert np.abs(predict(moved, 900, 1) - base).max() > 1e-4
    assert np.abs(predict(moved, 3, 2) - base).max() > 1e-4
    assert np.abs(predict(moved, 3, config.data.num_classes) - base).max() > 1e-4


def test_a_pooled_context_is_the_mean_of_its_tokens_in_the_time_embedding():
    def unet(pooled, dtype="float32"):
        config = tiny()
        condition = dataclasses.replace(
            config.diffusion.condition, label=False, context="class", pooled=pooled
        )
        settings = dataclasses.replace(
            config.diffusion,
            condition=condition,
            transformer_depth=1,
            channel_multipliers=(1,),
            attention_downsampling=(),  # only the middle block attends
            dtype=dtype,
        )
        config = dataclasses.replace(config, diffusion=settings)
        return config, build_model(config)

    (config, pooled), (_, plain) = unet(True), unet(False)
    params = init_unet(pooled, root_key(config.seed))
    moved = jax.tree.map(lambda leaf: 0.1 * normal(2, leaf.shape), params)
    # The middle transformer's output is zero: only the mean has an effect.
    output = moved["mid_0"]["transformer"]["proj_out"]
    zero_output = jax.tree.map(jnp.zeros_like, output)
    moved["mid_0"]["transformer"]["proj_out"] = zero_output
    x, t = normal(0, (2, *pooled.latent_shape)), jnp.asarray([3, 700])
    context = normal(1, (2, 4, config.diffusion.condition.context_width))

    @functools.partial(jax.jit, static_argnums=0)
    def predict(unet, params, context):
        return unet.apply({"params": params}, x, t, Condition(context=context))

    base = predict(pooled.unet, moved, context)
    mean = jnp.broadcast_to(context.mean(1, keepdims=True), context.shape)
    again = predict(pooled.unet, moved, mean)
    np.testing.assert_allclose(again, base, rtol=1e-4, atol=1e-5)
    assert np.abs(predict(pooled.unet, moved, context + 1.0) - base).max() > 1e-2
    # The pooled context adds to the embedding like the bias of its last layer.
    kernel, bias = (moved["context_pooled"][name] for name in ("kernel", "bias"))
    added = context.mean(1)[:1] @ kernel + bias
    same = {name: leaf for name, leaf in moved.items() if name != "context_pooled"}
    last = same["time_1"]
    same["time_1"] = {**last, "bias": last["bias"] + added[0]}
    first = predict(plain.unet, same, context)[:1]
    np.testing.assert_allclose(first, base[:1], rtol=1e-4, atol=1e-5)
    _, half = unet(True, "bfloat16")
    shape = jax.eval_shape(lambda: predict(half.unet, moved, context))
    assert (shape.shape, shape.dtype) == (x.shape, jnp.float32)


def test_bfloat16_computes_near_float32_and_keeps_float32_parameters():
    config = tiny()
    half = dataclasses.replace(
        config, diffusion=dataclasses.replace(config.diffusion, dtype="bfloat16")
    )
    model, networks_half = build_model(config), build_model(half)
    params = init_unet(networks_half, root_key(half.seed))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    params = jax.tree.map(lambda leaf: leaf + 0.1 * normal(2, leaf.shape), params)
    x, t = normal(0, (2, *model.latent_shape)), jnp.asarray([3, 700])
    cond = Condition(label=t % 10)
    full = model.unet.apply({"params": params}, x, t, cond)
    less = networks_half.unet.apply({"params": params}, x, t, cond)
    assert less.dtype == jnp.float32
    error = np.linalg.norm(less - full) / np.linalg.norm(full)
    assert 0 < error < 0.03  # bfloat16 has 8 bits: 0.4 % a rounding


@pytest.mark.parametrize(
    "height, width, into, out", [(8, 8, 3, 5), (1, 9, 2, 4), (7, 64, 4, 1)]
)
def test_convolution_by_rows_equals_the_plain_one(height, width, into, out):
    x, kernel = normal(0, (2, height, width, into)), normal(1, (3, 3, into, out))
    slope = normal(2, (2, height, width, out))

    def plainly(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=numbers
        )

    values, pull = jax.vjp(by_rows, x, kernel)
    wanted, pull_plainly = jax.vjp(plainly, x, kernel)
    np.testing.assert_allclose(values, wanted, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(pull(slope), pull_plainly(slope), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", [in_four_phases, with_gaps])
@pytest.mark.parametrize("height, width, into, out", [(8, 8, 3, 5), (1, 9, 2, 4)])
def test_upsampled_convolution_at_input_size_equals_the_plain_one(
    way, height, width, into, out
):
    x, kernel = normal(0, (2, height, width, into)), normal(1, (3, 3, into, out))
    slope = normal(2, (2, 2 * height, 2 * width, out))

    def plainly(x, kernel):
        twice = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        return jax.lax.conv_general_dilated(
            twice, kernel, (1, 1), "SAME", dimension_numbers=NUMBERS
        )

    def distances(fn, x, kernel, slope):
        """Return the relative errors of values and gradients."""
        values, pull = jax.vjp(fn, x, kernel)
        found = (values, *pull(slope.astype(values.dtype)))
        return [
            np.linalg.norm(np.asarray(one, np.float64) - other) / np.linalg.norm(other)
            for one, other in zip(found, truth, strict=True)
        ]

    # In bfloat16 each sum of kernel weights is rounded once, like a weight.
    half = x.astype(jnp.bfloat16)
    wanted, pull = jax.vjp(plainly, half.astype(jnp.float32), kernel)
    truth = [np.asarray(one, np.float64) for one in (wanted, *pull(slope))]
    cast = lambda x, kernel: plainly(x, kernel.astype(x.dtype))  # noqa: E731
    ours, theirs = (distances(fn, half, kernel, slope) for fn in (way, cast))
    assert all(a < 1.3 * b for a, b in zip(ours, theirs, strict=True))
    wanted, pull = jax.vjp(plainly, x, kernel)
    truth = [np.asarray(one, np.float64) for one in (wanted, *pull(slope))]
    assert max(distances(way, x, kernel, slope)) < 1e-6


def test_upsampled_convolution_follows_from_platform_size_and_batch():
    layer = Upsample(jnp.float32)

    def products_in(side, platform, *, images=1):
        x = jax.ShapeDtypeStruct((images, side, side, 4), jnp.float32)
        params = jax.eval_shape(layer.init, jax.random.key(0), x)
        lowered = jax.jit(layer.apply).trace(params, x)
        text = lowered.lower(lowering_platforms=(platform,)).as_text()
        dilated = "lhs_dilate = [2, 2]" in text
        return text.count("stablehlo.convolution"), dilated

    assert products_in(8, "cpu") == (4, False)
    assert products_in(4, "cpu") == (1, False)
    assert products_in(4, "tpu", images=8) == (1, True)
    assert products_in(32, "tpu") == products_in(32, "tpu", images=7) == (3, False)
    assert products_in(8, "tpu") == products_in(8, "cuda", images=8) == (1, False)


def test_convolution_by_rows_is_used_on_tpus_for_small_batches_of_wide_maps():
    layer = conv(4, 3, jnp.float32, "conv")

    def rows_in(batch, side, platform="tpu"):
        x = jax.ShapeDtypeStruct((batch, side, side, 4), jnp.float32)
        params = jax.eval_shape(layer.init, jax.random.key(0), x)
        lowered = jax.jit(layer.apply).trace(params, x)
        text = lowered.lower(lowering_platforms=(platform,)).as_text()
        return text.count("stablehlo.convolution")

    assert rows_in(4, 64) == 3
    assert rows_in(8, 64) == rows_in(4, 32) == rows_in(4, 64, "cpu") == 1


@pytest.mark.parametrize(
    "height, width, window, stride, padding",
    [
        (8, 8, 3, 1, ((1, 1), (1, 1))),
        (7, 9, 3, 2, ((1, 1), (1, 1))),
        (8, 10, 3, 2, ((0, 1), (0, 1))),
        (6, 5, 1, 1, ((0, 0), (0, 0))),
        (9, 9, 5, 3, ((2, 2), (1, 0))),
    ],
)
def test_ordered_gradients_equal_the_plain_ones(height, width, window, stride, padding):
    x, kernel = normal(0, (3, height, width, 4)), normal(1, (window, window, 4, 5))
    strides = (stride, stride)

    def plainly(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, strides, padding, dimension_numbers=NUMBERS
        )

    def ours(x, kernel):
        return with_ordered_gradients(x, kernel, strides, padding)

    @functools.partial(jax.jit, static_argnums=0)
    def all_of(fn, x, kernel):
        values, pull = jax.vjp(fn, x, kernel)
        return values, *pull(normal(2, values.shape))

    found, wanted = all_of(ours, x, kernel), all_of(plainly, x, kernel)
    for got, plain in zip(found, wanted, strict=True):
        np.testing.assert_allclose(got, plain, rtol=1e-5, atol=1e-5)


def gradient_of(layer):
    """Return the gradient function of the sum of a layer's squared output."""

    def loss(params, x):
        return (layer.apply(params, x) ** 2).sum()

    return jax.grad(loss, argnums=(0, 1))


def two_steps(gradient, params, batch):
    def step(state, frozen, batch, root_key, *, reduce):
        of_params, of_batch = gradient(state.params, batch)
        return state._replace(params=of_params), of_batch

    state = TrainState(jnp.int32(0), params, ema=None, opt_state=None)
    batches, key = jnp.stack([batch, batch]), jax.random.key(0)
    return several_steps(step)(state, None, batches, key, reduce=reduce_over_axis)


def two_parts(gradient, params, batch):
    return mean_over_parts(lambda part: gradient(params, part), batch, parts=2)


@pytest.mark.parametrize("way", [two_steps, two_parts])
def test_all_convolutions_of_a_loop_have_one_order_on_a_cpu(way):
    layer = conv(4, 3, jnp.float32, "conv")
    x = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    params = jax.eval_shape(layer.init, jax.random.key(0), x)

    def orders(platform):
        traced = jax.jit(functools.partial(way, gradient_of(layer))).trace(params, x)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        found = re.findall(r"dim_numbers = (\[.*?\]x\[.*?\]->\[.*?\])", text)
        assert len(found) >= 3
        return len(set(found))

    assert orders("cpu") == 1
    assert orders("tpu") > 1  # the orders that JAX chooses


def test_ordered_gradients_support_forward_mode_and_its_gradients():
    x, kernel = normal(0, (2, 6, 6, 3)), normal(1, (3, 3, 3, 3))

    def plainly(x, kernel):
        padding = ((1, 1), (1, 1))
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), padding, dimension_numbers=NUMBERS
        )

    def ours(x, kernel):
        return convolve(x, kernel, (1, 1), [(1, 1), (1, 1)], dimension_numbers=NUMBERS)

    def slope(fn, kernel):
        def twice(x):
            return fn(jnp.tanh(fn(x, kernel)), kernel)

        return jnp.square(jax.jvp(twice, (x,), (jnp.ones_like(x),))[1]).sum()

    found, wanted = (
        jax.value_and_grad(functools.partial(slope, fn))(kernel)
        for fn in (ours, plainly)
    )
    for got, plain in zip(found, wanted, strict=True):
        np.testing.assert_allclose(got, plain, rtol=1e-4, atol=1e-4)


def test_pixel_coordinates_are_pixel_centres():
    plane = pixel_coordinates(jnp.zeros((2, 4, 2, 3)))
    assert plane.shape == (2, 4, 2, 2)
    np.testing.assert_allclose(plane[1, 0, :, 0], [-0.5, 0.5])
    np.testing.assert_allclose(plane[0, :, 1, 1], [-0.75, -0.25, 0.25, 0.75])


def test_a_unet_with_coordinates_reads_two_more_channels():
    config = tiny()
    settings = dataclasses.replace(config.diffusion, coordinates=True)
    model = build_model(dataclasses.replace(config, diffusion=settings))
    plain = init_unet(build_model(config), root_key(config.seed))
    params = init_unet(model, root_key(config.seed))
    shapes, plain = (jax.tree.map(jnp.shape, tree) for tree in (params, plain))
    *sizes, channels, out = plain["conv_in"]["kernel"]
    assert shapes["conv_in"]["kernel"] == (*sizes, channels + 2, out)
    shapes["conv_in"] = plain["conv_in"]
    assert shapes == plain
