import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ldm_jax.build import build_model
from ldm_jax.config import OptimConfig
from ldm_jax.data.pipeline import Batch
from ldm_jax.images import to_float
from ldm_jax.parallel.make_layout import PmapLayout
from ldm_jax.parallel.reduce import reduce_over_axis
from ldm_jax.rng import Stream, example_keys, normal, root_key
from ldm_jax.training.autoencoder_stage import autoencoder_stage, make_adversary
from ldm_jax.training.checkpoint import CheckpointStore
from ldm_jax.training.gan_loss import (
    adaptive_weight,
    adversary_factor,
    gan_gradients,
    hinge_loss,
    vanilla_loss,
)
from ldm_jax.training.loop import checkpoint_tree, stage_target
from ldm_jax.training.state import (
    CriticState,
    Optimizer,
    apply_gradients,
    init_state,
    make_optimizer,
)
from ldm_jax.types import InputError
from tests.support.tiny import get_config

START = 2
RATE = 0.01


def make_config(regularizer="kl", *, enabled=True, start_step=START, **fields):
    """The tiny run with a discriminator, at a high learning rate."""
    config = get_config()
    optim = OptimConfig(lr=2e-3, b1=0.5, b2=0.9, clip_norm=0.0, ema_decay=0.9)
    rules = {
        "enabled": enabled,
        "start_step": start_step,
        "channels": 4,
        "num_layers": 1,
        "optim": optim,
    }
    own = {name: fields.pop(name) for name in ("loss", "weight") if name in fields}
    first = dataclasses.replace(
        config.autoencoder,
        regularizer=regularizer,
        codebook_size=16,
        optim=optim,
        adversary=dataclasses.replace(config.autoencoder.adversary, **rules, **own),
        **fields,
    )
    return dataclasses.replace(config, autoencoder=first)


def adversary_of(config):
    return make_adversary(config.autoencoder, build_model(config))


def build(config):
    return autoencoder_stage(config, build_model(config), Path())


@functools.cache
def batches(num):
    """Images with something to learn: a bright square somewhere on grey noise."""
    random = np.random.RandomState(0)
    found = []
    for i in range(num):
        image = random.randint(40, 90, (8, 8, 8, 1))
        for picture, (y, x) in zip(image, random.randint(0, 5, (8, 2)), strict=True):
            picture[y : y + 3, x : x + 3] += 120
        index = np.arange(8 * i, 8 * i + 8, dtype=np.uint32)
        found.append(Batch(image.astype(np.uint8), np.zeros(8, np.int32), index))
    return found


def descend(config, rate):
    """Return the first state and a step of plain gradient descent."""
    descent, stage = optax.sgd(rate), build(config)
    ema_decay = config.autoencoder.optim.ema_decay
    state, own = stage.init(), {"optimizer": Optimizer(descent, ema_decay)}
    state = state._replace(opt_state=descent.init(state.params))
    if config.autoencoder.adversary.enabled:
        start = descent.init(state.critic.params)
        state = state._replace(critic=state.critic._replace(opt_state=start))
        objective = stage.step.keywords["objective"]
        adversary = objective.adversary._replace(optimizer=descent)
        own["objective"] = objective._replace(adversary=adversary)
    return state, functools.partial(stage.step, **own)


@functools.cache
def run(config, devices, steps, rate=None, layout=PmapLayout):
    """Train a few steps; return the state before and after each, and the metrics.

    A rate selects plain descent. Adam turns a gradient of mere rounding errors, such as
    that of a bias before a norm, into a full step in either direction.
    """
    layout, stage = layout(jax.devices()[:devices]), build(config)
    start, step = descend(config, rate) if rate else (stage.init(), stage.step)
    state, mapped = layout.place(start), layout.map_step(step)
    key = layout.place(root_key(config.seed))
    states, rows = [jax.device_get(layout.local(state))], []
    for batch in batches(steps):
        state, metrics = mapped(state, None, layout.split(batch), key)
        rows.append(jax.device_get(layout.local(metrics)))
        states.append(jax.device_get(layout.local(state)))
    return states, rows


def leaves_equal(a, b):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


def distance(a, b):
    return float(optax.tree.norm(jax.tree.map(lambda x, y: x - y, a, b)))


def present(metrics):
    return {k: float(v) for k, v in metrics._asdict().items() if v is not None}


def plain_update(config):
    """Return the reference update: jax.grad of the whole losses."""
    model, settings = build_model(config), config.autoencoder
    adversary = adversary_of(config)

    def discriminate(critic, x):
        return adversary.discriminator.apply({"params": critic}, x, axis_name=None)

    def update(state, batch):
        images = to_float(batch.image)
        keys = example_keys(
            root_key(0), Stream.AUTOENCODER_POSTERIOR, state.step, batch.example_index
        )
        noise = normal(keys, model.latent_shape)

        def losses(params):
            made = model.autoencoder.apply({"params": params}, images, noise)
            error = jnp.abs(made.images - images)
            is_sum = settings.reduction == "sum"
            terms = error.sum() / len(images) if is_sum else error.mean()
            generator = -discriminate(state.critic.params, made.images).mean()
            if settings.regularizer == "kl":
                penalty = settings.kl_weight * made.bottleneck.kl().mean()
            else:
                penalty = settings.codebook_weight * made.bottleneck.loss(
                    beta=settings.commitment_beta, commitment=settings.commitment
                )
            return terms, generator, penalty, made.images

        def length(which):
            gradients = jax.grad(lambda params: losses(params)[which])(state.params)
            return jnp.linalg.norm(gradients["decoder"]["conv_out"]["kernel"].ravel())

        weight = jnp.clip(length(0) / (length(1) + 1e-4), 0.0, 1e4)
        factor = jnp.where(state.step >= START, 1.0, 0.0)

        def loss(params):
            terms, generator, penalty, _ = losses(params)
            scale = factor * jax.lax.stop_gradient(weight) * settings.adversary.weight
            return terms + penalty + scale * generator

        def critic_loss(critic):
            fake = jax.lax.stop_gradient(losses(state.params)[3])
            of = hinge_loss if settings.adversary.loss == "hinge" else vanilla_loss
            return factor * of(discriminate(critic, images), discriminate(critic, fake))

        value, gradients = jax.value_and_grad(loss)(state.params)
        return value, gradients, jax.grad(critic_loss)(state.critic.params), weight

    return jax.jit(update)


@pytest.mark.parametrize(
    ("regularizer", "fields"),
    [
        ("kl", {"reduction": "sum"}),
        ("vq", {"commitment": "legacy", "loss": "vanilla", "weight": 2.0}),
    ],
)
def test_one_backward_pass_gives_the_gradient_of_the_whole_loss(regularizer, fields):
    config = make_config(regularizer, **fields)
    state, step = descend(config, 1.0)
    step = jax.jit(functools.partial(step, reduce=reduce_over_axis))
    plain = plain_update(config)
    for done in (START - 1, START):
        before = state._replace(step=jnp.asarray(done, jnp.int32))
        after, metrics = step(before, None, batches(1)[0], root_key(0))
        loss, gradients, critic_gradients, weight = plain(before, batches(1)[0])
        assert metrics.loss == pytest.approx(float(loss), rel=1e-5)
        assert metrics.adaptive_weight == pytest.approx(float(weight), rel=1e-5)
        for new, old, wanted in (
            (after.params, before.params, gradients),
            (after.critic.params, before.critic.params, critic_gradients),
        ):
            moved = jax.tree.map(lambda x, y: x - y, old, new)
            assert distance(moved, wanted) <= 1e-5 * float(optax.tree.norm(wanted))


@pytest.mark.parametrize("regularizer", ["kl", "vq"])
def test_the_discriminator_is_inactive_before_its_start_step(regularizer):
    states, _ = run(make_config(regularizer), 1, 4, RATE)
    alone, _ = run(make_config(regularizer, enabled=False), 1, 4, RATE)
    assert alone[0].critic is None
    for i in range(1, START + 1):
        assert leaves_equal(states[i].critic, states[0].critic)
        length = distance(alone[i].params, alone[i - 1].params)
        assert length > 0.0
        assert distance(states[i].params, alone[i].params) < 1e-5 * length
        assert distance(states[i].ema, alone[i].ema) < 1e-5 * length
    assert not leaves_equal(states[START + 1].critic, states[0].critic)
    length = distance(alone[START + 1].params, alone[START].params)
    assert distance(states[START + 1].params, alone[START + 1].params) > 0.01 * length


def test_unsynchronised_batch_norm_has_statistics_of_each_device():
    config = make_config()
    adversary = dataclasses.replace(config.autoencoder.adversary, sync_batch_norm=False)
    first = dataclasses.replace(config.autoencoder, adversary=adversary)
    config = dataclasses.replace(config, autoencoder=first)
    (_, together), (_, apart) = run(make_config(), 1, 4, RATE), run(config, 2, 1, RATE)
    a, b = together[0], apart[0]
    assert a.reconstruction == pytest.approx(b.reconstruction, rel=1e-5)
    assert a.logits_fake != pytest.approx(b.logits_fake, rel=1e-3)


@pytest.mark.parametrize("regularizer", ["kl", "vq"])
def test_all_numbers_stay_finite_when_the_discriminator_starts(regularizer):
    config = make_config(regularizer, loss="vanilla")
    states, rows = run(config, 1, 10)
    assert all(np.isfinite(value) for row in rows for value in present(row).values())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(states[-1]))
    assert [row.adversary_factor for row in rows] == [0.0] * START + [1.0] * 8
    # Adam's step counts, too, are zero before the start step.
    assert leaves_equal(states[START].critic, states[0].critic)
    counts = optax.tree.get_all_with_path(states[-1].critic.opt_state, "count")
    assert {int(count) for _, count in counts} == {8}


@pytest.mark.parametrize(
    ("regularizer", "enabled", "present", "absent"),
    [
        ("kl", False, {"kl"}, {"codebook", "perplexity", "critic_loss"}),
        ("kl", True, {"kl", "critic_loss", "adaptive_weight"}, {"dead_codes"}),
        ("vq", False, {"codebook", "perplexity", "dead_codes"}, {"kl", "logits_real"}),
        ("vq", True, {"codebook", "logits_real", "logits_fake"}, {"kl"}),
    ],
)
def test_metrics_that_do_not_apply_are_none(regularizer, enabled, present, absent):
    config = make_config(regularizer, enabled=enabled)
    stage = build(config)
    step = functools.partial(stage.step, reduce=reduce_over_axis)
    state = jax.eval_shape(stage.init)
    _, metrics = jax.eval_shape(step, state, None, batches(1)[0], root_key(0))
    names = [name for name, value in metrics._asdict().items() if value is not None]
    assert names[0] == "loss"
    assert present <= set(names) and not absent & set(names)


def test_the_adversary_factor_is_zero_then_rises_to_one():
    def factors(ramp_steps):
        return [
            float(adversary_factor(jnp.asarray(i), start_step=3, ramp_steps=ramp_steps))
            for i in range(9)
        ]

    assert factors(0) == [0, 0, 0, 1, 1, 1, 1, 1, 1]
    assert factors(3) == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1]


def test_the_adaptive_weight_is_a_clipped_ratio_of_norms():
    ones = jnp.ones((3, 3, 2, 1))
    assert adaptive_weight(6.0 * ones, 2.0 * ones) == pytest.approx(3.0, rel=1e-4)
    assert adaptive_weight(ones, 0.0 * ones) == 1e4
    assert adaptive_weight(0.0 * ones, ones) == 0.0
    slope = jax.grad(lambda scale: adaptive_weight(scale * ones, ones))(1.0)
    assert slope == 0.0


def test_hinge_and_vanilla_loss_equal_their_formulas():
    real = jnp.asarray([0.5, 2.0]).reshape(2, 1, 1)
    fake = jnp.asarray([-0.5, -3.0]).reshape(2, 1, 1)
    assert hinge_loss(real, fake) == pytest.approx(0.5 * (0.25 + 0.25))
    sigmoid = [1 / (1 + np.exp(-x)) for x in (0.5, 2.0, 0.5, 3.0)]
    wanted = 0.5 * -np.mean(np.log(sigmoid)) * 2
    assert vanilla_loss(real, fake) == pytest.approx(wanted, rel=1e-6)


def test_the_discriminator_learns_to_separate_blurred_images():
    config = make_config()
    adversary, optimizer = adversary_of(config), Optimizer(optax.adam(2e-3), 0.0)
    images = to_float(jnp.asarray(batches(1)[0].image))
    blurred = 0.5 * (images + jnp.roll(images, 1, axis=2))
    state = init_state(build(config).init().critic.params, optimizer)

    @jax.jit
    def learn(state):
        found = gan_gradients(adversary, state.params, images, blurred, axis_name=None)
        gradients = found.critic_gradients
        state = apply_gradients(state, gradients, optimizer)
        return state, found

    losses = []
    for _ in range(60):
        state, found = learn(state)
        losses.append(float(found.critic_loss))
    assert losses[-1] < 0.5 * losses[0]
    assert found.logits_real > 0.5 > -0.5 > found.logits_fake


def test_a_clip_norm_of_zero_clips_nothing():
    params, gradients = {"w": jnp.zeros(3)}, {"w": jnp.full(3, 100.0)}

    def moment(clip_norm):
        config = OptimConfig(lr=1.0, clip_norm=clip_norm, b1=0.0, b2=0.0)
        optimizer = make_optimizer(config, num_steps=10)
        state = init_state(params, optimizer)
        state = apply_gradients(state, gradients, optimizer)
        return state, float(optax.tree.get(state.opt_state, "nu")["w"][0])

    (free, unclipped), (bound, clipped) = moment(0.0), moment(1.0)
    assert unclipped == 1e4
    assert clipped == pytest.approx(1 / 3)
    assert jax.tree.structure(free) == jax.tree.structure(bound)


def test_a_discriminator_too_deep_for_the_images_is_an_input_error():
    config = make_config()
    adversary = dataclasses.replace(config.autoencoder.adversary, num_layers=3)
    first = dataclasses.replace(config.autoencoder, adversary=adversary)
    with pytest.raises(InputError, match=r"num_layers: got 3, wanted at most 1.*8x8"):
        build(dataclasses.replace(config, autoencoder=first))


def test_a_checkpoint_restores_the_discriminator(tmp_path):
    stage, key = build(make_config()), root_key(0)
    state = stage.init()
    store = CheckpointStore(tmp_path, keep=1)
    store.save(1, checkpoint_tree(state, key, {}), {})
    found = store.restore(stage_target(stage, key)).tree["state"]
    store.close()
    assert isinstance(found.critic, CriticState)
    assert leaves_equal(found, state)


@pytest.mark.parametrize("regularizer", ["kl", "vq"])
def test_bfloat16_keeps_parameters_and_metrics_in_float32(regularizer):
    stage = build(make_config(regularizer, dtype="bfloat16"))
    step = functools.partial(stage.step, reduce=reduce_over_axis)
    state = jax.eval_shape(stage.init)
    after, metrics = jax.eval_shape(step, state, None, batches(1)[0], root_key(0))
    assert jax.tree.map(lambda leaf: leaf.dtype, after) == jax.tree.map(
        lambda leaf: leaf.dtype, state
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(metrics)} == {jnp.dtype("float32")}
