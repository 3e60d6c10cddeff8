"""The discriminator and LPIPS against plain torch implementations."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.files import write_safetensors
from ldm_jax.models.discriminator_lpips import Lpips, PatchDiscriminator
from ldm_jax.pretrained.metric_networks import load_lpips
from tests.support.lpips_files import CONV_INDICES, heads, torchvision

REASON = "compares with torch, which needs the extra `parity`"
with warnings.catch_warnings():
    # Deprecation warnings at the import of torch are not ours.
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch", reason=REASON)
functional = torch.nn.functional


def to_torch(array):
    """Convert NHWC to an NCHW tensor that requires a gradient."""
    return torch.tensor(np.array(array).transpose(0, 3, 1, 2), requires_grad=True)


def to_numpy(tensor):
    return tensor.detach().numpy().transpose(0, 2, 3, 1)


def assert_close(slope, wanted):
    """Compare gradients up to 3e-3 of the norm, not value by value.

    Where the input of a ReLU is nearly zero, rounding decides its sign, and differs
    between processors: the gradients of its pixels change, by 5e-4 of the norm in all.
    """
    assert np.linalg.norm(slope - wanted) <= 3e-3 * np.linalg.norm(wanted)


def images(seed, side, batch=3):
    return jax.random.uniform(jax.random.key(seed), (batch, side, side, 3), minval=-1.0)


def torch_discriminator(params, x, num_layers):
    def convolve(x, name, stride):
        leaves = params[name]
        kernel = torch.tensor(np.array(leaves["kernel"]).transpose(3, 2, 0, 1))
        bias = torch.tensor(np.array(leaves["bias"])) if "bias" in leaves else None
        return functional.conv2d(x, kernel, bias, stride=stride, padding=1)

    x = functional.leaky_relu(convolve(x, "conv_0", 2), 0.2)
    for i in range(1, num_layers + 1):
        x = convolve(x, f"conv_{i}", 2 if i < num_layers else 1)
        norm = params[f"norm_{i}"]
        scale, bias = (torch.tensor(np.array(norm[k])) for k in ("scale", "bias"))
        x = functional.batch_norm(x, None, None, scale, bias, training=True, eps=1e-5)
        x = functional.leaky_relu(x, 0.2)
    return convolve(x, "conv_out", 1)


@pytest.mark.parametrize(("num_layers", "side"), [(2, 32), (3, 40)])
def test_the_discriminator_equals_torch(num_layers, side):
    critic = PatchDiscriminator(8, num_layers, jnp.float32)
    x = images(0, side)
    init = jax.jit(functools.partial(critic.init, axis_name=None))
    params = init(jax.random.key(1), x)["params"]
    # Perturbed: the initial biases are zero and the initial kernels small.
    noise = jax.tree.map(
        lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(2), leaf.shape),
        params,
    )

    def discriminate(params, x):
        return critic.apply({"params": params}, x, axis_name=None)

    logits, backward = jax.vjp(jax.jit(discriminate), noise, x)
    pull = jax.random.normal(jax.random.key(3), logits.shape)
    _, slope = backward(pull)
    x_torch = to_torch(x)
    wanted = torch_discriminator(noise, x_torch, num_layers)
    assert logits == pytest.approx(to_numpy(wanted)[..., 0], abs=1e-4)
    wanted.backward(torch.tensor(np.array(pull))[:, None])
    assert_close(slope, to_numpy(x_torch.grad))


def torch_lpips(x, y):
    arrays = {k: torch.tensor(v) for k, v in {**torchvision(), **heads()}.items()}
    shift = torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450])[None, :, None, None]
    x, y, total, block = (x - shift) / scale, (y - shift) / scale, 0.0, 0
    for index in CONV_INDICES:
        weight, bias = (arrays[f"features.{index}.{k}"] for k in ("weight", "bias"))
        x, y = (functional.conv2d(z, weight, bias, padding=1).relu() for z in (x, y))
        if index not in (2, 7, 14, 21, 28):
            continue
        unit = [z / (z.square().sum(1, keepdim=True).sqrt() + 1e-10) for z in (x, y)]
        difference = (unit[0] - unit[1]).square()
        weighted = functional.conv2d(difference, arrays[f"lin{block}.model.1.weight"])
        total = total + weighted.mean(dim=(1, 2, 3))
        x, y, block = (
            functional.max_pool2d(x, 2),
            functional.max_pool2d(y, 2),
            block + 1,
        )
    return total


def test_lpips_equals_torch(tmp_path):
    path = tmp_path / "lpips.safetensors"
    write_safetensors(path, {**torchvision(), **heads()})
    params = load_lpips((str(path),))
    path.unlink()
    # An odd side: poolings drop the last row and column, as torch does.
    x, y = images(0, 37, 2), images(1, 37, 2)

    @jax.jit
    def distance_and_slope(y):
        distances, backward = jax.vjp(
            lambda y: Lpips().apply({"params": params}, x, y), y
        )
        return distances, backward(jnp.ones(2))[0]

    distances, slope = distance_and_slope(y)
    x_torch, y_torch = to_torch(x), to_torch(y)
    wanted = torch_lpips(x_torch, y_torch)
    assert distances == pytest.approx(wanted.detach().numpy(), rel=1e-4)
    wanted.sum().backward()
    assert_close(slope, to_numpy(y_torch.grad))
