"""Noise levels and predictions as scheduler configs of diffusers, and back."""

import dataclasses
import json

import pytest

from ldm_jax.config import DiffusionConfig
from ldm_jax.pretrained.diffusers_configs import read_scheduler
from ldm_jax.pretrained.diffusers_export import scheduler_json, write_folder
from ldm_jax.pretrained.open_weights import open_weights
from ldm_jax.types import InputError
from tests.support.models import config_of, model_of
from tests.support.pretrained import refusal

FLOW = "FlowMatchEulerDiscreteScheduler"


@pytest.mark.parametrize(
    "fields",
    [
        {"schedule": "linear", "prediction": "eps", "beta_end": 0.03},
        {"schedule": "ldm_linear", "prediction": "v", "zero_terminal_snr": True},
        {"schedule": "cosine", "prediction": "x0", "num_timesteps": 500},
        {"schedule": "flow", "prediction": "flow", "num_timesteps": 500},
    ],
    ids=lambda fields: fields["schedule"],
)
def test_noise_levels_survive_a_scheduler_config_of_diffusers(fields):
    ours = config_of("none", **fields)
    name, values = scheduler_json(ours.diffusion)
    found = read_scheduler(name, json.loads(json.dumps(values)))
    theirs = dataclasses.replace(DiffusionConfig(), **found)
    for field in (*fields, "zero_terminal_snr"):
        assert getattr(theirs, field) == getattr(ours.diffusion, field)


@pytest.mark.parametrize(
    "fields",
    [
        {"schedule": "edm", "prediction": "edm"},
        {"schedule": "edm", "prediction": "eps"},
        {"schedule": "flow", "prediction": "v"},
        {"schedule": "cosine", "prediction": "flow"},
        {"schedule": "linear", "prediction": "edm"},
    ],
    ids=lambda fields: "-".join(fields.values()),
)
def test_schedules_without_a_diffusers_scheduler_are_refused_in_one_line(fields):
    with pytest.raises(InputError) as caught:
        scheduler_json(config_of("none", **fields).diffusion)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in (*fields.values(), "--format compvis"))


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        (FLOW, {"shift": 3.0}, ["shift", "3.0", "1.0"]),
        (FLOW, {"use_dynamic_shifting": True}, ["use_dynamic_shifting", "True"]),
        (FLOW, {"invert_sigmas": True}, ["invert_sigmas"]),
        (FLOW, {"shift_terminal": 0.02}, ["shift_terminal", "0.02"]),
        ("DDIMScheduler", {"rescale_betas_zero_snr": 1}, ["rescale_betas_zero_snr"]),
        ("DDIMScheduler", {"beta_schedule": "sigmoid"}, ["sigmoid", "squaredcos"]),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True}, ["use_flow_sigmas"]),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous"}, ["continuous"]),
    ],
)
def test_a_scheduler_of_other_noise_levels_is_refused_in_one_line(name, values, words):
    with pytest.raises(InputError) as caught:
        read_scheduler(name, values)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in (name, *words)), message


LDM = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler", "OtherScheduler"])
def test_a_scheduler_of_any_class_that_states_its_noise_levels_is_read(name):
    found = read_scheduler(name, {**LDM, "prediction_type": "v_prediction"})
    assert found["schedule"] == "ldm_linear" and found["prediction"] == "v"
    assert (found["beta_start"], found["beta_end"]) == (0.00085, 0.012)


@pytest.mark.parametrize("field", LDM)
def test_a_scheduler_of_an_unknown_class_must_state_its_noise_levels(field):
    values = {key: value for key, value in LDM.items() if key != field}
    assert field in refusal(read_scheduler, "OtherScheduler", values)
    read_scheduler("DDIMScheduler", values)


@pytest.mark.parametrize(
    ("name", "values", "word"),
    [
        ("EDMEulerScheduler", {"sigma_data": 0.5}, "beta_schedule"),
        ("IPNDMScheduler", {"num_train_timesteps": 1000}, "beta_schedule"),
        ("CogVideoXDDIMScheduler", {**LDM, "snr_shift_scale": 3.0}, "snr_shift_scale"),
        ("SCMScheduler", {**LDM, "prediction_type": "trigflow"}, "prediction_type"),
    ],
)
def test_a_scheduler_without_our_noise_levels_is_refused(name, values, word):
    message = refusal(read_scheduler, name, values)
    assert name in message and word in message


def test_an_old_scheduler_says_otherwise_that_the_image_is_predicted():
    assert read_scheduler("DDPMScheduler", {})["prediction"] == "eps"
    old = read_scheduler("DDPMScheduler", {"predict_epsilon": False})
    assert old["prediction"] == "x0"
    new = {"predict_epsilon": False, "prediction_type": "v_prediction"}
    assert read_scheduler("DDPMScheduler", new)["prediction"] == "v"


def test_eps_prediction_with_zero_terminal_snr_is_refused():
    found = read_scheduler("DDIMScheduler", {"rescale_betas_zero_snr": True})
    with pytest.raises(InputError, match=r"eps.*zero_terminal_snr.*try v"):
        DiffusionConfig(**found)


def test_a_flow_model_is_exported_without_a_pipeline_and_reads_back(tmp_path):
    weights = model_of(config_of("none", schedule="flow", prediction="flow"))
    write_folder(weights, tmp_path)
    assert not (tmp_path / "model_index.json").exists()
    assert open_weights(tmp_path).config == weights.config


def test_a_pipeline_with_a_flow_scheduler_is_a_flow_model(tmp_path):
    write_folder(model_of(config_of("none")), tmp_path)
    (tmp_path / "ldm_jax.json").unlink()
    index = tmp_path / "model_index.json"
    parts = json.loads(index.read_text()) | {"scheduler": ["diffusers", FLOW]}
    index.write_text(json.dumps(parts))
    scheduler = tmp_path / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({"_class_name": FLOW, "shift": 1.0}))
    found = open_weights(tmp_path).config.diffusion
    assert (found.schedule, found.prediction) == ("flow", "flow")
