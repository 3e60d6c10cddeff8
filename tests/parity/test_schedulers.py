"""Exported scheduler configs give our noise levels in diffusers."""

import numpy as np
import pytest

from ldm_jax.build import build_schedule
from ldm_jax.diffusion.schedules import level_at
from ldm_jax.pretrained.diffusers_export import scheduler_json
from tests.parity.needs import THEIR_WARNINGS_IGNORED, diffusers, torch
from tests.support.models import config_of

pytestmark = THEIR_WARNINGS_IGNORED


def theirs(config):
    name, values = scheduler_json(config.diffusion)
    return getattr(diffusers(), name).from_config(values)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("schedule", ["ldm_linear", "linear", "cosine"])
def test_exported_schedules_have_our_signal_powers_in_diffusers(
    schedule, zero_terminal_snr
):
    fields = {"schedule": schedule, "zero_terminal_snr": zero_terminal_snr}
    config = config_of("none", prediction="v", **fields)
    ours = build_schedule(config.diffusion).abar
    found = theirs(config).alphas_cumprod.numpy()
    # Those of diffusers are float32 products of a thousand factors.
    assert np.abs(ours - found).max() < 1e-5
    assert (found[-1] < 1e-9) == (ours[-1] < 1e-9)


def test_exported_flow_levels_equal_diffusers():
    config = config_of("none", schedule="flow", prediction="flow")
    scheduler = theirs(config)
    scheduler.set_timesteps(4)
    index = scheduler.timesteps.numpy().astype(np.float64)
    level = level_at(build_schedule(config.diffusion), index - 1.0)
    assert level.t == pytest.approx(index)
    assert level.sigma == pytest.approx(scheduler.sigmas[:-1].numpy(), rel=1e-6)
    x_0, eps = torch.full((1, 1), 3.0), torch.full((1, 1), -2.0)
    mixed = scheduler.scale_noise(x_0, scheduler.timesteps[1:2], eps).item()
    assert mixed == pytest.approx(3.0 * level.alpha[1] - 2.0 * level.sigma[1])
