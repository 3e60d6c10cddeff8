import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion.guidance import (
    Call,
    autoguidance,
    call_scales,
    classifier_free,
    extrapolate,
    rescaled,
    spread_scale,
    unguided,
)

SHAPE = (3, 4, 4, 2)
EVERYWHERE = (0.0, np.inf)


def random(seed):
    return jnp.asarray(np.random.RandomState(seed).randn(*SHAPE), jnp.float32)


def call(index=0, t=500.0):
    return Call(jnp.asarray(index), jnp.asarray(t, jnp.float32))


def strong(x_t, t, cond):
    """A network whose output depends on all its inputs."""
    shift = cond["shift"][:, None, None, None]
    return jnp.tanh(x_t) + shift + t[:, None, None, None] / 1000


def weak(x_t, t, cond):
    """Another network, with a condition of another shape."""
    return 0.5 * x_t - cond[:, :1, None, None] + t[:, None, None, None] / 500


NULL = {"shift": jnp.full((3,), 9.0)}
COND = {"shift": jnp.asarray([0.0, 1.0, -2.0])}


def free(scales, rescale=0.0):
    return classifier_free(
        strong,
        null_cond=NULL,
        scales=jnp.asarray(scales, jnp.float32),
        rescale=jnp.asarray(rescale, jnp.float32),
    )


def autoguided(scales):
    return autoguidance(
        strong,
        weak,
        weak_cond=jnp.ones((3, 2)),
        scales=jnp.asarray(scales, jnp.float32),
        rescale=jnp.zeros(()),
    )


def spread(scale, step, ratio, interval=EVERYWHERE):
    """Spread scales over calls; `step` is the place of each call's step, 0 to 1."""
    places, index = np.unique(step, return_inverse=True)
    scales = spread_scale(scale, num_steps=len(places))
    ratio = np.asarray(ratio, np.float64)
    return call_scales(scales, step=index, ratio=ratio, interval=interval)


def test_unguided_calls_the_network_at_the_level_of_the_call():
    x = random(0)
    found = unguided(strong)(x, call(), COND)
    assert np.array_equal(found, strong(x, jnp.full((3,), 500.0), COND))


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0, 7.5])
def test_guidance_extrapolates_from_the_worse_through_the_better_prediction(scale):
    x, t = random(0), jnp.full((3,), 500.0)
    better = np.asarray(strong(x, t, COND))
    for guide, worse in (
        (free([scale]), strong(x, t, NULL)),
        (autoguided([scale]), weak(x, t, jnp.ones((3, 2)))),
    ):
        found = guide(x, call(), COND)
        wanted = np.asarray(worse) + scale * (better - np.asarray(worse))
        # Float32 rounding of a difference that is multiplied by up to 7.5.
        assert found == pytest.approx(wanted, abs=1e-5)
        if scale == 1.0:
            assert found == pytest.approx(better, abs=2e-6)


def test_each_call_is_guided_by_its_own_scale():
    x = random(0)
    for guide in (free, autoguided):
        several = guide([0.0, 1.0, 3.0])
        for index, scale in enumerate([0.0, 1.0, 3.0]):
            alone = guide([scale])(x, call(0), COND)
            assert np.array_equal(several(x, call(index), COND), alone)


def test_guidance_scale_is_one_outside_the_interval():
    scales = spread(3.0, [0, 0.5, 1], [10, 1, 0.1], interval=(0.5, 2.0))
    for index, scale in enumerate([1.0, 3.0, 1.0]):
        found = free(scales)(random(0), call(index), COND)
        assert np.array_equal(found, free([scale])(random(0), call(), COND))


def test_classifier_free_guidance_is_one_call_of_twice_the_batch():
    sizes = []

    def counted(x_t, t, cond):
        sizes.append(x_t.shape[0])
        return strong(x_t, t, cond)

    one = jnp.ones((1,))
    classifier_free(counted, null_cond=NULL, scales=one, rescale=jnp.zeros(()))(
        random(0), call(), COND
    )
    assert sizes == [6]


def test_rescaling_restores_the_standard_deviation_of_each_image():
    conditional, guided = random(0), 4 * random(1) + random(0)
    one, part, none = (
        np.asarray(rescaled(guided, conditional, share=jnp.asarray(share)))
        for share in (1.0, 0.7, 0.0)
    )
    wanted = np.asarray(conditional).std(axis=(1, 2, 3))
    assert one.std(axis=(1, 2, 3)) == pytest.approx(wanted, rel=1e-6)
    # Lin et al., eq. 16: a mean of the two, by the share.
    assert part == pytest.approx(0.7 * one + 0.3 * np.asarray(guided), abs=1e-5)
    assert np.array_equal(none, guided)


def test_rescale_applies_to_the_guided_prediction():
    x, t = random(0), jnp.full((3,), 500.0)
    found = free([5.0], rescale=0.4)(x, call(), COND)
    better = strong(x, t, COND)
    guided = extrapolate(strong(x, t, NULL), better, jnp.asarray(5.0))
    wanted = rescaled(guided, better, share=jnp.asarray(0.4))
    assert found == pytest.approx(np.asarray(wanted), rel=1e-5, abs=1e-5)


def test_rescaling_a_constant_prediction_is_finite():
    flat = jnp.ones(SHAPE)
    assert np.isfinite(rescaled(flat, flat, share=jnp.asarray(1.0))).all()


def test_single_guidance_scale_holds_for_every_call():
    assert spread(3.0, [0, 0.5, 0.5, 1], [80, 5, 1, 0.1]).tolist() == [3.0] * 4
    assert spread([3.0], [0, 1], [80, 5]).tolist() == [3.0] * 2


def test_guidance_scales_are_interpolated_from_first_to_last_step():
    step = [0, 0.25, 0.5, 0.75, 1]
    assert spread([1, 5], step, [1] * 5) == pytest.approx([1, 2, 3, 4, 5])
    assert spread([1, 5, 3], step, [1] * 5) == pytest.approx([1, 3, 5, 4, 3])
    # One scale a step.
    scales = np.random.RandomState(0).rand(7)
    assert spread(scales, np.linspace(0, 1, 7), [1] * 7) == pytest.approx(scales, 1e-5)


def test_guidance_interval_includes_its_ends():
    ratio = [80, 2, 1, 0.5, 0.49]
    found = spread(3.0, np.linspace(0, 1, 5), ratio, interval=(0.5, 2.0))
    assert found.tolist() == [1, 3, 3, 3, 1]
    # A level without signal has an infinite ratio, within the default interval.
    assert spread(3.0, [0, 1], [np.inf, 0.1]).tolist() == [3, 3]


def test_guidance_scales_and_rescale_may_be_traced():
    x = random(0)

    def guide(scales, rescale):
        predict = classifier_free(
            strong, null_cond=NULL, scales=scales, rescale=rescale
        )
        return predict(x, call(1), COND)

    args = jnp.asarray([2.0, 4.0]), jnp.asarray(0.5)
    found = jax.jit(guide)(*args)
    assert found == pytest.approx(np.asarray(guide(*args)), rel=1e-5, abs=1e-5)
