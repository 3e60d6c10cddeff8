"""Our autoencoders equal diffusers': moments, latents, decoding, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models.autoencoder import Autoencoder
from tests.parity import diffusers_models as models

torch = pytest.importorskip("torch", reason="parity needs the extra `parity`")
pytest.importorskip("diffusers", reason="parity needs the extra `parity`")

SIDE = 16
CASES = [models.random_autoencoder(seed) for seed in range(20)]


@pytest.mark.parametrize("seed", range(len(CASES)))
def test_autoencoder_outputs_and_gradients_equal_diffusers(seed):
    class_name, settings = CASES[seed]
    model, tensors = models.make_torch(class_name, settings, seed)
    config = models.autoencoder_config(class_name, dict(model.config))
    autoencoder, params = models.our_autoencoder(config, tensors)
    draw = np.random.RandomState(seed)
    channels = config.data.image_channels
    images = draw.uniform(-1, 1, (2, SIDE, SIDE, channels)).astype(np.float32)
    side = SIDE // config.autoencoder.downsampling
    shape = (2, side, side, config.autoencoder.latent_channels)
    latents = draw.normal(size=shape).astype(np.float32)

    x = models.to_torch(images).requires_grad_(True)
    z = models.to_torch(latents).requires_grad_(True)
    is_kl = class_name == "AutoencoderKL"
    encoded = model.encode(x)
    theirs = encoded.latent_dist.mode() if is_kl else encoded.latents
    decoded = model.decode(z).sample
    theirs.square().sum().backward()
    # With a codebook both have a straight-through gradient.
    decoded.square().sum().backward()

    def encode(x):
        posterior = autoencoder.apply({"params": params}, x, method=Autoencoder.encode)
        return posterior.mode(), posterior

    def decode(z):
        return autoencoder.apply({"params": params}, z, method=Autoencoder.decode)

    ours, posterior = jax.jit(encode)(images)
    assert models.relative(ours, models.from_torch(theirs)) < 1e-4
    if is_kl:
        logvar = models.from_torch(encoded.latent_dist.logvar)
        assert models.relative(posterior.log_variance, logvar) < 1e-4
    assert models.relative(jax.jit(decode)(latents), models.from_torch(decoded)) < 1e-4

    gradient = jax.grad(lambda x: jnp.square(encode(x)[0]).sum())(jnp.asarray(images))
    assert models.relative(gradient, models.from_torch(x.grad)) < 1e-3
    gradient = jax.grad(lambda z: jnp.square(decode(z)).sum())(jnp.asarray(latents))
    assert models.relative(gradient, models.from_torch(z.grad)) < 1e-3
