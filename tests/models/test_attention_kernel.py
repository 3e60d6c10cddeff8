"""The attention kernel: it equals plain attention and is used where it fits."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models import attention, transformer
from ldm_jax.models.attention import SelfAttention, attend, attend_plainly
from ldm_jax.models.kernels.attention import fused_attention
from ldm_jax.models.kernels.attention_blocks import (
    LANES,
    Packing,
    Shape,
    blocks_of,
    packing_of,
)
from ldm_jax.models.kernels.packed_heads import attend_in_lanes, pack
from ldm_jax.models.layers import Affine, dense, dense_of_many
from ldm_jax.models.transformer import Attention, TransformerBlock, exact_gelu
from ldm_jax.tools.plan.flops import count_flops

KERNEL = "tpu_custom_call"


def arrays(shape: Shape, *, heads: int = 2, batch: int = 2, dtype=jnp.float32):
    normal = np.random.RandomState(3).normal
    tokens = (shape.queries, shape.keys, shape.keys, shape.queries)
    sizes = [(batch, n, heads, shape.width) for n in tokens]
    return [jnp.asarray(normal(size=size), dtype) for size in sizes]


def random_like(shapes, seed=0):
    """Draw arrays of the given shapes without compiling an initialisation."""
    normal = np.random.RandomState(seed).normal
    return jax.tree.map(
        lambda x: jnp.asarray(0.1 * normal(size=x.shape), x.dtype), shapes
    )


def interpreted(q, k, v):
    """Run the interpreted kernel on packed heads; also return its padding, all zero."""
    b, n, heads, width = q.shape
    packing = packing_of(heads, width)
    packed = (
        pack(x.reshape(*x.shape[:2], heads * width), packing, axis=2) for x in (q, k, v)
    )
    mixed = fused_attention(*packed, packing, True)
    assert mixed.shape == (b, n, packing.groups * packing.lanes)
    used = packing.together * width
    groups = mixed.reshape(b, n, packing.groups, packing.lanes)
    slots = groups[..., :used].reshape(b, n, -1, width)
    return slots[:, :, :heads], (groups[..., used:], slots[:, :, heads:])


def plainly(q, k, v):
    return attend_plainly(q, k, v), ()


@functools.partial(jax.jit, static_argnums=0)
def compiled(fn, q, k, v, slope):
    values, pull, zeros = jax.vjp(fn, q, k, v, has_aux=True)
    return (values, *pull(slope)), zeros


def with_gradients(fn, *inputs):
    """Compute values and gradients of an attention function as one program."""
    found, zeros = compiled(fn, *inputs)
    assert not any(x.any() for x in jax.device_get(zeros))
    return found


def distance(one, other):
    one, other = (np.asarray(x, np.float64) for x in (one, other))
    return np.linalg.norm(one - other) / np.linalg.norm(other)


@pytest.mark.parametrize(
    "shape, heads",
    [
        (Shape(256, 256, 64), 2),
        (Shape(512, 512, 40), 4),  # three share a group; the second group has one
        (Shape(1024, 300, 40), 2),
        (Shape(384, 384, 32), 7),  # four share a group
        (Shape(256, 1000, 160), 2),  # two registers a head
        (Shape(1024, 1024, 7), 2),
        (Shape(128, 640, 512), 1),
    ],
)
def test_fused_attention_has_the_values_and_gradients_of_plain_attention(shape, heads):
    inputs = arrays(shape, heads=heads)
    ours, plain = (with_gradients(fn, *inputs) for fn in (interpreted, plainly))
    for one, other in zip(ours, plain, strict=True):
        assert distance(one, other) < 3e-6


def test_fused_attention_in_bfloat16_is_as_exact_as_plain_attention():
    shape = Shape(512, 512, 40)
    exact = arrays(shape)
    rounded = [x.astype(jnp.bfloat16) for x in exact]
    exact = [x.astype(jnp.float32) for x in rounded]
    truth = with_gradients(plainly, *exact)
    errors = []
    for attention_fn in (interpreted, plainly):
        found = with_gradients(attention_fn, *rounded)
        assert found[0].dtype == jnp.bfloat16
        errors.append([distance(a, b) for a, b in zip(found, truth, strict=True)])
    assert max(errors[0]) < 0.01
    assert all(ours <= 1.1 * plain for ours, plain in zip(*errors, strict=True))


def test_fused_attention_does_not_overflow_at_large_logits():
    q, k, v, slope = arrays(Shape(256, 256, 16))
    values, *slopes = with_gradients(interpreted, 1e3 * q, k, v, slope)
    plain, *_ = with_gradients(plainly, 1e3 * q, k, v, slope)
    assert distance(values, plain) < 1e-4
    assert all(np.isfinite(x).all() for x in jax.device_get(slopes))


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
def test_block_sizes_follow_from_the_attention_shape(shape, blocks):
    assert blocks_of(shape) == blocks


@pytest.mark.parametrize(
    "heads, width, packing",
    [
        (14, 32, (4, 128, 4)),
        (8, 40, (3, 128, 3)),
        (8, 80, (1, 128, 8)),
        (8, 160, (1, 256, 8)),
        (1, 512, (1, 512, 1)),
        (2, 32, (2, 128, 1)),
        (3, 64, (2, 128, 2)),
    ],
)
def test_packing_groups_heads_into_lanes(heads, width, packing):
    assert packing_of(heads, width) == Packing(heads, width, *packing)


def test_pack_places_each_head_in_its_lanes():
    x = jnp.arange(1, 3 * 40 + 41)  # four heads of 40
    packing = packing_of(4, 40)
    packed = np.asarray(pack(x, packing, axis=0))
    assert packed.shape == (2 * LANES,)
    for head in range(4):
        start = head // 3 * LANES + head % 3 * 40
        np.testing.assert_array_equal(
            packed[start : start + 40], x[40 * head : 40 * head + 40]
        )
    assert np.count_nonzero(packed) == len(x)


LAYERS = {
    "pixels": (SelfAttention(4, 4, 1e-5, False, jnp.float32), (2, 16, 16, 160), None),
    "tokens": (Attention(5, jnp.float32), (2, 256, 160), None),
    "context": (Attention(5, jnp.float32), (2, 256, 160), (2, 300, 24)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_attention_layer_with_the_kernel_equals_the_plain_layer(name, monkeypatch):
    layer, shape, context_shape = LAYERS[name]
    normal = np.random.RandomState(5).normal
    args = [jnp.asarray(normal(size=shape), jnp.float32)]
    if layer.__class__ is Attention:
        args.append(
            None if context_shape is None else jnp.float32(normal(size=context_shape))
        )
    params = random_like(jax.eval_shape(layer.init, jax.random.key(0), *args))
    slope = jnp.asarray(normal(size=shape), jnp.float32)

    def total(params, x):
        return jnp.vdot(layer.apply(params, x, *args[1:]), slope)

    def both():  # a new function, so that JAX traces it again
        fn = lambda *inputs: total(*inputs)  # noqa: E731
        return jax.jit(jax.value_and_grad(fn, argnums=(0, 1)))(params, args[0])

    plain = both()
    calls = []

    def in_lanes(*layer_args, **static):
        calls.append(layer_args)
        return attend_in_lanes(*layer_args, **static, interpret=True)

    for module in ("attention", "transformer"):
        monkeypatch.setattr(f"ldm_jax.models.{module}.attend_in_lanes", in_lanes)
        monkeypatch.setattr(
            f"ldm_jax.models.{module}.for_platform",
            lambda shape, dtype, plainly, ours: ours,
        )
    ours = both()
    assert len(calls) == 1
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        assert distance(one, other) < 1e-5


def test_dense_equals_flax_dense():
    x = jax.random.normal(jax.random.key(1), (2, 3, 8))
    for use_bias, dtype in ((True, jnp.float32), (False, jnp.bfloat16)):
        layer = nn.Dense(
            5, use_bias=use_bias, dtype=dtype, bias_init=nn.initializers.normal()
        )
        params: Any = layer.init(jax.random.key(0), x)
        kernel, bias = (params["params"].get(k) for k in ("kernel", "bias"))
        np.testing.assert_array_equal(
            dense(x, Affine(kernel, bias), dtype), layer.apply(params, x)
        )


def lowered(fn, platform, *args):
    return jax.jit(fn).trace(*args).lower(lowering_platforms=(platform,)).as_text()


def outcome(layer, params, *inputs):
    found: Any = layer.apply(params, *inputs)
    return found.astype(jnp.float32)


def test_dense_of_many_equals_dense():
    sizes = ((8, 5), (5,), (2, 300, 8), (2, 300, 5))
    normal = np.random.RandomState(2).normal
    kernel, bias, x, slope = (jnp.float32(normal(size=size)) for size in sizes)
    weights = Affine(kernel, bias)

    def step(layer):
        def total(x, weights):
            return jnp.vdot(layer(x, weights, jnp.float32), slope)

        return jax.value_and_grad(total, argnums=(0, 1))

    many, few = (jax.jit(step(layer))(x, weights) for layer in (dense_of_many, dense))
    jax.tree.map(np.testing.assert_array_equal, many, few)  # on a CPU
    for_tpu = lowered(step(dense_of_many), "tpu", x, weights)
    plain = lowered(step(dense), "tpu", x, weights)
    assert for_tpu.count("dot_general") == plain.count("dot_general") + 1


def test_mlp_of_many_tokens_equals_the_mlp_of_few(monkeypatch):
    block = TransformerBlock(2, jnp.float32)
    size = (2, transformer.MANY_TOKENS, 16)
    x = jnp.asarray(np.random.RandomState(0).normal(size=size), jnp.float32)
    params = random_like(jax.eval_shape(block.init, jax.random.key(1), x, None))

    def both():
        fn = lambda *inputs: jnp.square(outcome(block, *inputs, None)).sum()  # noqa: E731
        return jax.jit(jax.value_and_grad(fn, argnums=(0, 1)))(params, x)

    many = both()
    monkeypatch.setattr(transformer, "MANY_TOKENS", 10**6)
    few = both()
    assert jax.tree.structure(many) == jax.tree.structure(few)
    for one, other in zip(jax.tree.leaves(many), jax.tree.leaves(few), strict=True):
        assert distance(one, other) < 1e-5


def test_exact_gelu_in_bfloat16_is_as_exact_as_jax_gelu():
    x = jnp.linspace(-6.0, 6.0, 4001).astype(jnp.bfloat16).reshape(1, 1, -1)
    both = []
    for gelu in (exact_gelu, functools.partial(jax.nn.gelu, approximate=False)):
        values, pull = jax.vjp(gelu, x)
        assert values.dtype == jnp.bfloat16
        both.append((values, *pull(jnp.ones_like(x))))
    truth, pull = jax.vjp(exact_gelu, x.astype(jnp.float32))
    exact = (truth, *pull(jnp.ones_like(truth)))
    ours, theirs = (
        [
            float(jnp.abs(a.astype(jnp.float32) - b).max())
            for a, b in zip(one, exact, strict=True)
        ]
        for one in both
    )
    assert ours[0] <= theirs[0] and ours[1] <= 1.5 * theirs[1]


def layer_and_params(side: int, width: int, heads: int):
    """Make a layer and the shapes of its parameters and its input."""
    layer = SelfAttention(heads, 4, 1e-5, False, jnp.bfloat16)
    x = jax.ShapeDtypeStruct((1, side, side, heads * width), jnp.bfloat16)
    return layer, jax.eval_shape(layer.init, jax.random.key(0), x), x


def test_kernel_is_compiled_for_tpus_only():
    layer, params, x = layer_and_params(side=16, width=40, heads=2)
    step = jax.value_and_grad(lambda *a: jnp.sum(outcome(layer, *a)))
    for_tpu = lowered(step, "tpu", params, x)
    assert for_tpu.count(KERNEL) == 2  # forward and backward
    assert "exponential" not in for_tpu
    assert KERNEL not in lowered(step, "cpu", params, x)
    assert KERNEL not in lowered(step, "cuda", params, x)  # untested on a GPU


def test_shapes_that_fit_no_kernel_use_plain_attention():
    for side in (8, 33):
        layer, params, x = layer_and_params(side=side, width=8, heads=1)
        assert KERNEL not in lowered(layer.apply, "tpu", params, x)


@pytest.mark.parametrize(
    "shape, dtype, small, large",
    [
        # Whether libtpu 0.0.52 compiles them for a v4 and for a v5p.
        (Shape(4096, 4096, 40), jnp.bfloat16, True, True),
        (Shape(2048, 2048, 256), jnp.bfloat16, False, True),
        (Shape(1024, 1024, 512), jnp.bfloat16, False, True),
        (Shape(4096, 4096, 512), jnp.bfloat16, False, True),
        (Shape(1024, 1024, 64), jnp.float32, True, True),
        (Shape(4096, 4096, 128), jnp.float32, False, True),
        (Shape(4096, 4096, 512), jnp.float32, False, False),
        (Shape(64, 64, 64), jnp.bfloat16, False, False),
    ],
)
def test_kernel_fits_according_to_the_memory_of_the_chip(shape, dtype, small, large):
    for kind, fits in (("TPU v4", small), ("TPU v5", large)):
        with attention.for_chip(kind):
            assert attention.kernel_fits(shape, dtype) == fits


def test_attention_on_a_cpu_is_plain_attention(monkeypatch):
    layer, *shapes = layer_and_params(side=16, width=40, heads=2)
    params, x = random_like(shapes)

    def both():
        fn = lambda *a: jnp.sum(outcome(layer, *a))  # noqa: E731
        return jax.jit(jax.value_and_grad(fn))(params, x)

    chosen = both()
    monkeypatch.setattr(
        attention, "for_platform", lambda shape, dtype, plainly, ours: plainly
    )
    jax.tree.map(np.testing.assert_array_equal, chosen, both())


def test_flops_of_the_kernel_layer_equal_those_of_the_plain_layer(monkeypatch):
    # A head's 80 channels fill 128 lanes; the padding is not counted.
    layer, params, x = layer_and_params(side=16, width=80, heads=2)
    counts = []
    for transform in (lambda fn: fn, jax.grad):
        fn = lambda *a: jnp.sum(outcome(layer, *a))  # noqa: E731
        counts.append(count_flops(transform(fn), params, x))
    monkeypatch.setattr(
        attention, "for_platform", lambda shape, dtype, plainly, ours: plainly
    )
    for transform, counted in zip((lambda fn: fn, jax.grad), counts, strict=True):
        fn = lambda *a: jnp.sum(outcome(layer, *a))  # noqa: E731
        assert count_flops(transform(fn), params, x) == counted


def test_shape_without_cudnn_attention_warns_once(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    attention.cudnn_attends.cache_clear()
    q, k, v, _ = (x.astype(jnp.bfloat16) for x in arrays(Shape(256, 256, 40)))
    with pytest.warns(UserWarning, match=r"cuDNN does not attend from 256 to 256"):
        first = attend(q, k, v)
    again = attend(q, k, v)  # a second warning would be an error
    attention.cudnn_attends.cache_clear()
    np.testing.assert_array_equal(first, again)


def test_attention_to_few_keys_on_a_gpu_does_not_try_cudnn(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    attention.cudnn_attends.cache_clear()
    q, k, v, _ = (x.astype(jnp.bfloat16) for x in arrays(Shape(4096, 77, 40)))
    np.testing.assert_array_equal(attend(q, k, v), attend_plainly(q, k, v))
    assert attention.cudnn_attends.cache_info().misses == 0
