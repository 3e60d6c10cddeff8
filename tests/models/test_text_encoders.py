import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models.attention import attend
from ldm_jax.models.text_encoders import (
    ClipTextTransformer,
    TextMlp,
    TextTransformer,
    end_of_text,
)
from tests.support.weights import clip_shapes, clip_tree, random_tensors

GOLDEN = json.loads(
    (Path(__file__).parents[1] / "golden" / "clip_text.json").read_text()
)
LENGTH = 7
TOKENS = jnp.asarray([[1, 5, 9, 3, 18, 19, 19], [1, 19, 0, 0, 0, 0, 0]])


def text_transformer(**fields):
    small = {"vocab_size": 20, "length": LENGTH, "width": 12, "depth": 2}
    heads = {"num_heads": 3, "head_width": 8, "dtype": jnp.float32}
    start = {"positions": "normal", "embedding_std": 0.02}
    return TextTransformer(**{**small, **heads, **start, **fields})


def clip(**fields):
    small = {"vocab_size": 20, "length": LENGTH, "width": 12, "depth": 3}
    parts = {"num_heads": 3, "mlp_width": 16, "activation": "gelu", "epsilon": 1e-5}
    out = {"output": "last", "projection_width": 4, "eos_token_id": 19}
    fields = {**small, **parts, **out, "dtype": jnp.float32, **fields}
    return ClipTextTransformer(**fields)


def init(module):
    shapes = jax.eval_shape(module.init, jax.random.key(0), TOKENS)["params"]
    rs = np.random.RandomState(0)

    def draw(path, leaf):
        # No leaf is 0 or 1, which would hide an error in its use.
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(centre + 0.3 * rs.normal(size=leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.partial(jax.jit, static_argnums=0)
def apply(module, params, tokens=TOKENS):
    return module.apply({"params": params}, tokens)


def count(module):
    tokens = jnp.zeros((1, 1), jnp.int32)
    tree = jax.eval_shape(lambda: module.init(jax.random.key(0), tokens))
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


# Counts of the original classes, less their unused map back to tokens (width times
# vocabulary, and a bias): text-to-image small and large, layout to image.
@pytest.mark.parametrize(
    ("width", "depth", "vocab_size", "length", "parameters", "unused"),
    [
        (640, 32, 30_522, 77, 186_154_682, 19_564_602),
        (1280, 32, 30_522, 77, 581_994_042, 39_098_682),
        (512, 16, 8_192, 92, 58_858_496, 4_202_496),
    ],
)
def test_text_encoders_of_the_paper_have_their_parameter_counts(
    width, depth, vocab_size, length, parameters, unused
):
    assert unused == width * vocab_size + vocab_size
    module = text_transformer(
        vocab_size=vocab_size,
        length=length,
        width=width,
        depth=depth,
        num_heads=8,
        head_width=64,
    )
    assert count(module) == parameters - unused


# Stable Diffusion 1 has OpenAI's ViT-L/14, 2 has OpenCLIP's ViT-H/14: with 24 layers in
# the original files, with the 23 that are used in those of diffusers.
@pytest.mark.parametrize(
    ("width", "depth", "output", "parameters"),
    [
        (768, 12, "last", 123_060_480),
        (1024, 23, "last", 340_387_840),
        (1024, 24, "penultimate", 340_387_840 + 12_596_224),
    ],
)
def test_clip_encoders_have_their_parameter_counts(width, depth, output, parameters):
    module = clip(
        vocab_size=49_408,
        length=77,
        width=width,
        depth=depth,
        num_heads=width // 64,
        mlp_width=4 * width,
        output=output,
    )
    assert count(module) == parameters


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda g: g["settings"]["output"])
def test_clip_output_equals_recorded_output_of_transformers(golden):
    module = ClipTextTransformer(**golden["settings"], dtype=jnp.float32)
    names = ("vocab_size", "length", "width", "depth", "mlp_width")
    sizes = {name: golden["settings"][name] for name in names}
    if module.output == "pooled":
        sizes["projection_width"] = module.projection_width
    params = clip_tree(random_tensors(clip_shapes(**sizes), golden["seed"]))
    output = apply(module, params, jnp.asarray(golden["tokens"]))
    assert np.ravel(output) == pytest.approx(golden["output"], abs=2e-5)


def paths(module):
    shapes = jax.eval_shape(module.init, jax.random.key(0), TOKENS)["params"]
    flat = jax.tree_util.tree_leaves_with_path(shapes)
    return {"/".join(part.key for part in path) for path, _ in flat}


def layer_paths(*, qkv_bias):
    names = {f"attention/{x}/kernel" for x in "qkv"} | {"attention/out/kernel"}
    names |= {"attention/out/bias", "mlp/in/kernel", "mlp/in/bias", "mlp/out/kernel"}
    names |= {"mlp/out/bias"} | {
        f"norm{i}/{x}" for i in "12" for x in ("scale", "bias")
    }
    return names | ({f"attention/{x}/bias" for x in "qkv"} if qkv_bias else set())


OUTER_PATHS = {
    "token_embedding/embedding",
    "position_embedding/embedding",
    "norm_out/scale",
    "norm_out/bias",
}


def test_parameter_names_are_those_of_the_file_format():
    layers = {f"layer_{i}/{x}" for i in range(2) for x in layer_paths(qkv_bias=False)}
    assert paths(text_transformer()) == OUTER_PATHS | layers
    layers = {f"layer_{i}/{x}" for i in range(3) for x in layer_paths(qkv_bias=True)}
    for output in ("last", "penultimate"):
        assert paths(clip(output=output)) == OUTER_PATHS | layers
    pooled = OUTER_PATHS | layers | {"projection/kernel"}
    assert paths(clip(output="pooled")) == pooled


def test_clip_attention_is_causal():
    params = init(clip())
    output = apply(clip(), params)
    for i in range(1, LENGTH):
        changed = apply(clip(), params, TOKENS.at[:, i].add(1) % 20)
        assert (changed[:, :i] == output[:, :i]).all()
        assert (changed[:, i:] != output[:, i:]).any(axis=-1).all()


def test_latent_diffusion_text_encoder_reads_all_tokens_and_padding():
    module = text_transformer()
    params = init(module)
    output = apply(module, params)
    changed = apply(module, params, TOKENS.at[:, -1].add(1) % 20)
    assert (changed != output).any(axis=-1).all()
    shorter = apply(module, params, TOKENS[:, :4])
    assert np.abs(shorter - output[:, :4]).max() > 1e-3


def test_clip_output_of_a_shorter_text_is_the_start_of_the_longer_output():
    params = init(clip())
    shorter = apply(clip(), params, TOKENS[:, :4])
    wanted = apply(clip(), params)[:, :4]
    assert shorter == pytest.approx(np.asarray(wanted), abs=1e-5)


def test_penultimate_output_is_that_of_an_encoder_without_its_last_layer():
    module, params = clip(output="penultimate"), init(clip())
    output = apply(module, params)
    shallow = {name: leaf for name, leaf in params.items() if name != "layer_2"}
    assert (output == apply(clip(depth=2), shallow)).all()
    assert (output != apply(clip(), params)).any(axis=-1).all()
    gradient = jax.grad(lambda p: jnp.square(apply(module, p) - 1.0).sum())(params)
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradient["layer_2"]))
    assert all(leaf.any() for leaf in jax.tree.leaves(gradient["layer_0"]["mlp"]))


def test_penultimate_output_spends_no_flops_on_the_last_layer():
    def flops(module):
        params = jax.eval_shape(module.init, jax.random.key(0), TOKENS)
        compiled = jax.jit(module.apply).lower(params, TOKENS).compile()
        return compiled.cost_analysis()["flops"]

    assert flops(clip(output="penultimate")) == flops(clip(depth=2))


def test_pooled_output_is_the_projection_of_the_end_token():
    module = clip(output="pooled")
    params = init(module)
    rest = {name: leaf for name, leaf in params.items() if name != "projection"}
    last = apply(clip(), rest)
    ends = last[jnp.arange(2), jnp.asarray([5, 1])]
    wanted = ends @ params["projection"]["kernel"]
    assert apply(module, params) == pytest.approx(np.asarray(wanted), abs=1e-5)


def test_end_of_text_is_the_first_end_token_or_the_largest_token():
    tokens = jnp.asarray([[1, 7, 2, 9, 7, 9], [1, 2, 3, 4, 5, 6]])
    assert end_of_text(tokens, eos_token_id=7).tolist() == [1, 0]
    assert end_of_text(tokens, eos_token_id=2).tolist() == [3, 5]


@pytest.mark.parametrize("make", [text_transformer, clip])
def test_bfloat16_computes_near_float32_and_keeps_float32_parameters(make):
    half = make(dtype=jnp.bfloat16)
    params = init(half)
    shapes = jax.eval_shape(half.init, jax.random.key(0), TOKENS)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    full, less = apply(make(), params), apply(half, params)
    assert less.dtype == jnp.float32
    error = np.linalg.norm(less - full) / np.linalg.norm(full)
    assert 0 < error < 0.02  # bfloat16 has 8 bits: 0.4 % a rounding


def test_pooling_in_bfloat16_gives_float32():
    half = clip(output="pooled", dtype=jnp.bfloat16)
    assert apply(half, init(half)).dtype == jnp.float32


@pytest.mark.parametrize("make", [text_transformer, clip])
def test_token_outside_the_vocabulary_gives_nan(make):
    output = apply(make(), init(make()), TOKENS.at[0, 3].set(20))
    assert np.isnan(output[0]).any()
    assert np.isfinite(output[1]).all()


@pytest.mark.parametrize("make", [text_transformer, clip])
def test_more_tokens_than_positions_are_refused(make):
    tokens = jnp.zeros((1, LENGTH + 1), jnp.int32)
    with pytest.raises(ValueError, match="got 8 tokens, wanted at most 7"):
        apply(make(), init(make()), tokens)


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="width 12 does not divide into 5 heads"):
        init(clip(num_heads=5))


@pytest.mark.parametrize(
    ("activation", "formula"),
    [
        ("gelu", lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2),
        ("quick_gelu", lambda x: x / (1 + math.exp(-1.702 * x))),
    ],
)
def test_text_mlp_activations_equal_their_formulas(activation, formula):
    x = jnp.linspace(-4.0, 4.0, 33)[None, :, None]
    one = {"kernel": jnp.ones((1, 1)), "bias": jnp.zeros((1,))}
    params = {"in": one, "out": one}
    y = TextMlp(1, activation, jnp.float32).apply({"params": params}, x)
    wanted = [formula(float(value)) for value in x.ravel()]
    assert np.ravel(y) == pytest.approx(wanted, abs=1e-6)


def test_masked_attention_equals_jax_attention_and_a_full_mask_changes_no_bit():
    q, k, v = (
        jax.random.normal(jax.random.key(i), (2, n, 3, 8))
        for i, n in enumerate((5, 7, 7))
    )
    mask = jnp.tri(5, 7, k=2, dtype=bool)
    wanted = jax.nn.dot_product_attention(q, k, v, mask=mask[None, None])
    assert attend(q, k, v, mask=mask) == pytest.approx(np.asarray(wanted), abs=1e-5)
    assert (attend(q, k, v, mask=jnp.ones((5, 7), bool)) == attend(q, k, v)).all()


def test_sinusoid_products_depend_on_the_distance_of_positions_only():
    module = text_transformer(positions="sinusoids", embedding_std=0.5)
    params = module.init(jax.random.key(0), TOKENS)["params"]
    table = np.asarray(params["position_embedding"]["embedding"], np.float64)
    products = table @ table.T
    for distance in range(LENGTH):  # equal for all pairs at this separation
        row = np.diagonal(products, distance)
        np.testing.assert_allclose(row, row[0], rtol=1e-5)
    assert np.all(np.diagonal(products, 1) < products[0, 0])
    np.testing.assert_allclose(np.sqrt(np.square(table).mean()), 0.5, rtol=1e-6)


def test_token_embeddings_start_with_embedding_std():
    module = text_transformer(vocab_size=400, width=64, embedding_std=0.5)
    params = module.init(jax.random.key(0), TOKENS)["params"]
    tokens = np.asarray(params["token_embedding"]["embedding"])
    assert abs(tokens.std() - 0.5) < 0.01
    assert np.asarray(params["position_embedding"]["embedding"]).std() < 0.6
