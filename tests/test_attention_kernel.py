"""Attention as one kernel: equal to the plain one, and chosen where it belongs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.flops import count_flops
from ldm_jax.nn import attention
from ldm_jax.nn.attention import attend, attend_plainly
from ldm_jax.nn.attention_blocks import Shape, blocks_of
from ldm_jax.nn.fused_attention import fused_attention

KERNEL = "tpu_custom_call"


def arrays(shape: Shape, *, heads: int = 2, batch: int = 2, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(3), 4)
    tokens = (shape.queries, shape.keys, shape.keys, shape.queries)
    return [
        jax.random.normal(key, (batch, n, heads, shape.width), dtype)
        for key, n in zip(keys, tokens, strict=True)
    ]


def interpreted(q, k, v):
    heads = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    return jnp.swapaxes(fused_attention(*heads, True), 1, 2)


def distance(one, other):
    one, other = (np.asarray(x, np.float64) for x in (one, other))
    return np.linalg.norm(one - other) / np.linalg.norm(other)


@pytest.mark.parametrize(
    "shape",
    [
        Shape(256, 256, 64),
        Shape(512, 512, 40),
        Shape(1024, 300, 40),
        Shape(384, 384, 32),
        Shape(256, 1000, 160),
        Shape(1024, 1024, 7),
        Shape(128, 640, 512),
    ],
)
def test_values_and_gradients_are_those_of_the_plain_one(shape):
    q, k, v, slope = arrays(shape)
    values, pull = jax.vjp(interpreted, q, k, v)
    plain, pull_plainly = jax.vjp(attend_plainly, q, k, v)
    assert distance(values, plain) < 3e-6
    for ours, theirs in zip(pull(slope), pull_plainly(slope), strict=True):
        assert distance(ours, theirs) < 3e-6


def test_in_16_bits_it_is_no_further_from_the_truth_than_the_plain_one():
    shape = Shape(512, 512, 40)
    exact = arrays(shape)
    rounded = [x.astype(jnp.bfloat16) for x in exact]
    exact = [x.astype(jnp.float32) for x in rounded]
    truth, pull_exactly = jax.vjp(attend_plainly, *exact[:3])
    errors = []
    for attention_fn in (interpreted, attend_plainly):
        values, pull = jax.vjp(attention_fn, *rounded[:3])
        assert values.dtype == jnp.bfloat16
        slopes = zip(pull(rounded[3]), pull_exactly(exact[3]), strict=True)
        errors.append([distance(values, truth), *(distance(a, b) for a, b in slopes)])
    assert max(errors[0]) < 0.01
    assert all(ours <= 1.1 * plain for ours, plain in zip(*errors, strict=True))


def test_large_logits_do_not_overflow():
    q, k, v, slope = arrays(Shape(256, 256, 16))
    values, pull = jax.vjp(interpreted, 1e3 * q, k, v)
    plain, _ = jax.vjp(attend_plainly, 1e3 * q, k, v)
    assert distance(values, plain) < 1e-4
    assert all(bool(jnp.isfinite(x).all()) for x in pull(slope))


@pytest.mark.parametrize(
    "shape, blocks",
    [
        (Shape(64, 64, 64), None),  # small: quickly written and read
        (Shape(256, 256, 40), (256, 256)),
        (Shape(1024, 1024, 40), (512, 512)),
        (Shape(4096, 4096, 512), (512, 512)),
        (Shape(4096, 300, 40), (512, 300)),
        (Shape(4096, 77, 40), None),  # few keys
        (Shape(4096, 4097, 40), None),  # too many keys
        (Shape(4096, 1025, 40), None),  # keys do not divide
        (Shape(4096, 4096, 513), None),  # too wide
        (Shape(1000, 1000, 40), None),  # queries do not divide
        (Shape(640, 640, 40), (128, 128)),
    ],
)
def test_how_tokens_are_cut(shape, blocks):
    assert blocks_of(shape) == blocks


def lowered(fn, platform, *args):
    return jax.jit(fn).trace(*args).lower(lowering_platforms=(platform,)).as_text()


def total(q, k, v, slope):
    return jnp.vdot(attend(q, k, v), slope)


def test_the_platform_compiled_for_chooses():
    args = arrays(Shape(256, 256, 40))
    step = jax.value_and_grad(total, argnums=(0, 1, 2))
    for_tpu = lowered(step, "tpu", *args)
    assert for_tpu.count(KERNEL) == 2  # there and back
    assert "exponential" not in for_tpu
    assert KERNEL not in lowered(step, "cpu", *args)
    assert KERNEL not in lowered(step, "cuda", *args)  # none is here to try it on


def test_what_no_kernel_fits_is_done_plainly():
    for shape in (Shape(64, 64, 40), Shape(1000, 1000, 8)):
        assert KERNEL not in lowered(total, "tpu", *arrays(shape, heads=1, batch=1))
    q, k, v, _ = arrays(Shape(256, 256, 40))
    mask = jnp.tril(jnp.ones((256, 256), bool))
    masked = lowered(lambda q, k, v: attend(q, k, v, mask=mask), "tpu", q, k, v)
    assert KERNEL not in masked


def test_on_a_cpu_nothing_changes():
    q, k, v, slope = arrays(Shape(256, 256, 40))

    def both(attention_fn):
        fn = lambda *a: jnp.vdot(attention_fn(*a), slope)  # noqa: E731
        return jax.jit(jax.value_and_grad(fn, argnums=(0, 1, 2)))(q, k, v)

    jax.tree.map(np.testing.assert_array_equal, both(attend), both(attend_plainly))


def test_the_kernel_counts_the_same_flops():
    q, k, v, slope = arrays(Shape(256, 256, 40))
    plainly = lambda *a: jnp.vdot(attend_plainly(*a[:3]), a[3])  # noqa: E731
    for transform in (lambda fn: fn, jax.grad):
        ours = count_flops(transform(total), q, k, v, slope)
        assert ours == count_flops(transform(plainly), q, k, v, slope)


def test_a_gpu_without_such_attention_is_told_of_once(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    attention.cudnn_attends.cache_clear()
    q, k, v, slope = (x.astype(jnp.bfloat16) for x in arrays(Shape(256, 256, 40)))
    with pytest.warns(UserWarning, match=r"cuDNN does not attend from 256 to 256"):
        told = total(q, k, v, slope)
    again = total(q, k, v, slope)  # a second warning would be an error
    attention.cudnn_attends.cache_clear()
    assert told == again


def test_a_gpu_is_not_asked_about_the_few_tokens_of_a_text(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    attention.cudnn_attends.cache_clear()
    q, k, v, _ = (x.astype(jnp.bfloat16) for x in arrays(Shape(4096, 77, 40)))
    np.testing.assert_array_equal(attend(q, k, v), attend_plainly(q, k, v))
    assert attention.cudnn_attends.cache_info().misses == 0
