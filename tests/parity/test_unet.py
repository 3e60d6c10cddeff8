"""Our UNet equals diffusers': outputs and gradients, through the importer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models.conditioning import Condition
from tests.parity import diffusers_models as models

torch = pytest.importorskip("torch", reason="parity needs the extra `parity`")
pytest.importorskip("diffusers", reason="parity needs the extra `parity`")

SD15 = {
    "sample_size": 16,
    "block_out_channels": [32, 64, 128, 128],
    "attention_head_dim": 8,
    "cross_attention_dim": 24,
    "norm_num_groups": 32,
}
SD21 = {
    **SD15,
    "attention_head_dim": [2, 4, 8, 8],
    "use_linear_projection": True,
    "upcast_attention": True,
}
CASES = [("UNet2DConditionModel", SD15), ("UNet2DConditionModel", SD21)]
CASES += [models.random_unet(seed) for seed in range(18)]


@pytest.mark.parametrize("seed", range(len(CASES)))
def test_unet_outputs_and_gradients_equal_diffusers(seed):
    class_name, settings = CASES[seed]
    model, tensors = models.make_torch(class_name, settings, seed)
    config = models.unet_config(class_name, dict(model.config))
    unet, params = models.our_unet(config, tensors)
    inputs = models.unet_inputs(config, seed)
    weight = np.random.RandomState(99).normal(size=inputs["x"].shape)
    weight = weight.astype(np.float32)

    x = models.to_torch(inputs["x"]).requires_grad_(True)
    kwargs = models.torch_condition(inputs)
    theirs = model(x, torch.from_numpy(inputs["t"]), **kwargs).sample
    (theirs * models.to_torch(weight)).sum().backward()

    arrays = {name: jnp.asarray(value) for name, value in inputs.items()}
    cond = Condition(label=arrays.get("label"), context=arrays.get("context"))

    def output(x):
        return unet.apply({"params": params}, x, arrays["t"], cond)

    ours, backward = jax.vjp(jax.jit(output), arrays["x"])
    assert models.relative(ours, models.from_torch(theirs)) < 1e-4
    (gradient,) = backward(jnp.asarray(weight))
    assert models.relative(gradient, models.from_torch(x.grad)) < 1e-3
