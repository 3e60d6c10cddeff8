import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.build import build_model
from ldm_jax.data.pipeline import Batch
from ldm_jax.files import write_safetensors
from ldm_jax.models.discriminator_lpips import BatchNorm, Lpips, PatchDiscriminator
from ldm_jax.parallel.reduce import reduce_over_axis
from ldm_jax.pretrained.metric_networks import load_lpips, load_perceptual
from ldm_jax.rng import root_key
from ldm_jax.training.autoencoder_loss import AutoencoderObjective, reconstruction_terms
from ldm_jax.training.autoencoder_stage import autoencoder_stage
from ldm_jax.types import InputError
from tests.support.lpips_files import CONV_INDICES, heads, torchvision, under_slices
from tests.support.tiny import get_config


def uniform(seed, shape):
    return jax.random.uniform(jax.random.key(seed), shape, minval=-1.0)


def make_critic(num_layers, channels=8):
    return PatchDiscriminator(channels, num_layers, jnp.float32)


def shapes_of(critic, side):
    image = jnp.zeros((1, side, side, 3))
    init = functools.partial(critic.init, jax.random.key(0), axis_name=None)
    return jax.eval_shape(init, image)["params"]


def test_the_patch_discriminator_has_the_published_parameter_count():
    # 64 channels, three strided layers, RGB.
    params = shapes_of(make_critic(3, 64), 256)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 2_765_633
    assert {name for name, leaves in params.items() if "bias" in leaves} == {
        "conv_0", "conv_out", "norm_1", "norm_2", "norm_3",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("num_layers", "side", "logits"), [(3, 256, 30), (2, 32, 6), (1, 8, 2), (3, 24, 1)]
)
def test_discriminator_logits_have_the_size_that_padding_one_gives(
    num_layers, side, logits
):
    critic = make_critic(num_layers)
    params = shapes_of(critic, side)
    discriminate = functools.partial(critic.apply, axis_name=None)
    shape = jax.eval_shape(
        discriminate, {"params": params}, jnp.zeros((2, side, side, 3))
    )
    assert shape.shape == (2, logits, logits)
    assert shape.dtype == jnp.float32


def test_the_discriminator_refuses_images_too_small_for_a_logit():
    with pytest.raises(ValueError, match="16x16 pixels are too few for 3 strided"):
        shapes_of(make_critic(3), 16)


def test_discriminator_kernels_and_scales_have_the_published_initialisation():
    critic = make_critic(2, 32)
    image = jnp.zeros((1, 32, 32, 3))
    params = jax.jit(functools.partial(critic.init, axis_name=None))(
        jax.random.key(0), image
    )["params"]
    assert np.std(params["conv_2"]["kernel"]) == pytest.approx(0.02, rel=0.02)
    scale = params["norm_2"]["scale"]
    assert np.mean(scale) == pytest.approx(1.0, abs=0.01)
    assert np.std(scale) == pytest.approx(0.02, rel=0.3)


def test_batch_norm_equals_its_definition():
    x = 3.0 + 2.0 * uniform(0, (4, 5, 6, 7))
    params = {"scale": uniform(1, (7,)), "bias": uniform(2, (7,))}
    y = BatchNorm(jnp.float32).apply({"params": params}, x, None)
    rows = np.asarray(x, np.float64).reshape(-1, 7)
    wanted = (rows - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-5)
    wanted = wanted * np.asarray(params["scale"]) + np.asarray(params["bias"])
    assert y.reshape(-1, 7) == pytest.approx(wanted, abs=1e-5)


def test_batch_norm_over_devices_is_batch_norm_of_the_whole_batch():
    x, pull = uniform(0, (8, 3, 3, 4)), uniform(1, (8, 3, 3, 4))
    params = {"scale": jnp.ones(4), "bias": jnp.zeros(4)}

    def loss(x, pull, axis_name):
        y = BatchNorm(jnp.float32).apply({"params": params}, x, axis_name)
        return jnp.vdot(y, pull), y

    slope = jax.grad(loss, has_aux=True)
    whole = slope(x, pull, None)
    for devices in (2, 8):
        parts = (devices, 8 // devices, 3, 3, 4)
        mapped = jax.pmap(
            functools.partial(slope, axis_name="d"),
            axis_name="d",
            devices=jax.devices()[:devices],
        )(x.reshape(parts), pull.reshape(parts))
        for ours, wanted in zip(mapped, whole, strict=True):
            assert ours.reshape(wanted.shape) == pytest.approx(
                np.asarray(wanted), abs=1e-5
            )


@functools.cache
def lpips():
    """Return random LPIPS parameters, and the distance for the smallest images."""
    image = jnp.zeros((1, 16, 16, 3))
    params = jax.jit(Lpips().init)(jax.random.key(0), image, image)["params"]
    apply = jax.jit(lambda params, x, y: Lpips().apply({"params": params}, x, y))
    return params, apply


def test_lpips_is_zero_for_equal_images_only():
    params, distance = lpips()
    x, y = uniform(0, (2, 16, 16, 3)), uniform(1, (2, 16, 16, 3))
    assert (jnp.abs(distance(params, x, x)) < 1e-12).all()
    there, back = distance(params, x, y), distance(params, y, x)
    assert there.shape == (2,) and (there > 1e-3).all()
    assert there == pytest.approx(np.asarray(back), rel=1e-5)
    # The distance of a pair does not depend on its batch.
    assert distance(params, x[:1], y[:1]) == pytest.approx(float(there[0]), rel=1e-5)


def test_lpips_repeats_grey_images_to_three_channels():
    params, distance = lpips()
    x, y = uniform(0, (2, 16, 16, 1)), uniform(1, (2, 16, 16, 1))
    colour = [jnp.repeat(images, 3, axis=-1) for images in (x, y)]
    wanted = distance(params, *colour)
    assert distance(params, x, y) == pytest.approx(np.asarray(wanted), rel=1e-5)


def test_lpips_gradient_is_finite_where_all_features_are_zero():
    params, _ = lpips()
    # A bias far below zero makes the first feature maps zero.
    dark = jax.tree.map(jnp.copy, params)
    dark["vgg"]["conv1_2"]["bias"] = jnp.full((64,), -1e3)
    x, y = uniform(0, (1, 16, 16, 3)), uniform(1, (1, 16, 16, 3))

    def total(y):
        return Lpips().apply({"params": dark}, x, y).sum()

    assert jnp.isfinite(jax.jit(jax.grad(total))(y)).all()


def test_lpips_refuses_images_too_small_for_vgg():
    x = jnp.zeros((1, 15, 32, 3))
    with pytest.raises(ValueError, match="got 15x32 pixels, wanted sides of at least"):
        jax.eval_shape(lambda: Lpips().init(jax.random.key(0), x, x))


def save(path, arrays):
    write_safetensors(path, arrays)
    return str(path)


def prefixed(prefix, arrays):
    return {prefix + key: value for key, value in arrays.items()}


def test_load_lpips_reads_equal_weights_from_every_file_layout(tmp_path):
    vgg, lin = torchvision(), heads()
    whole = {**under_slices(vgg), **lin}
    inside = {"encoder.conv_in.weight": np.zeros(3, np.float32)}
    unused = {"classifier.0.weight": np.zeros((2, 2), np.float32)}

    def load(*contents):
        paths = [tmp_path / f"{i}.safetensors" for i in range(len(contents))]
        files = tuple(map(save, paths, contents))
        tree = load_lpips(files)
        for path in paths:
            path.unlink()  # 60 MB each, and pytest keeps folders
        return tree

    trees = [
        load({**vgg, **unused}, lin),
        load(whole),
        load(inside | prefixed("loss.perceptual_loss.", whole)),
        load(inside | prefixed("first_stage_model.loss.perceptual_loss.", whole)),
    ]
    params, _ = lpips()
    assert jax.tree.map(np.shape, trees[0]) == jax.tree.map(np.shape, params)
    for tree in trees[1:]:
        assert all(jax.tree.leaves(jax.tree.map(np.array_equal, tree, trees[0])))
    first = vgg["features.0.weight"].transpose(2, 3, 1, 0)
    assert np.array_equal(trees[0]["vgg"]["conv1_1"]["kernel"], first)
    last = vgg[f"features.{CONV_INDICES[-1]}.bias"]
    assert np.array_equal(trees[0]["vgg"]["conv5_3"]["bias"], last)
    assert np.array_equal(
        trees[0]["head_2"]["kernel"][:, 0], lin["lin2.model.1.weight"].ravel()
    )


def test_load_lpips_names_the_file_of_a_missing_part(tmp_path):
    vgg = save(tmp_path / "vgg16", torchvision())
    with pytest.raises(InputError, match=r"vgg16, which lack LPIPS.*vgg\.pth"):
        load_lpips((vgg,))
    lin = save(tmp_path / "heads", heads())
    with pytest.raises(InputError, match=r"lack VGG16.*torchvision's vgg16"):
        load_lpips((lin,))
    with pytest.raises(InputError, match="nowhere"):
        load_lpips((str(Path("nowhere")),))


def test_load_lpips_refuses_wrong_shapes_negative_heads_and_conflicts(tmp_path):
    vgg, lin = torchvision(), heads()
    wrong = save(tmp_path / "wrong", {**vgg, "features.2.bias": np.zeros(3, "f4")})
    right = save(tmp_path / "right", lin)
    with pytest.raises(InputError, match=r"features\.2\.bias: got \(3,\)"):
        load_lpips((wrong, right))
    negative = {**lin, "lin1.model.1.weight": -lin["lin1.model.1.weight"]}
    negative = save(tmp_path / "negative", negative)
    good = save(tmp_path / "vgg16", vgg)
    with pytest.raises(InputError, match=r"lin1\.model\.1\.weight has negative"):
        load_lpips((good, negative))
    with pytest.raises(InputError, match=r"differ in lin1\.model\.1\.weight"):
        load_lpips((right, negative))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_lpips_is_added_to_the_error_of_every_value(reduction):
    params, distance = lpips()
    x, y = uniform(0, (2, 16, 16, 3)), uniform(1, (2, 16, 16, 3))
    objective = AutoencoderObjective("l1", reduction, 0.5, 0.0, 0.0, "corrected", 0.25)
    loss = jax.jit(functools.partial(reconstruction_terms, objective=objective))
    total, parts = loss(y, x, params)
    distances = distance(params, x, y)
    per_value = jnp.abs(x - y) + 0.5 * distances[:, None, None, None]
    wanted = per_value.sum() / 2 if reduction == "sum" else per_value.mean()
    assert total == pytest.approx(float(wanted), rel=1e-5)
    assert parts.perceptual == pytest.approx(float(distances.mean()), rel=1e-5)
    assert parts.reconstruction == pytest.approx(float(jnp.abs(x - y).mean()), rel=1e-5)


def with_lpips(side, *files):
    config = get_config()
    first = dataclasses.replace(
        config.autoencoder, perceptual_weight=1.0, perceptual_files=files
    )
    data = dataclasses.replace(config.data, image_size=side)
    return dataclasses.replace(config, data=data, autoencoder=first)


def test_load_perceptual_refuses_lpips_without_files():
    config = with_lpips(16)
    with pytest.raises(
        InputError, match=r"^perceptual_files: got none, wanted .*; try"
    ):
        load_perceptual(config.autoencoder)
    assert load_perceptual(get_config().autoencoder) is None


def test_an_autoencoder_stage_without_files_has_the_shapes_of_lpips():
    config = with_lpips(16)
    stage = autoencoder_stage(config, build_model(config), Path())
    shapes = jax.tree.map(lambda leaf: leaf.shape, stage.frozen)
    assert shapes == jax.tree.map(jnp.shape, lpips()[0])
    batch = Batch(
        jnp.zeros((2, 16, 16, 1), jnp.uint8),
        jnp.zeros((2,), jnp.int32),
        jnp.zeros((2,), jnp.uint32),
    )
    step = functools.partial(stage.step, reduce=reduce_over_axis)
    state = jax.eval_shape(stage.init)
    _, metrics = jax.eval_shape(step, state, stage.frozen, batch, root_key(0))
    assert metrics.perceptual.shape == ()
    with pytest.raises(ValueError, match="LPIPS has no parameters"):
        jax.eval_shape(step, state, None, batch, root_key(0))


def test_an_image_size_too_small_for_lpips_is_refused_before_loading():
    config = with_lpips(8)
    with pytest.raises(InputError, match=r"image_size: got 8, wanted at least 16"):
        autoencoder_stage(config, build_model(config), Path())
