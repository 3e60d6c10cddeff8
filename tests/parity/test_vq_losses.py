"""Losses of the autoencoder stage against their formulas in torch."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models.bottleneck import Codebook
from ldm_jax.training.autoencoder_loss import AutoencoderObjective, reconstruction_terms
from ldm_jax.training.autoencoder_step import last_kernel_gradient
from ldm_jax.training.gan_loss import adaptive_weight, hinge_loss, vanilla_loss
from tests.proofs.test_adversary import build_model, make_config

REASON = "compares with torch, which needs the extra `parity`"
with warnings.catch_warnings():
    # Deprecation warnings at the import of torch are not ours.
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch", reason=REASON)
functional = torch.nn.functional


def normal(seed, shape):
    return jax.random.normal(jax.random.key(seed), shape)


def leaf(array):
    return torch.tensor(np.array(array), requires_grad=True)


@pytest.mark.parametrize("commitment", ["corrected", "legacy"])
def test_quantisation_and_its_loss_equal_torch(commitment):
    latents, codes, pull = normal(0, (2, 3, 4, 3)), normal(1, (7, 3)), normal(2, (3,))

    def loss(latents, codes):
        quantized = Codebook(7, 3).apply({"params": {"embedding": codes}}, latents)
        term = quantized.loss(beta=0.25, commitment=commitment)
        return term + (quantized.straight_through() @ pull).sum(), quantized

    slope = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (total, quantized), slopes = slope(latents, codes)

    z, e = leaf(latents), leaf(codes)
    flat = z.reshape(-1, 3)
    indices = torch.cdist(flat, e).argmin(dim=1)
    chosen = e[indices].reshape(z.shape)
    to_encoder = functional.mse_loss(z, chosen.detach())
    to_codebook = functional.mse_loss(chosen, z.detach())
    if commitment == "legacy":
        term = to_encoder + 0.25 * to_codebook
    else:
        term = 0.25 * to_encoder + to_codebook
    passed = z + (chosen - z).detach()
    wanted = term + (passed @ torch.tensor(np.array(pull))).sum()
    wanted.backward()

    assert np.array_equal(quantized.indices.ravel(), indices.numpy())
    assert total == pytest.approx(wanted.item(), rel=1e-5)
    for ours, theirs in zip(slopes, (z, e), strict=True):
        assert ours == pytest.approx(theirs.grad.numpy(), abs=1e-5)


@pytest.mark.parametrize("which", ["hinge", "vanilla"])
def test_discriminator_losses_equal_torch(which):
    real, fake = normal(0, (3, 5, 5)), normal(1, (3, 5, 5))
    ours = hinge_loss if which == "hinge" else vanilla_loss
    total, slopes = jax.value_and_grad(ours, argnums=(0, 1))(real, fake)
    real_torch, fake_torch = leaf(real), leaf(fake)
    if which == "hinge":
        parts = (1.0 - real_torch).clamp(min=0), (1.0 + fake_torch).clamp(min=0)
    else:
        parts = functional.softplus(-real_torch), functional.softplus(fake_torch)
    wanted = 0.5 * (parts[0].mean() + parts[1].mean())
    wanted.backward()
    assert total == pytest.approx(wanted.item(), rel=1e-6)
    for ours_slope, theirs in zip(slopes, (real_torch, fake_torch), strict=True):
        assert ours_slope == pytest.approx(theirs.grad.numpy(), abs=1e-7)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("error", ["l1", "l2"])
def test_the_reconstruction_term_equals_torch(reduction, error):
    images, made = normal(0, (4, 6, 5, 3)), normal(1, (4, 6, 5, 3))
    objective = AutoencoderObjective(error, reduction, 0.0, 0.0, 0.0, "corrected", 0.25)

    def loss(made):
        return reconstruction_terms(made, images, None, objective=objective)[0]

    total, slope = jax.value_and_grad(loss)(made)
    x, y = leaf(images), leaf(made)
    per_value = (x - y).abs() if error == "l1" else (x - y).square()
    wanted = per_value.sum() / 4 if reduction == "sum" else per_value.mean()
    wanted.backward()
    assert total == pytest.approx(wanted.item(), rel=1e-5)
    assert slope == pytest.approx(y.grad.numpy(), rel=1e-4, abs=1e-8)


def test_the_adaptive_weight_equals_torch():
    config = make_config()
    autoencoder = build_model(config).autoencoder
    features, images = normal(0, (2, 8, 8, 8)), normal(1, (2, 8, 8, 1))
    kernel, bias = 0.3 * normal(2, (3, 3, 8, 1)), normal(3, (1,))
    probe = normal(4, (2, 8, 8, 1))
    params = {"decoder": {"conv_out": {"kernel": kernel, "bias": bias}}}
    to_kernel = last_kernel_gradient(autoencoder, params, features)

    last = leaf(np.array(kernel).transpose(3, 2, 0, 1))
    x = torch.tensor(np.array(features).transpose(0, 3, 1, 2))
    made = functional.conv2d(x, last, torch.tensor(np.array(bias)), padding=1)
    target = torch.tensor(np.array(images).transpose(0, 3, 1, 2))
    terms = (made - target).abs().sum() / 2
    generator = -(made * torch.tensor(np.array(probe).transpose(0, 3, 1, 2))).mean()
    lengths = [
        torch.autograd.grad(loss, last, retain_graph=True)[0].norm()
        for loss in (terms, generator)
    ]
    wanted = (lengths[0] / (lengths[1] + 1e-4)).clamp(0.0, 1e4)

    outputs = jnp.asarray(made.detach().numpy().transpose(0, 2, 3, 1))
    pulls = jnp.sign(outputs - images) / 2, -probe / probe.size
    weight = adaptive_weight(*map(to_kernel, pulls))
    assert weight == pytest.approx(wanted.item(), rel=1e-4)
