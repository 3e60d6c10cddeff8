"""Our count of FLOPs equals that of torch's counter on diffusers' model."""

import importlib

import jax
import jax.numpy as jnp
import pytest

from ldm_jax.models.conditioning import Condition
from ldm_jax.tools.plan.flops import count_flops
from tests.parity import diffusers_models as models
from tests.parity.test_unet import CASES

torch = pytest.importorskip("torch", reason="parity needs the extra `parity`")
pytest.importorskip("diffusers", reason="parity needs the extra `parity`")


@pytest.mark.parametrize("seed", [0, 1, 2, 5, 9])
def test_count_flops_equals_torch_for_the_forward_and_the_backward_pass(seed):
    flop_counter = pytest.importorskip("torch.utils.flop_counter")
    class_name, settings = CASES[seed]
    model, tensors = models.make_torch(class_name, settings, seed)
    # Plain products: torch does not count fused attention on a CPU.
    plain = importlib.import_module("diffusers.models.attention_processor")
    for module in model.modules():
        if hasattr(module, "set_processor"):
            module.set_processor(plain.AttnProcessor())
    config = models.unet_config(class_name, dict(model.config))
    unet, params = models.our_unet(config, tensors)
    inputs = models.unet_inputs(config, seed)
    x = models.to_torch(inputs["x"]).requires_grad_(True)
    kwargs = models.torch_condition(inputs)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    with flop_counter.FlopCounterMode(display=False) as forward:
        loss = model(x, torch.from_numpy(inputs["t"]), **kwargs).sample.sum()
    with flop_counter.FlopCounterMode(display=False) as backward:
        loss.backward()

    arrays = {name: jnp.asarray(value) for name, value in inputs.items()}
    cond = Condition(label=arrays.get("label"), context=arrays.get("context"))

    def output(params, x):
        return unet.apply({"params": params}, x, arrays["t"], cond).sum()

    ours = count_flops(output, params, arrays["x"])
    both = count_flops(jax.grad(output, argnums=(0, 1)), params, arrays["x"])
    assert ours == pytest.approx(forward.get_total_flops(), rel=1e-3)
    assert both - ours == pytest.approx(backward.get_total_flops(), rel=1e-3)
