"""Every kind of condition trains; frozen parameters do not change."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.build import build_model, check_example
from ldm_jax.data.pipeline import Batch, prepare_example
from ldm_jax.models.conditioning import (
    ConditionInputs,
    SpatialRescaler,
    null_inputs,
)
from ldm_jax.models.transformer import SpatialTransformer
from ldm_jax.models.unet import TimeResBlock
from ldm_jax.parallel.make_layout import PmapLayout
from ldm_jax.rng import root_key
from ldm_jax.training.conditions import (
    cut_holes,
    drop_conditions,
    join_masked,
    low_resolution,
    random_holes,
)
from ldm_jax.training.diffusion_stage import diffusion_stage
from ldm_jax.training.diffusion_step import FrozenParams, inputs_of
from ldm_jax.types import InputError
from tests.support.models import config_of, model_of

BATCH = 8
SMALL = {"channel_multipliers": (1,), "attention_downsampling": (1,)}


def batch_of(config, seed=0):
    draw = np.random.RandomState(seed)
    side, condition = config.data.image_size, config.diffusion.condition
    tokens = draw.randint(0, 50, (BATCH, max(condition.num_tokens, 1)))
    width = condition.embedding_width
    return Batch(
        image=draw.randint(0, 256, (BATCH, side, side, 3)).astype(np.uint8),
        label=draw.randint(0, 10, BATCH).astype(np.int32),
        example_index=np.arange(BATCH, dtype=np.uint32),
        tokens=tokens.astype(np.int32) if condition.uses_tokens else None,
        embedding=(
            draw.normal(size=(BATCH, 1, width)).astype(np.float32)
            if condition.context == "embedding"
            else None
        ),
        segmentation=(
            draw.randint(0, 5, (BATCH, side, side)).astype(np.int32)
            if condition.concat == "segmentation"
            else None
        ),
    )


def stage_of(kind, **fields):
    config = config_of(kind, **SMALL, **fields)
    model, weights = build_model(config), model_of(config)
    trained = config.diffusion.condition.trained
    frozen = FrozenParams(
        jax.device_put(weights.autoencoder),
        jnp.asarray(0.5, jnp.float32),
        {} if trained else jax.device_put(weights.conditioner),
    )
    stage = diffusion_stage(config, model, frozen, Path())
    state = jax.eval_shape(stage.init)
    # No initialisation is compiled: parameters are drawn from their names.
    params = state.params._replace(
        unet=weights.unet, conditioner=weights.conditioner if trained else {}
    )
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state)
    params = jax.device_put(params)
    return config, stage, zeros._replace(params=params, ema=params)


def train(stage, state, batch, *, devices=1, steps=1):
    layout = PmapLayout(jax.devices()[:devices])
    state, frozen = layout.place(state), layout.place(stage.frozen)
    mapped, key = layout.map_step(stage.step), layout.place(root_key(0))
    losses = []
    for _ in range(steps):
        state, metrics = mapped(state, frozen, layout.split(batch), key)
        losses.append(float(layout.local(metrics).loss))
    return jax.device_get(layout.local(state)), losses


def moved(before, after):
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), before, after)
    return all(jax.tree.leaves(changed))


@pytest.mark.parametrize(
    "kind",
    ["class", "clip", "embedding", "segmentation", "masked_image", "low_resolution"],
)
def test_every_kind_of_condition_trains(kind):
    config, stage, state = stage_of(kind)
    after, losses = train(stage, state, batch_of(config), steps=2)
    assert np.isfinite(losses).all()
    assert moved(state.params.unet["conv_in"], after.params.unet["conv_in"])
    if kind == "segmentation":
        assert moved(state.params.conditioner, after.params.conditioner)
    if kind == "clip":
        assert after.params.conditioner == {}


def test_recomputed_activations_give_the_same_update():
    results = []
    for remat in (False, True):
        config, stage, state = stage_of("label", remat=remat)
        after, losses = train(stage, state, batch_of(config))
        results.append((losses, after.params.unet))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    gaps = jax.tree.map(lambda a, b: np.abs(a - b).max(), results[0][1], results[1][1])
    assert max(jax.tree.leaves(gaps)) < 1e-5  # the first Adam step is 1e-4 long


def test_the_null_inputs_are_the_null_class_and_the_empty_prompt():
    inputs = ConditionInputs(
        label=jnp.asarray([1, 2]),
        tokens=jnp.ones((2, 3), jnp.int32),
        embedding=jnp.ones((2, 1, 4)),
    )
    null = null_inputs(inputs, num_classes=10, null_tokens=(7, 8, 8))
    assert null.label.tolist() == [10, 10]
    assert null.tokens.tolist() == [[7, 8, 8]] * 2
    assert not null.embedding.any() and null.image is None
    settings = {"num_classes": 10, "null_tokens": (7, 8, 8)}
    with_embedding = null_inputs(
        inputs, **settings, null_embedding=jnp.full((1, 4), 3.0)
    )
    assert (
        with_embedding.embedding == 3.0
    ).all() and with_embedding.embedding.shape == (2, 1, 4)
    image_inputs = ConditionInputs(image=jnp.ones((1, 2, 2, 3)))
    kept = null_inputs(image_inputs, num_classes=0, null_tokens=())
    assert kept.image is image_inputs.image
    dropped = drop_conditions(inputs, null, jnp.asarray([True, False]))
    assert dropped.label.tolist() == [10, 2]
    assert dropped.tokens.tolist() == [[7, 8, 8], [1, 1, 1]]
    assert dropped.embedding[:, 0, 0].tolist() == [0, 1]


def test_holes_are_rectangles_of_a_quarter_to_three_quarters():
    keys = jax.random.split(jax.random.key(0), 256)
    holes = np.asarray(random_holes(keys, height=32, width=16))[..., 0]
    assert set(np.unique(holes)) == {0.0, 1.0}
    for hole in holes:
        rows, columns = hole.any(axis=1), hole.any(axis=0)
        assert np.array_equal(hole, np.outer(rows, columns))
        assert 0.25 * 32 - 1 <= rows.sum() <= 0.75 * 32 + 1
        assert 0.25 * 16 - 1 <= columns.sum() <= 0.75 * 16 + 1
    # Half of each side on average, so a quarter of the image; all inner pixels occur.
    assert holes.mean() == pytest.approx(0.25, abs=0.05)
    assert holes.any(axis=0)[1:-1, 1:-1].all()


def test_a_hole_depends_on_its_example_alone():
    keys = jax.random.split(jax.random.key(0), 4)
    many = random_holes(keys, height=8, width=8)
    assert np.array_equal(many[2:3], random_holes(keys[2:3], height=8, width=8))


def test_a_masked_image_is_black_in_its_hole_and_stacked_with_its_mask():
    image = jnp.full((1, 4, 4, 3), 0.5)
    hole = jnp.zeros((1, 4, 4, 1)).at[0, :2, :2].set(1.0)
    masked = cut_holes(image, hole)
    assert masked[0, 0, 0].tolist() == [-1, -1, -1]
    assert masked[0, 3, 3].tolist() == [0.5, 0.5, 0.5]
    joined = join_masked(jnp.full((1, 2, 2, 3), 7.0), hole)
    assert joined[0, ..., 3].tolist() == [[1, -1], [-1, -1]]
    assert (joined[..., :3] == 7.0).all()


def test_a_low_resolution_image_is_the_mean_of_blocks():
    image = jnp.arange(16.0).reshape(1, 4, 4, 1)
    small = low_resolution(image, factor=2)[0, ..., 0]
    assert small.tolist() == [[2.5, 4.5], [10.5, 12.5]]


def test_the_inputs_of_inpainting_are_a_latent_and_a_mask():
    config, stage, _ = stage_of("masked_image")
    batch = jax.tree.map(jnp.asarray, batch_of(config))
    keys = jax.random.split(jax.random.key(0), BATCH)
    inputs = inputs_of(
        batch,
        batch.image.astype(jnp.float32) / 127.5 - 1.0,
        stage.frozen,
        keys,
        model=build_model(config),
    )
    assert inputs.image.shape == (BATCH, *config.latent_shape[:2], 5)
    assert set(np.unique(inputs.image[..., 4])) == {-1.0, 1.0}


def test_a_rescaler_halves_a_map_as_bilinear_resizing_does():
    x = jax.random.normal(jax.random.key(0), (1, 8, 8, 5))
    module = SpatialRescaler(2, 3, jnp.float32)
    params = {"mix": {"kernel": jax.random.normal(jax.random.key(1), (1, 1, 5, 3))}}
    small = x
    for _ in range(2):
        shape = (1, small.shape[1] // 2, small.shape[2] // 2, 5)
        small = jax.image.resize(small, shape, "bilinear", antialias=False)
    wanted = small @ params["mix"]["kernel"][0, 0]
    assert module.apply({"params": params}, x) == pytest.approx(
        np.asarray(wanted), abs=1e-5
    )


def test_a_transformer_without_context_attends_to_itself():
    module = SpatialTransformer(1, 2, 4, jnp.float32)
    x = jax.random.normal(jax.random.key(0), (1, 2, 2, 8))
    params = module.init(jax.random.key(1), x, None)
    params = jax.tree.map(lambda p: p + 0.1, params)
    alone, kept = module.apply(params, x, None, capture_intermediates=True)
    (own,) = kept["intermediates"]["block_0"]["norm2"]["__call__"]
    assert np.array_equal(module.apply(params, x, own), alone)
    assert np.abs(module.apply(params, x, 2.0 * own) - alone).max() > 1e-3


def test_a_transformer_ignores_the_order_of_its_context():
    module = SpatialTransformer(2, 2, 4, jnp.float32)
    x = jax.random.normal(jax.random.key(0), (1, 2, 2, 8))
    context = jax.random.normal(jax.random.key(2), (1, 5, 6))
    params = module.init(jax.random.key(1), x, context)
    params = jax.tree.map(lambda p: p + 0.1, params)
    reordered = module.apply(params, x, context[:, ::-1])
    assert reordered == pytest.approx(
        np.asarray(module.apply(params, x, context)), abs=1e-5
    )


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_resampling_block_starts_as_plain_resampling(direction):
    block = TimeResBlock(8, 4, 1e-5, True, direction, jnp.float32)
    x = jax.random.normal(jax.random.key(0), (1, 4, 4, 8))
    y = block.init_with_output(jax.random.key(1), x, jnp.ones((1, 6)))[0]
    wanted = (
        np.kron(x[0].transpose(2, 0, 1), np.ones((2, 2))).transpose(1, 2, 0)
        if direction == "up"
        else np.asarray(x[0]).reshape(2, 2, 2, 2, 8).mean(axis=(1, 3))
    )
    assert y[0] == pytest.approx(wanted, abs=1e-6)


def test_prepare_example_keeps_tokens_embeddings_and_segmentation():
    example = {
        "image": np.zeros((6, 4, 3), np.uint8),
        "index": 5,
        "tokens": [1, 2],
        "embedding": np.ones((1, 3)),
        "segmentation": np.arange(24).reshape(6, 4),
    }
    prepared = prepare_example(example, image_size=2, image_channels=3)
    assert prepared["tokens"].tolist() == [1, 2]
    assert prepared["embedding"].dtype == np.float32
    # The middle square is rows 1 to 4; each of its quarters gives its first pixel.
    assert prepared["segmentation"].tolist() == [[4, 6], [12, 14]]
    assert prepared["label"] == 0


def test_prepare_example_crops_a_wide_image_to_its_centre():
    image = np.zeros((4, 12, 1), np.uint8)
    image[:, 4:8] = 200
    example = {"image": image, "index": 0}
    prepared = prepare_example(example, image_size=4, image_channels=1)
    assert (prepared["image"] == 200).all()


def test_inconsistent_condition_fields_are_refused():
    config = config_of("low_resolution")
    condition = dataclasses.replace(config.diffusion.condition, low_resolution_factor=4)
    diffusion = dataclasses.replace(config.diffusion, condition=condition)
    with pytest.raises(InputError, match="low_resolution is 4 times"):
        dataclasses.replace(config, diffusion=diffusion)
    with pytest.raises(InputError, match="transformer_depth"):
        config_of("text", transformer_depth=0)
    with pytest.raises(InputError, match=r"trained.*segmentation"):
        config = config_of("segmentation")
        frozen = dataclasses.replace(config.diffusion.condition, trained=False)
        dataclasses.replace(config.diffusion, condition=frozen)
    config = config_of("class")
    with pytest.raises(InputError, match="num_classes"):
        dataclasses.replace(
            config, data=dataclasses.replace(config.data, num_classes=0)
        )


@pytest.mark.parametrize(
    ("kind", "example", "words"),
    [
        ("text", {"image": 0}, ["tokens", "image"]),
        ("text", {"tokens": np.zeros(5)}, ["tokens", "(5,)", "(6,)"]),
        ("text", {"tokens": np.full(6, 50)}, ["tokens", "50", "0 to 49"]),
        ("embedding", {"embedding": np.zeros(12)}, ["embedding", "(12,)", "(1, 12)"]),
        ("segmentation", {"segmentation": np.full((4, 4), 9)}, ["9", "0 to 4"]),
        ("class", {"image": 0}, ["label"]),
    ],
)
def test_data_without_the_condition_is_refused_before_training(kind, example, words):
    with pytest.raises(InputError) as caught:
        check_example(config_of(kind).diffusion.condition, example, source="here")
    assert all(word in str(caught.value) for word in words), caught.value


def test_prepare_example_reads_a_segmentation_with_a_channel_axis():
    example = {
        "image": np.zeros((4, 4, 3), np.uint8),
        "index": 0,
        "segmentation": np.arange(16).reshape(4, 4, 1),
    }
    prepared = prepare_example(example, image_size=4, image_channels=3)
    assert np.array_equal(prepared["segmentation"], np.arange(16).reshape(4, 4))
