"""Opening and inspecting weights."""

import pytest

from ldm_jax.config import to_json
from ldm_jax.files import write_safetensors
from ldm_jax.pretrained.compvis_names import (
    autoencoder_format,
)
from ldm_jax.pretrained.diffusers_export import write_folder
from ldm_jax.pretrained.first_stage import import_first_stage
from ldm_jax.pretrained.inspect_weights import inspect
from ldm_jax.pretrained.layouts import write_tree
from ldm_jax.pretrained.model_weights import (
    WEIGHTS_FILE,
    write_native,
)
from ldm_jax.pretrained.open_weights import is_run, open_weights
from ldm_jax.types import InputError
from tests.data.test_tokenizer import write_clip
from tests.support.models import config_of, model_of, same
from tests.support.pretrained import (
    compvis_arrays,
    native,
    refusal,
    with_condition,
    written,
)


def test_open_weights_asks_for_the_config_of_a_file_without_one(tmp_path):
    _, tensors = compvis_arrays()
    path = tmp_path / "a.safetensors"
    write_safetensors(path, tensors)
    with pytest.raises(InputError, match="--config"):
        open_weights(path)
    with pytest.raises(InputError, match="not there"):
        open_weights(tmp_path / "b")


def test_open_weights_of_a_first_stage_asks_for_its_config(tmp_path):
    config = config_of("label")
    weights = model_of(config)
    path = tmp_path / "a.safetensors"
    tensors = write_tree(weights.autoencoder, autoencoder_format)
    write_safetensors(path, tensors)
    config_files = [tmp_path / f"{name}.py" for name in ("both", "first")]
    lines = "from tests.support.models import config_of\nimport dataclasses\n"
    for file, stages in zip(
        config_files, (("autoencoder", "diffusion"), ("autoencoder",)), strict=True
    ):
        file.write_text(
            f"{lines}def get_config():\n"
            f"    return dataclasses.replace(config_of('label'), stages={stages})\n"
        )
    message = refusal(open_weights, path, config_file=config_files[0])
    assert "autoencoder/kl_f8" in message
    found = open_weights(path, config_file=config_files[1]).read()
    assert same(found.autoencoder, weights.autoencoder)
    assert found.unet is None
    assert found.latent_scale == config.autoencoder.latent_scale
    params, scale = import_first_stage(path, config)
    assert same(params, weights.autoencoder)
    assert scale is None


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("clip", name) for name in ("ldm_jax.json", "unet", "tokenizer/vocab.json")),
        ("clip", "tokenizer"),
        *(("class", f"conditioner{name}") for name in ("", "/model.safetensors")),
    ],
)
def test_nothing_behind_a_link_that_leaves_an_export_is_read(kind, name, tmp_path):
    config = config_of(kind)
    if kind == "clip":
        config = with_condition(config, tokenizer=str(write_clip(tmp_path)))
    (root := tmp_path / "export").mkdir()
    write_folder(model_of(config), root)
    assert same(open_weights(root).read().conditioner, model_of(config).conditioner)
    (root / name).rename(tmp_path / "outside")
    (root / name).symlink_to(tmp_path / "outside")
    with pytest.raises(InputError, match="leaves the folder"):
        open_weights(root).read()


def test_is_run_distinguishes_runs_from_weights(tmp_path):
    config = config_of("label")
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(to_json(config))
    assert is_run(run)
    assert "--workdir" in refusal(open_weights, run)
    assert inspect(run)["format"] == "ldm_jax run"
    ours = native(config, tmp_path / "native")
    assert not is_run(ours)
    assert inspect(ours)["format"] == "ldm_jax"
    for text in ("{", "[]", '"stages"', '{"_class_name": "UNet2DModel"}', "\udcff"):
        (run / "config.json").write_bytes(text.encode(errors="surrogateescape"))
        assert not is_run(run)
    assert not is_run(tmp_path / "nowhere")


def test_inspect_counts_parameters(tmp_path):
    path = written("label", tmp_path)
    report = inspect(path)
    weights = model_of(config_of("label"))
    count = sum(leaf.size for leaf in _leaves(weights.unet))
    assert report["parts"]["unet"]["parameters"] == count
    assert report["parts"]["unet"]["class"] == "UNet2DModel"
    native = tmp_path / "native"
    native.mkdir()
    write_native(weights, native)
    assert inspect(native)["parameters"] > count
    assert (native / WEIGHTS_FILE).exists()


def _leaves(tree):
    for value in tree.values():
        if isinstance(value, dict):
            yield from _leaves(value)
        else:
            yield value
