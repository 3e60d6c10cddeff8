"""Latent diffusion's text encoder against its formulas in torch."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models.text_encoders import TextTransformer
from tests.support.weights import random_tensors, tree_of_modules

REASON = "compares with torch, which needs the extra `parity`"
with warnings.catch_warnings():
    # Deprecation warnings at the import of torch are not ours.
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch", reason=REASON)

# width, depth, heads, head width, vocab, length, tokens given
CASES = [
    (32, 2, 8, 4, 40, 12, 12),
    (48, 3, 2, 16, 100, 77, 77),
    (24, 1, 3, 10, 30, 9, 5),
    (64, 4, 8, 64, 50, 20, 20),
]

# One layer of ours is two of the original, the attention and the MLP.
ATTENTION = {
    "0": "norm1",
    "1.to_q": "attention/q",
    "1.to_k": "attention/k",
    "1.to_v": "attention/v",
    "1.to_out": "attention/out",
}
MLP = {"0": "norm2", "1.net.0.0": "mlp/in", "1.net.2": "mlp/out"}
OUTSIDE = {
    "token_emb": "token_embedding",
    "pos_emb.emb": "position_embedding",
    "norm": "norm_out",
}


def shapes(case):
    width, depth, heads, head_width, vocab, length, _ = case
    inner = heads * head_width
    shapes = {
        "token_emb.weight": (vocab, width),
        "pos_emb.emb.weight": (length, width),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    for i in range(depth):
        attention, mlp = (f"attn_layers.layers.{2 * i + odd}." for odd in (0, 1))
        for name in ("to_q", "to_k", "to_v"):
            shapes[f"{attention}1.{name}.weight"] = (inner, width)
        for name, matrix in {
            f"{attention}1.to_out": (width, inner),
            f"{mlp}1.net.0.0": (4 * width, width),
            f"{mlp}1.net.2": (width, 4 * width),
        }.items():
            shapes |= {f"{name}.weight": matrix, f"{name}.bias": matrix[:1]}
        for half in (attention, mlp):
            shapes |= {f"{half}0.weight": (width,), f"{half}0.bias": (width,)}
    return shapes


def ldm_tree(state_dict):
    flat = {}
    for key, value in state_dict.items():
        name, _, leaf = key.rpartition(".")
        if match := re.fullmatch(r"attn_layers\.layers\.(\d+)\.(.+)", name):
            layer, odd = divmod(int(match[1]), 2)
            path = f"layer_{layer}/{(MLP if odd else ATTENTION)[match[2]]}"
        else:
            path = OUTSIDE[name]
        flat[path, leaf] = value
    return tree_of_modules(flat)


def reference(state, tokens, case):
    """Compute the encoder in float64, one text and one head at a time."""
    _, depth, heads, head_width, *_ = case

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        deviation = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return centred / deviation * state[f"{name}.weight"] + state[f"{name}.bias"]

    def affine(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    texts = []
    for row in tokens:
        x = state["token_emb.weight"][row] + state["pos_emb.emb.weight"][: len(row)]
        for i in range(depth):
            attention, mlp = (f"attn_layers.layers.{2 * i + odd}" for odd in (0, 1))
            y, read = norm(x, f"{attention}.0"), []
            q, k, v = (y @ state[f"{attention}.1.to_{c}.weight"].T for c in "qkv")
            for head in range(heads):
                part = slice(head * head_width, (head + 1) * head_width)
                scores = (q[:, part] @ k[:, part].T / head_width**0.5).exp()
                read.append(scores / scores.sum(-1, keepdim=True) @ v[:, part])
            x = x + affine(torch.cat(read, -1), f"{attention}.1.to_out")
            h = affine(norm(x, f"{mlp}.0"), f"{mlp}.1.net.0.0")
            h = h * (1 + torch.erf(h / 2**0.5)) / 2
            x = x + affine(h, f"{mlp}.1.net.2")
        texts.append(norm(x, "norm"))
    return torch.stack(texts)


def assert_close(got, wanted, *, relative):
    error = np.linalg.norm(np.asarray(got) - wanted) / np.linalg.norm(wanted)
    assert error < relative


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ldm_text_outputs_and_gradients_equal_the_formulas(case):
    width, depth, heads, head_width, vocab, length, n = case
    state = random_tensors(shapes(case), seed=width)
    tokens = np.random.RandomState(0).randint(0, vocab, (2, n)).astype(np.int32)
    double = {
        key: torch.from_numpy(x).double().requires_grad_() for key, x in state.items()
    }
    wanted = reference(double, torch.from_numpy(tokens).long(), case)
    target = np.random.RandomState(1).normal(size=wanted.shape).astype(np.float32)
    (wanted * torch.from_numpy(target)).sum().backward()

    ours = TextTransformer(
        vocab_size=vocab,
        length=length,
        width=width,
        depth=depth,
        num_heads=heads,
        head_width=head_width,
        positions="normal",
        embedding_std=0.02,
        dtype=jnp.float32,
    )

    @jax.jit
    def run(params):
        output = ours.apply({"params": params}, jnp.asarray(tokens))
        return jnp.vdot(output, target), output

    (_, got), gradients = jax.value_and_grad(run, has_aux=True)(ldm_tree(state))
    assert_close(got, wanted.detach().numpy(), relative=1e-5)
    theirs = ldm_tree({key: x.grad.numpy() for key, x in double.items()})
    assert jax.tree.structure(theirs) == jax.tree.structure(gradients)
    jax.tree.map(lambda a, b: assert_close(a, b, relative=1e-4), gradients, theirs)
