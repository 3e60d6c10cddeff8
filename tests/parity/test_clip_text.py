"""Our CLIP text encoder against that of transformers, with random weights.

`python -m tests.parity.test_clip_text` writes the golden file that the tests without
torch read.
"""

import json
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models.text_encoders import ClipTextTransformer
from tests.support.weights import clip_shapes, clip_tree, random_tensors

REASON = "compares with the original, which needs the extra `parity`"
with warnings.catch_warnings():
    # Deprecation warnings at the import of these two are not ours.
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch", reason=REASON)
    transformers = pytest.importorskip("transformers", reason=REASON)

GOLDEN = Path(__file__).parent.parent / "golden" / "clip_text.json"

# width, depth, heads, mlp, vocab, length, activation, eos, output
CASES = [
    (32, 2, 4, 64, 40, 12, "quick_gelu", 2, "last"),
    (48, 3, 6, 192, 100, 77, "gelu", 99, "last"),
    (32, 3, 1, 128, 64, 9, "gelu", 2, "penultimate"),
    (24, 2, 3, 40, 33, 16, "quick_gelu", 32, "penultimate"),
    (40, 2, 5, 80, 50, 20, "gelu", 2, "pooled"),
    (64, 4, 2, 256, 90, 24, "quick_gelu", 17, "pooled"),
    (16, 1, 2, 24, 30, 5, "quick_gelu", 29, "pooled"),
]


def settings(case):
    width, depth, heads, mlp, vocab, length, activation, eos, output = case
    return {
        "vocab_size": vocab,
        "length": length,
        "width": width,
        "depth": depth,
        "num_heads": heads,
        "mlp_width": mlp,
        "activation": activation,
        "epsilon": 1e-5,
        "output": output,
        "projection_width": width // 2,
        "eos_token_id": eos,
    }


def shapes(case):
    names = ("vocab_size", "length", "width", "depth", "mlp_width")
    sizes = {name: settings(case)[name] for name in names}
    if settings(case)["output"] == "pooled":
        sizes["projection_width"] = settings(case)["projection_width"]
    return clip_shapes(**sizes)


def tokens_of(case, seed=0):
    """Draw texts that end early, one at the very end, one with two end tokens."""
    ours = settings(case)
    length, eos = ours["length"], ours["eos_token_id"]
    end = ours["vocab_size"] - 1 if eos == 2 else eos
    rs = np.random.RandomState(seed)
    tokens = rs.randint(3, ours["vocab_size"] - 1, (3, length))
    tokens[tokens == end] = 0
    tokens[0, length // 2 :] = end
    tokens[1, -1] = end
    tokens[2, [1, length - 2]] = end
    return tokens.astype(np.int32)


def original(case, state):
    ours = settings(case)
    config = transformers.CLIPTextConfig(
        vocab_size=ours["vocab_size"],
        max_position_embeddings=ours["length"],
        hidden_size=ours["width"],
        intermediate_size=ours["mlp_width"],
        num_hidden_layers=ours["depth"],
        num_attention_heads=ours["num_heads"],
        hidden_act=ours["activation"],
        layer_norm_eps=ours["epsilon"],
        projection_dim=ours["projection_width"],
        bos_token_id=0,
        eos_token_id=ours["eos_token_id"],
        pad_token_id=1,
    )
    if ours["output"] == "pooled":
        model = transformers.CLIPTextModelWithProjection(config)
    else:
        # The model of one class names its tensors without the prefix of the files.
        model = transformers.CLIPTextModel(config)
        state = {key.removeprefix("text_model."): x for key, x in state.items()}
    model.load_state_dict({key: torch.from_numpy(x) for key, x in state.items()})
    return model.eval()


def run_original(case, model, tokens):
    tokens = torch.from_numpy(tokens).long()
    output = settings(case)["output"]
    if output == "pooled":
        return model(tokens).text_embeds
    if output == "last":
        return model(tokens).last_hidden_state
    hidden = model(tokens, output_hidden_states=True).hidden_states
    return model.final_layer_norm(hidden[-2])


def assert_close(got, wanted, *, relative):
    error = np.linalg.norm(np.asarray(got) - wanted) / np.linalg.norm(wanted)
    assert error < relative


@pytest.mark.parametrize("case", CASES, ids=str)
def test_clip_outputs_and_gradients_equal_transformers(case):
    state = random_tensors(shapes(case), seed=len(str(case)))
    tokens = tokens_of(case)
    model = original(case, state)
    wanted = run_original(case, model, tokens)
    target = np.random.RandomState(1).normal(size=wanted.shape).astype(np.float32)
    (wanted * torch.from_numpy(target)).sum().backward()
    gradients = {
        key: tensor.grad.numpy()
        for key, tensor in model.named_parameters()
        if tensor.grad is not None
    }

    ours = ClipTextTransformer(**settings(case), dtype=jnp.float32)
    params = clip_tree(state)

    @jax.jit
    def run(params):
        output = ours.apply({"params": params}, jnp.asarray(tokens))
        return jnp.vdot(output, target), output

    (_, got), ours_gradients = jax.value_and_grad(run, has_aux=True)(params)
    assert got.shape == wanted.shape
    assert_close(got, wanted.detach().numpy(), relative=1e-5)
    largest = np.abs(got - wanted.detach().numpy()).max()
    assert largest < 1e-4 * np.abs(wanted.detach().numpy()).max()
    # Key biases have no gradient but rounding: softmax ignores a constant in q . k.
    gradients = {k: g for k, g in gradients.items() if "k_proj.bias" not in k}
    for path, gradient in jax.tree_util.tree_leaves_with_path(clip_tree(gradients)):
        leaf = ours_gradients
        for part in path:
            leaf = leaf[part.key]
        assert_close(leaf, gradient, relative=1e-4)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_clip_tensor_names_and_shapes_equal_transformers(case):
    model = original(case, random_tensors(shapes(case), seed=0))
    prefix = "" if settings(case)["output"] == "pooled" else "text_model."
    theirs = {f"{prefix}{k}": tuple(x.shape) for k, x in model.state_dict().items()}
    assert theirs == shapes(case)


def test_the_penultimate_output_gives_the_last_layer_no_gradient():
    case = CASES[2]
    state = random_tensors(shapes(case), seed=0)
    model = original(case, state)
    run_original(case, model, tokens_of(case)).sum().backward()
    assert model.encoder.layers[-1].mlp.fc1.weight.grad is None


GOLDEN_CASES = [
    (8, 2, 2, 16, 20, 6, "quick_gelu", 2, "last"),
    (8, 3, 1, 12, 20, 6, "gelu", 2, "penultimate"),
    (12, 2, 3, 16, 20, 6, "gelu", 19, "pooled"),
    (12, 2, 3, 16, 20, 6, "quick_gelu", 2, "pooled"),
]


def golden(case, seed):
    state = random_tensors(shapes(case), seed)
    tokens = tokens_of(case, seed)
    with torch.no_grad():
        output = run_original(case, original(case, state), tokens).numpy()
    return {
        "seed": seed,
        "settings": settings(case),
        "tokens": tokens.tolist(),
        "output": [float(f"{x:.7g}") for x in output.ravel()],
    }


def test_the_golden_file_equals_transformers():
    stored = json.loads(GOLDEN.read_text())
    assert len(stored) == len(GOLDEN_CASES)
    for i, (case, there) in enumerate(zip(GOLDEN_CASES, stored, strict=True)):
        here = golden(case, i)
        assert there["output"] == pytest.approx(here["output"], abs=1e-5)
        assert there["settings"] == here["settings"]
        assert there["tokens"] == here["tokens"]


if __name__ == "__main__":
    entries = [golden(case, i) for i, case in enumerate(GOLDEN_CASES)]
    GOLDEN.write_text("[\n" + ",\n".join(json.dumps(x) for x in entries) + "\n]\n")
