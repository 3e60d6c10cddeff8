"""Sample programs: exported here, run without the code of the networks."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.build import build_model
from ldm_jax.models.conditioning import ConditionInputs
from ldm_jax.pretrained.model_weights import write_native
from ldm_jax.pretrained.open_weights import to_sample_params
from ldm_jax.rng import image_keys
from ldm_jax.sampling.export import (
    MAGIC,
    check_arrays,
    export_sample_program,
    load_sample_program,
)
from ldm_jax.sampling.sample_fn import make_sample_fn
from ldm_jax.sampling.sampling_config import SamplingConfig
from ldm_jax.types import InputError
from tests.support.commands import ROOT, TIMEOUT
from tests.support.models import config_of, model_of

LABELS, SEEDS, SCALE = [1, 2, 0], [7, 8, 9], 2.5
FRESH = f"""
import sys
from pathlib import Path
import numpy as np
import jax.numpy as jnp
from ldm_jax.models.conditioning import ConditionInputs
from ldm_jax.pretrained.open_weights import open_weights, to_sample_params
from ldm_jax.sampling.export import load_sample_program
from ldm_jax.sampling.sampling_config import SamplingConfig
from ldm_jax.rng import image_keys

folder = Path(sys.argv[1])
params = to_sample_params(open_weights(folder).read())
cond = ConditionInputs(label=jnp.asarray({LABELS}, jnp.int32))
for path in sorted(folder.glob("*.program")):
    draw = load_sample_program(path.read_bytes())
    settings = SamplingConfig(sampler=path.stem, steps=2, guidance_scale=({SCALE},))
    images = draw(params, image_keys({SEEDS}), cond, settings).images
    np.save(path.with_suffix(".npy"), np.asarray(images))
"""


@pytest.fixture(scope="module")
def tiny_model():
    config = config_of("label")
    return config, build_model(config), model_of(config)


@pytest.fixture(scope="module")
def program(tiny_model):
    _, model, weights = tiny_model
    params = to_sample_params(weights)
    return export_sample_program(model, params, max_steps=2, guided=True)


def test_a_fresh_process_draws_the_same_bits_from_the_program(
    tiny_model, program, tmp_path
):
    """Three images in calls of two: the last call is padded."""
    from ldm_jax.config import to_json

    config, model, weights = tiny_model
    write_native(weights, tmp_path)
    (tmp_path / "config.json").write_text(to_json(config))
    params = to_sample_params(weights)
    noisy = export_sample_program(model, params, max_steps=3, guided=False)
    (tmp_path / "ddim.program").write_bytes(program)
    (tmp_path / "euler_ancestral.program").write_bytes(noisy)
    command = [sys.executable, "-c", FRESH, str(tmp_path)]
    result = subprocess.run(
        command, cwd=ROOT, env=os.environ, text=True, capture_output=True,
        timeout=TIMEOUT,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    cond = ConditionInputs(label=jnp.asarray(LABELS, jnp.int32))
    drawn = []
    for name, guided in (("ddim", True), ("euler_ancestral", False)):
        ours = make_sample_fn(model, guided=guided)
        settings_of_ours = SamplingConfig(
            sampler=name, steps=2, guidance_scale=(SCALE,)
        )
        images = np.asarray(
            ours(params, image_keys(SEEDS), cond, settings_of_ours).images
        )
        assert np.load(tmp_path / f"{name}.npy").tobytes() == images.tobytes()
        drawn.append(images)
    assert not np.array_equal(*drawn)


def test_parameters_are_inputs_and_not_part_of_the_program(tiny_model, program):
    """A program has neither parameters nor paths of our files in its bytes."""
    _, model, weights = tiny_model
    params = to_sample_params(weights)
    doubled = jax.tree.map(lambda x: 2 * x, params)
    again = export_sample_program(model, doubled, max_steps=2, guided=True)
    assert again == program
    assert len(again) < sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert str(ROOT).encode() not in again


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: b"", "0 bytes"),
        (lambda data: b"PNG" * 100, "do not begin as a sample program"),
        (lambda data: MAGIC + b"{}\n", "damaged"),
        (lambda data: MAGIC + b"\xff\n", "damaged"),
        (lambda data: data[:-1], "cut short"),
        (lambda data: data[:-9] + bytes(9), "damaged"),
    ],
)
def test_damaged_programs_are_refused_in_one_line(program, change, words):
    with pytest.raises(InputError, match=words) as caught:
        load_sample_program(change(program))
    assert "\n" not in str(caught.value)


def test_a_program_for_another_platform_names_both(tiny_model):
    _, model, weights = tiny_model
    data = export_sample_program(
        model, to_sample_params(weights), max_steps=1, guided=False, platforms=["tpu"]
    )
    with pytest.raises(InputError, match=r"made for tpu, but this is cpu; .*'cpu'"):
        load_sample_program(data)


def test_wrong_input_shapes_are_refused_by_name(tiny_model, program):
    _, _, weights = tiny_model
    params = to_sample_params(weights)
    draw, keys = load_sample_program(program), image_keys([0, 1])
    cond = ConditionInputs(label=jnp.zeros((2,), jnp.int32))
    wider = params._replace(latent_scale=jnp.zeros((2,)))
    calls = [
        (r"params/latent_scale is float32\[2\], wanted float32\[\]", wider, keys, cond),
        ("reads cond/label, which is not given", params, keys, ConditionInputs()),
        ("got 2 for 3 keys", params, image_keys([0, 1, 2]), cond),
        (
            "keys: got rbg",
            params,
            jax.random.split(jax.random.key(0, impl="rbg")),
            cond,
        ),
    ]
    for words, *arguments in calls:
        with pytest.raises(InputError, match=words) as caught:
            draw(*arguments, SamplingConfig(steps=2))
        assert "\n" not in str(caught.value)
    # A list of scales is not a wrong shape: it is spread over the steps.
    one, three = (
        draw(params, keys, cond, SamplingConfig(steps=2, guidance_scale=scales)).images
        for scales in ((2.0,), (2.0, 2.0, 2.0))
    )
    assert np.array_equal(one, three)
    with pytest.raises(InputError, match="got a, which it does not read"):
        check_arrays({"a": jnp.zeros(1)}, {})


def test_unsupported_exports_are_refused(tiny_model):
    _, model, weights = tiny_model
    params = to_sample_params(weights)
    bad = [
        ({"max_steps": 0}, "max_steps: got 0"),
        ({"batch": 0}, "batch: got 0"),
        ({"platforms": ["gpu"]}, "platforms: got 'gpu', wanted some of cpu"),
    ]
    for changed, words in bad:
        with pytest.raises(ValueError, match=words):
            export_sample_program(model, params, **{"max_steps": 1, **changed})
    for kind in ("embedding", "masked_image"):
        other = config_of(kind)
        model, params = build_model(other), to_sample_params(model_of(other))
        with pytest.raises(ValueError, match="cond: not given"):
            export_sample_program(model, params, max_steps=1)
