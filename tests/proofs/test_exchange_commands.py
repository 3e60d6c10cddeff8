"""Import, export and inspection of weights through the commands."""

import json
import shutil

import numpy as np
import pytest

from ldm_jax.files import write_safetensors
from ldm_jax.images import read_png
from ldm_jax.pretrained.tensors import open_tensors
from tests.data.test_tokenizer import write_clip
from tests.support.commands import (
    error_line,
    ldm,
    refusal,
    sample_here,
    succeeded,
    write_run,
)
from tests.support.models import config_of
from tests.support.pngs import read_texts

STEPS = ["--steps", 2, "--seeds", "0-1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a text-to-image model, with its tokenizer."""
    path = tmp_path_factory.mktemp("clip")
    config = config_of("clip")
    write_run(config, path)
    (path / "tokenizer").mkdir()
    write_clip(path / "tokenizer", "sd1")
    return path


@pytest.fixture(scope="module")
def exported(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "diffusers"
    assert str(out) in succeeded(ldm("export", folder, "--out", out))
    return out


@pytest.fixture(scope="module")
def samples(exported, tmp_path_factory):
    """Images that `ldm sample` draws from the exported folder."""
    out = tmp_path_factory.mktemp("samples")
    prompt = ["--prompt", "hello cat", "--guidance-scale", 7.5, "--out", out]
    sample_here("--weights", exported, *prompt, *STEPS)
    return out


def test_sample_draws_images_of_a_prompt_from_a_diffusers_folder(samples):
    images = [read_png(samples / f"00000{i}.png") for i in range(2)]
    assert images[0].shape == (16, 16, 3)
    assert not np.array_equal(*images)
    texts = read_texts(samples / "000001.png")
    assert (texts["prompt"], texts["seed"]) == ("hello cat", "1")
    assert texts["guidance_scale"] == "7.5"
    assert (samples / "grid.png").exists()


def test_run_diffusers_folder_and_compvis_file_give_equal_images(
    folder, exported, samples, tmp_path
):
    file = tmp_path / "model.safetensors"
    succeeded(ldm("export", folder, "--out", file, "--format", "compvis"))
    imported = tmp_path / "imported"
    succeeded(ldm("import", exported, "--out", imported))
    sources = {
        "file": ["--weights", file, "--tokenizer", folder / "tokenizer"],
        "imported": ["--workdir", imported],
    }
    for name, source in sources.items():
        out = tmp_path / name
        prompt = ["--prompt", "hello cat", "--guidance-scale", 7.5, "--out", out]
        sample_here(*source, *prompt, *STEPS)
        for image in ("000000.png", "000001.png"):
            assert np.array_equal(read_png(out / image), read_png(samples / image))


def test_inspect_prints_json(exported):
    report = json.loads(succeeded(ldm("inspect", exported)))
    assert report["pipeline"] == "StableDiffusionPipeline"
    assert set(report["parts"]) == {
        "vae",
        "unet",
        "text_encoder",
        "tokenizer",
        "scheduler",
    }


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--weights", "nowhere", "--prompt", "x"], ["--weights", "nowhere"]),
        (["--weights", "README.md", "--prompt", "x"], ["README.md", "safetensors"]),
        (["--weights", "tests", "--prompt", "x"], ["tests", "model_index.json"]),
    ],
)
def test_paths_without_weights_are_refused_in_one_line(args, words, capsys, tmp_path):
    message = refusal(capsys, *args, "--out", tmp_path / "out")
    assert all(word in message for word in words), message
    assert not (tmp_path / "out").exists()


def test_sample_names_a_missing_prompt_and_unused_labels(exported, capsys, tmp_path):
    out = ["--out", tmp_path / "out"]
    assert "--prompt" in refusal(capsys, "--weights", exported, *out)
    labels = ["--labels", "1", *out]
    assert "--labels" in refusal(capsys, "--weights", exported, *labels)
    assert not (tmp_path / "out").exists()


def test_a_failed_import_leaves_no_files_and_changes_none(exported, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in exported.rglob("*"):
        target = broken / path.relative_to(exported)
        if path.is_dir():
            target.mkdir(exist_ok=True)
        else:
            target.write_bytes(path.read_bytes())
    file = broken / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = dict(open_tensors(file))
    tensors.pop("conv_in.bias")
    write_safetensors(file, tensors)
    out = tmp_path / "out"
    message = error_line(ldm("import", broken, "--out", out))
    assert "conv_in.bias" in message and "1 missing" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("mine")
    message = error_line(ldm("import", exported, "--out", full))
    assert "not empty" in message
    assert [path.name for path in full.iterdir()] == ["mine"]


def test_a_pickle_with_a_function_call_is_refused_and_not_run(capsys, tmp_path):
    import os
    import pickle

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    file = tmp_path / "model.ckpt"
    file.write_bytes(pickle.dumps({"state_dict": Evil()}))
    config = ["--config", "configs/digits.py"]
    for command in (
        ldm("inspect", file),
        ldm("import", file, "--out", tmp_path / "out", *config),
    ):
        error_line(command)
    refusal(capsys, "--weights", file, *config, "--out", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model.ckpt"]


def test_a_first_stage_of_another_run_is_copied_into_the_run(tmp_path):
    """The diffusion stage trains on the autoencoder of a run of that stage alone."""
    first, second = tmp_path / "first", tmp_path / "second"
    config = ["--config", "tests/support/tiny.py", "--autoencoder.steps", 2]
    alone = ["--stages", "autoencoder", "--workdir", first]
    assert "finished" in succeeded(ldm("train", *config, *alone))
    first_stage = ["--first-stage", first, "--diffusion.steps", 2, "--workdir"]
    wider = [*config, *first_stage, tmp_path / "wider", "--autoencoder.channels", 16]
    assert "channels (8 there, 16 here)" in error_line(ldm("train", *wider))
    assert not (tmp_path / "wider").exists()
    assert "finished" in succeeded(ldm("train", *config, *first_stage, second))
    finals = [json.loads((path / "final.json").read_text()) for path in (first, second)]
    assert finals[0]["latent_scale"] == finals[1]["latent_scale"]
    assert finals[1]["seconds_by_stage"]["autoencoder"] == 0
    assert not (second / "autoencoder").exists()

    # The run resumes and samples without the folder of the other run.
    shutil.rmtree(first)
    assert "finished" in succeeded(ldm("train", *config, *first_stage, second))
    args = ["--workdir", second, "--labels", "1", "--out", tmp_path / "out"]
    sample_here(*args, *STEPS)
    texts = read_texts(tmp_path / "out" / "000000.png")
    assert texts["checkpoint"] == finals[1]["digest"]
