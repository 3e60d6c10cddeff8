import dataclasses
import functools
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ldm_jax.build import build_model, build_schedule, open_iterator
from ldm_jax.config import LogConfig, OptimConfig
from ldm_jax.data.pipeline import to_batch
from ldm_jax.diffusion.losses import DiffusionObjective, denoising_loss
from ldm_jax.diffusion.parameterization import PredictionName
from ldm_jax.diffusion.schedules import draw_levels
from ldm_jax.images import to_float
from ldm_jax.latent_diffusion import init_autoencoder
from ldm_jax.parallel.make_layout import PmapLayout
from ldm_jax.parallel.multihost import StopSignal
from ldm_jax.parallel.reduce import reduce_over_axis
from ldm_jax.rng import Stream, example_keys, normal, root_key
from ldm_jax.training.autoencoder_stage import (
    autoencoder_stage,
    make_reconstruct,
    measure_latent_scale,
)
from ldm_jax.training.checkpoint import CheckpointStore
from ldm_jax.training.diffusion_stage import diffusion_stage
from ldm_jax.training.diffusion_step import FrozenParams
from ldm_jax.training.loop import LoopConfig, run_stage, stage_target
from ldm_jax.training.state import (
    Optimizer,
    apply_gradients,
    init_state,
    learning_rate_schedule,
    make_optimizer,
    make_transformation,
)
from ldm_jax.types import InputError, RunError
from tests.support.tiny import get_config

CONFIG = get_config()
NETWORKS = build_model(CONFIG)


@functools.cache
def first_stage():
    params = init_autoencoder(NETWORKS, root_key(CONFIG.seed))
    return FrozenParams(params, jnp.asarray(0.5, jnp.float32), {})


def stage(name, config=CONFIG):
    model = build_model(config)
    if name == "autoencoder":
        return autoencoder_stage(config, model, Path())
    return diffusion_stage(config, model, first_stage(), Path())


def batches(num, layout):
    iterator = open_iterator(CONFIG, batch_size=8, layout=layout)
    found = [to_batch(next(iterator)) for _ in range(num)]
    iterator.close()
    return found


def run(name, devices, steps, config=CONFIG):
    """Train for a few steps; return the state and the metrics of every step."""
    layout = PmapLayout(jax.devices()[:devices])
    built = stage(name, config)
    state = layout.place(built.init())
    key = layout.place(root_key(config.seed))
    frozen = layout.place(built.frozen)
    mapped = layout.map_step(built.step)
    rows = []
    for batch in batches(steps, layout):
        state, metrics = mapped(state, frozen, layout.split(batch), key)
        rows.append(jax.device_get(layout.local(metrics)))
    return jax.device_get(layout.local(state)), rows


def relative(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(np.abs(x - y).max() / (np.abs(y).max() + 1e-12) for x, y in leaves)


@pytest.mark.parametrize("name", ["autoencoder", "diffusion"])
def test_every_device_holds_the_same_state(name):
    layout = PmapLayout(jax.devices()[:4])
    built = stage(name)
    mapped = layout.map_step(built.step)
    state, _ = mapped(
        layout.place(built.init()),
        layout.place(built.frozen),
        layout.split(batches(1, layout)[0]),
        layout.place(root_key(0)),
    )
    for leaf in jax.tree.leaves(state):
        shards = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        assert all(np.array_equal(shard, shards[0]) for shard in shards)


def test_the_state_is_donated():
    layout = PmapLayout(jax.devices()[:2])
    built = stage("diffusion")
    state = layout.place(built.init())
    mapped = layout.map_step(built.step)
    batch, key = layout.split(batches(1, layout)[0]), layout.place(root_key(0))
    after, _ = mapped(state, layout.place(built.frozen), batch, key)
    jax.block_until_ready(after)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


def test_pmap_of_one_device_equals_the_plain_step():
    built = stage("diffusion")
    layout = PmapLayout(jax.devices()[:1])
    batch = jax.tree.map(jnp.asarray, batches(1, layout)[0])
    plain, metrics = jax.jit(functools.partial(built.step, reduce=reduce_over_axis))(
        built.init(), built.frozen, batch, root_key(0)
    )
    mapped, rows = run("diffusion", 1, 1)
    assert metrics.loss == pytest.approx(rows[0].loss, rel=1e-6)
    assert relative(plain.params, mapped.params) < 1e-4


@pytest.mark.parametrize("name", ["autoencoder", "diffusion"])
def test_training_twice_gives_equal_bits(name):
    (a, _), (b, _) = run(name, 2, 3), run(name, 2, 3)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


def test_the_diffusion_stage_does_not_change_the_first_stage():
    before = jax.device_get(first_stage().autoencoder)
    run("diffusion", 1, 3)
    after = jax.device_get(first_stage().autoencoder)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, before, after)))


def with_diffusion(**fields):
    diffusion = dataclasses.replace(CONFIG.diffusion, **fields)
    return dataclasses.replace(CONFIG, diffusion=diffusion)


def test_condition_dropout_is_the_probability_of_training_the_null_class():
    def used(probability):
        state, _ = run("diffusion", 1, 4, with_diffusion(condition_dropout=probability))
        start = stage("diffusion").init().params.unet
        moved = state.params.unet["class_embedding"]["table"]["embedding"]
        moved = moved != start["class_embedding"]["table"]["embedding"]
        return np.asarray(moved.any(axis=-1))

    null = CONFIG.data.num_classes
    never, always = used(0.0), used(1.0)
    assert not never[null] and never[:null].any()
    assert always[null] and not always[:null].any()


SMALL = {"channel_multipliers": (1,), "attention_downsampling": ()}


def plain_step(config):
    """Return the diffusion step on one device, its stage, and a batch."""
    built = stage("diffusion", config)
    step = jax.jit(functools.partial(built.step, reduce=reduce_over_axis))
    batch = jax.tree.map(jnp.asarray, batches(1, PmapLayout(jax.devices()[:1]))[0])
    return step, built, batch


def test_the_diffusion_step_accepts_a_flow_with_a_loss_weight():
    flow = {"schedule": "flow", "prediction": "flow", "loss_weight": "p2"}
    step, built, batch = plain_step(with_diffusion(**SMALL, **flow))
    state = jax.eval_shape(built.init)
    after, metrics = jax.eval_shape(step, state, built.frozen, batch, root_key(0))
    assert after == state
    assert metrics.loss.shape == ()


def test_the_diffusion_step_on_continuous_levels_has_the_loss_of_its_config():
    config = with_diffusion(
        **SMALL,
        schedule="edm",
        prediction="edm",
        sigma_data=0.5,
        loss_weight="min_snr",
        loss_weight_gamma=0.7,
        offset_noise=0.3,
    )
    model, key = build_model(config), root_key(0)
    step, built, batch = plain_step(config)
    # The latents are zero, and a new UNet predicts zero: the loss is known.
    nothing = built.frozen._replace(latent_scale=jnp.zeros(()))
    state, metrics = step(built.init(), nothing, batch, key)

    def keys(stream):
        return example_keys(key, stream, 0, batch.example_index)

    shape = model.latent_shape
    shared = normal(keys(Stream.OFFSET_NOISE), shape[-1:])[:, None, None]
    losses = denoising_loss(
        lambda x_t, t, cond: jnp.zeros_like(x_t),
        jnp.zeros((8, *shape)),
        draw_levels(model.schedule, keys(Stream.TIMESTEP)),
        normal(keys(Stream.NOISE), shape) + 0.3 * shared,
        None,
        objective=DiffusionObjective(
            model.schedule,
            "edm",
            sigma_data=0.5,
            weight="min_snr",
            weight_gamma=0.7,
        ),
    )
    assert metrics.loss == pytest.approx(float(losses.mean()), rel=1e-5)
    after, metrics = step(state, built.frozen, batch, key)
    assert 0 < metrics.gradient_norm < np.inf
    assert relative(after.params, state.params) > 0


LEVELS = [
    *(("ldm_linear", zero) for zero in (False, True)),
    *(("cosine", zero) for zero in (False, True)),
    *((name, False) for name in ("linear", "flow", "edm")),
]


@pytest.mark.parametrize(("schedule", "zero_terminal_snr"), LEVELS)
def test_a_gradient_step_lowers_every_objective(schedule, zero_terminal_snr):
    first, *others = get_args(PredictionName)
    assert first == "eps"
    pure = schedule == "flow" or zero_terminal_snr
    x_0 = jax.random.normal(jax.random.key(0), (256, 1, 1, 1))
    index = jnp.arange(256, dtype=jnp.uint32)
    eps = normal(example_keys(root_key(0), Stream.NOISE, 0, index), (1, 1, 1))
    for prediction in others if pure else (first, *others):
        config = with_diffusion(
            schedule=schedule,
            zero_terminal_snr=zero_terminal_snr,
            prediction=prediction,
        )
        levels = build_schedule(config.diffusion)
        level = draw_levels(
            levels, example_keys(root_key(0), Stream.TIMESTEP, 0, index)
        )
        for weight in ("uniform", "min_snr"):
            objective = DiffusionObjective(levels, prediction, weight=weight)

            def loss(line, objective=objective, level=level):
                def denoise(x_t, t, cond):
                    return line[0] * x_t + line[1]

                args = (denoise, x_0, level, eps, None)
                return denoising_loss(*args, objective=objective).mean()

            start = jnp.asarray([1.0, 0.5])
            before, slope = jax.value_and_grad(loss)(start)
            length = jnp.linalg.norm(slope)
            assert np.isfinite(length) and length > 0
            assert loss(start - 0.01 * slope / length) < before


def test_training_lowers_the_reconstruction_error():
    optim = OptimConfig(lr=3e-3, ema_decay=0.9)
    first = dataclasses.replace(CONFIG.autoencoder, steps=60, optim=optim)
    config = dataclasses.replace(CONFIG, autoencoder=first)
    state, rows = run("autoencoder", 1, 60, config)
    assert rows[-1].reconstruction < 0.5 * rows[0].reconstruction
    image = batches(1, PmapLayout())[0].image
    output = make_reconstruct(NETWORKS)(state.params, image)
    assert (
        np.abs(output.astype(int) - image).mean()
        < np.abs(128 - image.astype(int)).mean()
    )


def test_the_latent_scale_gives_latents_unit_standard_deviation():
    params = init_autoencoder(NETWORKS, root_key(CONFIG.seed))
    one, four = (PmapLayout(jax.devices()[:num]) for num in (1, 4))

    def measured(layout):
        return measure_latent_scale(
            NETWORKS,
            params,
            root_key(CONFIG.seed),
            iterator=open_iterator(CONFIG, batch_size=8, layout=layout),
            num_batches=CONFIG.autoencoder.scale_batches,
            layout=layout,
        )

    scale, again = measured(one), measured(four)
    assert scale == pytest.approx(float(again), rel=1e-6)
    measured_batches = batches(CONFIG.autoencoder.scale_batches, one)
    images = np.concatenate([batch.image for batch in measured_batches])

    def encode(module, x):
        return module.encode(x)

    variables, x = {"params": params}, to_float(jnp.asarray(images))
    posterior = NETWORKS.autoencoder.apply(variables, x, method=encode)
    # Law of total variance: of the means, plus the mean of the posterior's.
    variance = np.var(posterior.mean) + np.exp(posterior.log_variance).mean()
    assert scale == pytest.approx(float(variance) ** -0.5, rel=0.05)


def test_the_learning_rate_warms_up_holds_and_decays():
    config = OptimConfig(lr=2.0, warmup_steps=4, decay_steps=5)
    schedule = learning_rate_schedule(config, num_steps=20)
    rates = [float(schedule(step)) for step in range(20)]
    assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert rates[5:15] == pytest.approx([2.0] * 10)
    assert rates[15:] == pytest.approx([2 * k / 6 for k in (5, 4, 3, 2, 1)])


def test_the_ema_follows_its_formula():
    optimizer = Optimizer(optax.sgd(1.0), ema_decay=0.75)
    state = init_state({"w": jnp.asarray(0.0)}, optimizer)
    average, weight = 0.0, 0.0
    for n in range(1, 40):
        gradients = {"w": jnp.asarray(-1.0)}
        state = apply_gradients(state, gradients, optimizer)
        weight += 1.0
        decay = min(0.75, (1 + n) / (10 + n))
        average = decay * average + (1 - decay) * weight
        assert state.ema["w"] == pytest.approx(average, rel=1e-5)
        assert state.step == n


def test_the_gradient_is_clipped_by_its_global_norm():
    config = OptimConfig(lr=1.0, clip_norm=0.5, b1=0.0, b2=0.0)
    optimizer = make_optimizer(config, num_steps=10)
    params = {"a": jnp.zeros(3), "b": jnp.zeros(4)}
    # With b2 = 0, Adam's second moment is the square of the clipped gradient.

    def second_moment(size):
        gradients = {"a": jnp.full(3, size), "b": jnp.zeros(4)}
        state = init_state(params, optimizer)
        state = apply_gradients(state, gradients, optimizer)
        return float(optax.tree.get(state.opt_state, "nu")["a"][0])

    assert second_moment(0.1) == pytest.approx(0.1**2)
    assert second_moment(1e8) == pytest.approx(0.5**2 / 3)


def test_muon_orthogonalises_updates_of_matrices_alone():
    config = OptimConfig(algorithm="muon", lr=0.1, clip_norm=0.0)
    optimizer = make_optimizer(config, num_steps=10)
    random = np.random.default_rng(0)
    # The gradient has singular values from 1 to 0.1; those of the update are near 1.
    left, _ = np.linalg.qr(random.normal(size=(6, 4)))
    right, _ = np.linalg.qr(random.normal(size=(4, 4)))
    matrix = left * [1.0, 0.5, 0.2, 0.1] @ right
    gradients = {
        "matrix": matrix,
        "wide": matrix.T,
        "vector": np.asarray([3.0, -1e-3]),
        "conv": random.normal(size=(3, 3, 2, 4)),
    }
    gradients = jax.tree.map(jnp.float32, gradients)
    params = jax.tree.map(jnp.zeros_like, gradients)
    state = init_state(params, optimizer)
    state = apply_gradients(state, gradients, optimizer)
    moved = jax.tree.map(lambda leaf: np.asarray(leaf) / -0.1, state.params)
    values = np.linalg.svd(moved["matrix"], compute_uv=False)
    assert values.min() > 0.6 and values.max() < 1.3
    # The same directions: u v' of the gradient.
    assert np.sum(moved["matrix"] * (left @ right)) / np.sum(values) > 0.99
    wider = np.linalg.svd(moved["wide"], compute_uv=False)
    assert wider == pytest.approx(values * (6 / 4) ** 0.5, rel=1e-3)
    # Adam's first step has length 1; with Nesterov momentum, b1 of the next is added.
    length = 1.0 + 0.9 * 0.1 / (1.0 - 0.9**2)
    assert moved["vector"] == pytest.approx([length, -length], rel=1e-3)
    assert np.abs(moved["conv"]) == pytest.approx(length, rel=1e-3)


def matrices_of_few_shapes():
    random = np.random.default_rng(0)
    shapes = {"a": (6, 4), "b": (4, 6), "c": (6, 4), "d": (5, 5), "e": (3, 3, 2, 4)}
    tree = {name: random.normal(size=shape) for name, shape in shapes.items()}
    tree["words"] = {"embedding": random.normal(size=(6, 4))}
    return jax.tree.map(jnp.float32, {**tree, "vector": random.normal(size=3)})


def test_stacked_muon_equals_optax_muon():
    numbers = {"weight_decay": 0.01, "b1": 0.8, "b2": 0.99}
    config = OptimConfig(algorithm="muon", lr=0.1, clip_norm=0.0, **numbers)
    ours = make_transformation(config, num_steps=10)
    rate = learning_rate_schedule(config, num_steps=10)
    theirs = optax.chain(
        optax.identity(),
        optax.contrib.muon(
            rate,
            weight_decay=0.01,
            adam_b1=0.8,
            adam_b2=0.99,
            adam_weight_decay=0.01,
        ),
    )
    params = matrices_of_few_shapes()
    states = [ours.init(params), theirs.init(params)]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    for step in range(3):
        gradients = jax.tree.map(lambda x, step=step: jnp.sin(x + step), params)
        moves = []
        for i, optimizer in enumerate((ours, theirs)):
            with jax.numpy_dtype_promotion("standard"):  # as in `apply_gradients`
                move, states[i] = optimizer.update(gradients, states[i], params)
            moves.append(move)
        for pair in (moves, states):
            for mine, other in zip(*map(jax.tree.leaves, pair), strict=True):
                np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-6)


def test_muon_embeddings_false_gives_embedding_tables_to_adam():
    params = matrices_of_few_shapes()
    moves = {}
    for in_muon in (True, False):
        config = OptimConfig(
            algorithm="muon", lr=0.1, clip_norm=0.0, muon_embeddings=in_muon
        )
        optimizer = make_transformation(config, num_steps=10)
        with jax.numpy_dtype_promotion("standard"):
            moves[in_muon], _ = optimizer.update(params, optimizer.init(params), params)
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), moves[True], moves[False])
    assert changed.pop("words") == {"embedding": True}
    assert not any(jax.tree.leaves(changed))
    # Adam's first step with Nesterov momentum has one length everywhere.
    length = 0.1 * (1.0 + 0.9 * 0.1 / (1.0 - 0.9**2))
    table = moves[False]["words"]["embedding"]
    np.testing.assert_allclose(np.abs(table), length, rtol=1e-3)


def test_a_non_finite_loss_names_its_step_and_keeps_the_checkpoint(tmp_path):
    built = stage("autoencoder")

    def poisoned(state, *args, **kwargs):
        after, metrics = built.step(state, *args, **kwargs)
        loss = jnp.where(state.step == 4, jnp.nan, metrics.loss)
        return after, metrics._replace(loss=loss)

    layout = PmapLayout(jax.devices()[:1])
    loop_config = LoopConfig(
        tmp_path, CONFIG.checkpoint, LogConfig(every=100, images_every=100)
    )
    with pytest.raises(RunError, match="autoencoder step 5: loss = nan"):
        run_stage(
            built._replace(step=poisoned),
            loop_config=loop_config,
            layout=layout,
            iterator=open_iterator(CONFIG, batch_size=8, layout=layout),
            root_key=root_key(0),
            notes={},
            stop=StopSignal(),
        )
    store = CheckpointStore(tmp_path / "autoencoder" / "checkpoints", keep=2)
    assert store.restore(stage_target(built, root_key(0))).step == 4
    store.close()


def test_a_batch_size_must_divide_by_the_devices():
    layout = PmapLayout(jax.devices()[:3])
    layout.check_batch_size(9, "diffusion.batch_size")
    with pytest.raises(InputError) as caught:
        layout.check_batch_size(8, "diffusion.batch_size")
    message = str(caught.value)
    assert all(
        w in message for w in ("diffusion.batch_size", "8", "3 devices", "6 or 9")
    )
