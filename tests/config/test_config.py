import dataclasses
import functools
import hashlib
import itertools
import json
from typing import get_args

import pytest

from configs.digits import get_config
from ldm_jax import config as config_lib
from ldm_jax.config import (
    AutoencoderConfig,
    Config,
    DataConfig,
    DiffusionConfig,
    OptimConfig,
    ParallelConfig,
)
from ldm_jax.config.condition import ClipConfig
from ldm_jax.config.diffusion import PredictionName, ScheduleName
from ldm_jax.config.serialization import LATER_FIELDS
from ldm_jax.types import InputError


def test_config_json_reads_back_equal_and_with_the_same_digest():
    config = get_config()
    again = config_lib.from_json(config_lib.to_json(config))
    assert again == config
    assert config_lib.digest(again) == config_lib.digest(config)


def test_the_digest_does_not_depend_on_how_a_number_is_written():
    whole, real = (
        Config(diffusion=DiffusionConfig(condition_dropout=x)) for x in (1, 1.0)
    )
    assert config_lib.digest(whole) == config_lib.digest(real)


def test_the_digest_changes_with_any_field():
    config = get_config()
    seen = {config_lib.digest(config)}
    seen.add(config_lib.digest(dataclasses.replace(config, seed=1)))
    optim = dataclasses.replace(config.diffusion.optim, lr=3e-4)
    diffusion = dataclasses.replace(config.diffusion, optim=optim)
    seen.add(config_lib.digest(dataclasses.replace(config, diffusion=diffusion)))
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: OptimConfig(lr=-1.0), ["lr", "-1.0", "above 0"]),
        (lambda: OptimConfig(lr=float("nan")), ["lr", "nan", "finite"]),
        (lambda: OptimConfig(lr="fast"), ["lr", "'fast'", "number"]),
        (lambda: OptimConfig(ema_decay=1.0), ["ema_decay", "1.0", "below 1"]),
        (lambda: DataConfig(source="mnist"), ["source", "'mnist'", "tfds:digits"]),
        (lambda: AutoencoderConfig(steps=0), ["steps", "0", "at least 1"]),
        (lambda: AutoencoderConfig(steps=1.5), ["steps", "1.5", "whole"]),
        (lambda: AutoencoderConfig(num_groups=7), ["num_groups", "7", "divisor"]),
        (lambda: DiffusionConfig(num_heads=3), ["num_heads", "3", "divisor"]),
        (lambda: DiffusionConfig(channel_multipliers=()), ["channel_multipliers"]),
        (lambda: DiffusionConfig(beta_end=0.001), ["beta_end", "0.001"]),
        (lambda: DiffusionConfig(condition_dropout=1.2), ["condition_dropout", "1.2"]),
        (lambda: DiffusionConfig(schedule="sigmoid"), ["schedule", "cosine", "edm"]),
        (lambda: DiffusionConfig(prediction="score"), ["prediction", "'score'", "v"]),
        (lambda: DiffusionConfig(schedule="flow"), ["prediction", "eps", "try flow"]),
        (lambda: DiffusionConfig(zero_terminal_snr=True), ["prediction", "try v"]),
        (
            lambda: DiffusionConfig(
                schedule="edm", prediction="edm", zero_terminal_snr=True
            ),
            ["zero_terminal_snr", "schedule edm", "no betas"],
        ),
        (
            lambda: DiffusionConfig(
                num_timesteps=1, zero_terminal_snr=True, prediction="v"
            ),
            ["num_timesteps", "1", "at least 2"],
        ),
        (
            lambda: DiffusionConfig(loss="l1", loss_weight="min_snr"),
            ["loss", "l2", "min_snr", "squared"],
        ),
        (lambda: DiffusionConfig(loss_weight_gamma=0.0), ["loss_weight_gamma", "0.0"]),
        (
            lambda: DiffusionConfig(loss_weight="debiased", loss_weight_gamma=1.5),
            ["loss_weight_gamma", "1.5", "at most 1"],
        ),
        (lambda: DiffusionConfig(offset_noise=-0.1), ["offset_noise", "-0.1"]),
        (lambda: DiffusionConfig(sigma_min=0.0), ["sigma_min", "above 0"]),
        (lambda: DiffusionConfig(sigma_max=0.002), ["sigma_max", "above sigma_min"]),
        (lambda: DiffusionConfig(sigma_data=0.0), ["sigma_data", "above 0"]),
        (lambda: DiffusionConfig(log_sigma_std=0.0), ["log_sigma_std", "above 0"]),
        (lambda: ClipConfig(epsilon=0.0), ["epsilon", "0.0", "above 0"]),
        (
            lambda: ClipConfig(output="pooled", vocab_size=1000),
            ["eos_token_id", "49407", "0 to 999"],
        ),
        (lambda: Config(seed=-1), ["seed", "-1", "0 to 4294967295"]),
        (lambda: Config(data=DataConfig(image_size=30)), ["image_size", "30", "4"]),
    ],
)
def test_a_bad_config_value_is_refused_by_name_in_one_line(make, words):
    with pytest.raises(InputError) as caught:
        make()
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_a_config_of_another_version_is_refused():
    tree = json.loads(config_lib.to_json(get_config()))
    tree["diffusion"]["dropout"] = 0.1
    with pytest.raises(InputError, match="dropout"):
        config_lib.from_json(json.dumps(tree))
    del tree["diffusion"]["dropout"], tree["seed"]
    with pytest.raises(InputError, match="seed"):
        config_lib.from_json(json.dumps(tree))


def test_every_prediction_but_eps_on_a_flow_is_accepted():
    pairs = itertools.product(get_args(ScheduleName), get_args(PredictionName))
    refused = []
    for schedule, prediction in pairs:
        try:
            DiffusionConfig(schedule=schedule, prediction=prediction)
        except InputError:
            refused.append((schedule, prediction))
    assert refused == [("flow", "eps")]


def without_later_fields(config):
    tree = json.loads(json.dumps(dataclasses.asdict(config)))
    for path in sorted(LATER_FIELDS, key=lambda path: -path.count(".")):
        *parents, name = path.split(".")
        del functools.reduce(dict.__getitem__, parents, tree)[name]
    return tree


def test_a_config_without_later_fields_is_read_with_its_old_digest():
    config = dataclasses.replace(get_config(), parallel=ParallelConfig())
    tree = without_later_fields(config)
    assert "zero_terminal_snr" not in tree["diffusion"]
    assert config_lib.from_json(json.dumps(tree)) == config
    # The digest of versions without later fields.
    text = json.dumps(tree, sort_keys=True)
    assert config_lib.digest(config) == hashlib.sha256(text.encode()).hexdigest()


def test_a_config_without_cpu_devices_is_read():
    one = ParallelConfig(steps_per_dispatch=3)
    config = dataclasses.replace(get_config(), parallel=one)
    tree = json.loads(config_lib.to_json(config))
    del tree["parallel"]["cpu_devices"]
    assert config_lib.from_json(json.dumps(tree)) == config


def test_a_later_field_changes_the_digest_when_it_is_set():
    config = get_config()
    diffusion = dataclasses.replace(config.diffusion, offset_noise=0.1)
    used = dataclasses.replace(config, diffusion=diffusion)
    assert config_lib.digest(used) != config_lib.digest(config)
    assert config_lib.from_json(config_lib.to_json(used)) == used


def test_differences_names_the_fields_and_both_values():
    ours = get_config()
    theirs = dataclasses.replace(ours, seed=4)
    assert config_lib.differences(ours, theirs) == {"seed": [0, 4]}
    assert config_lib.differences(ours, ours) == {}
