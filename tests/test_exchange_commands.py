"""Weights in and out, run as a user runs them."""

import dataclasses
import json

import numpy as np
import pytest

from ldm_jax.config import to_json
from ldm_jax.images import read_png, read_texts
from ldm_jax.interop.native import write_native
from ldm_jax.interop.weights import open_tensors, write_safetensors
from tests.commands import error_line, run, succeeded
from tests.models import config_of, model_of
from tests.test_tokenizer import write_clip

STEPS = ["--steps", 2, "--seeds", "0-1"]


def interop(*args):
    return run("-m", "ldm_jax.interop", *args)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A text-to-image model as our own folder, its tokenizer beside it."""
    path = tmp_path_factory.mktemp("clip")
    config = config_of("clip")
    write_native(model_of(config), path)
    (path / "config.json").write_text(to_json(config))
    (path / "tokenizer").mkdir()
    write_clip(path / "tokenizer", "sd1")
    return path


@pytest.fixture(scope="module")
def exported(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "diffusers"
    assert str(out) in succeeded(interop("export", folder, "--out", out))
    return out


@pytest.fixture(scope="module")
def pictures(exported, tmp_path_factory):
    """What sample.py draws straight from the exported folder."""
    out = tmp_path_factory.mktemp("pictures")
    prompt = ["--prompt", "hello cat", "--guidance-scale", 7.5, "--out", out]
    succeeded(run("sample.py", "--weights", exported, *prompt, *STEPS))
    return out


def test_text_becomes_pictures_straight_from_foreign_weights(pictures):
    images = [read_png(pictures / f"00000{i}.png") for i in range(2)]
    assert images[0].shape == (16, 16, 3)
    assert not np.array_equal(*images)
    texts = read_texts(pictures / "000001.png")
    assert (texts["prompt"], texts["seed"]) == ("hello cat", "1")
    assert texts["guidance_scale"] == "7.5"
    assert (pictures / "grid.png").exists()


def test_a_run_a_folder_and_a_file_draw_the_same_bytes(
    folder, exported, pictures, tmp_path
):
    file = tmp_path / "model.safetensors"
    succeeded(interop("export", folder, "--out", file, "--format", "compvis"))
    imported = tmp_path / "imported"
    succeeded(interop("import", exported, "--out", imported))
    sources = {
        "file": ["--weights", file, "--tokenizer", folder / "tokenizer"],
        "imported": ["--workdir", imported],
    }
    for name, source in sources.items():
        out = tmp_path / name
        prompt = ["--prompt", "hello cat", "--guidance-scale", 7.5, "--out", out]
        succeeded(run("sample.py", *source, *prompt, *STEPS))
        for image in ("000000.png", "000001.png"):
            assert np.array_equal(read_png(out / image), read_png(pictures / image))


def test_an_inspection_is_json(exported):
    report = json.loads(succeeded(interop("inspect", exported)))
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
def test_what_is_no_weights_is_told_in_one_line(args, words, tmp_path):
    message = error_line(run("sample.py", *args, "--out", tmp_path / "out"))
    assert all(word in message for word in words), message
    assert not (tmp_path / "out").exists()


def test_a_model_asks_for_what_it_reads(exported, tmp_path):
    out = ["--out", tmp_path / "out"]
    assert "--prompt" in error_line(run("sample.py", "--weights", exported, *out))
    labels = ["--labels", "1", *out]
    assert "--labels" in error_line(run("sample.py", "--weights", exported, *labels))
    assert not (tmp_path / "out").exists()


def test_a_bad_import_leaves_nothing_and_harms_nothing(exported, tmp_path):
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
    message = error_line(interop("import", broken, "--out", out))
    assert "conv_in.bias" in message and "1 missing" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("mine")
    message = error_line(interop("import", exported, "--out", full))
    assert "not empty" in message
    assert [path.name for path in full.iterdir()] == ["mine"]


def test_a_pickle_that_calls_something_is_refused_and_does_not_run(tmp_path):
    import os
    import pickle

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    file = tmp_path / "model.ckpt"
    file.write_bytes(pickle.dumps({"state_dict": Evil()}))
    config = ["--config", "configs/digits.py"]
    for command in (
        interop("inspect", file),
        interop("import", file, "--out", tmp_path / "out", *config),
        run("sample.py", "--weights", file, *config, "--out", tmp_path / "out"),
    ):
        error_line(command)
    assert [path.name for path in tmp_path.iterdir()] == ["model.ckpt"]


def test_a_first_stage_is_taken_from_elsewhere(tmp_path):
    """Stage 2 trains on an autoencoder out of a diffusers folder."""
    from tests.tiny import get_config

    tiny = get_config()
    first = dataclasses.replace(tiny.autoencoder, latent_scale=0.5)
    config = dataclasses.replace(tiny, autoencoder=first)
    native = tmp_path / "native"
    native.mkdir()
    write_native(model_of(config), native)
    (native / "config.json").write_text(to_json(config))
    out = tmp_path / "diffusers"
    succeeded(interop("export", native, "--out", out))
    (out / "ldm_jax.json").unlink()
    taken = ["--first-stage", out / "vae", "--diffusion.steps", 2]
    args = ["--config", "tests/tiny.py", "--workdir", tmp_path / "run", *taken]
    assert "finished" in succeeded(run("train.py", *args))
    final = json.loads((tmp_path / "run" / "final.json").read_text())
    assert final["latent_scale"] == 0.5
    assert final["seconds_by_stage"]["autoencoder"] == 0
    assert not (tmp_path / "run" / "autoencoder").exists()
    wider = [*args[:3], tmp_path / "other", *taken, "--autoencoder.channels", 16]
    assert "of another shape" in error_line(run("train.py", *wider))
