"""Images made again from their metadata: the same, or their differences named."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from ldm_jax.files import write_safetensors
from ldm_jax.images import read_png, write_png
from ldm_jax.pretrained.tensors import open_tensors
from ldm_jax.sampling.conditions import ImageSpec
from ldm_jax.sampling.metadata import make_metadata
from ldm_jax.sampling.sampling_config import SamplingConfig
from tests.support.commands import refusal, sample_here, write_run
from tests.support.pngs import read_texts
from tests.support.stand_ins import config_with, no_networks

SIDE = 8
EDITS = {
    "plain": "",
    "fresh noise": "--eta 0.7",
    "another sampler": "--sampler dpmpp_sde_2m --spacing leading",
    "ldm's own spacing": "--spacing ldm",
    "between two": "--labels 1,2 --seeds 3,4 --interpolate 3",
    "a picture": "--image I --strength 0.5",
    "a hole": "--image I --mask M",
    "a margin": "--image I --outpaint 2 0 0 4",
    "an inversion": "--image I --invert --source 3",
    "a size and tiles": "--size 12 8 --tile 4",
    "autoguidance": "--autoguidance W --guidance-scale 3",
    "a list of scales": "--guidance-scale 1,4,1 --guidance-rescale 0.7",
    "an interval": "--guidance-interval 5 inf",
}


@pytest.fixture(scope="module", autouse=True)
def formulas():
    with no_networks():
        yield


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    """A run, a worse one on the same first stage, a picture and a mask."""
    folder = tmp_path_factory.mktemp("things")
    run = write_run(config_with(), folder / "run")
    shutil.copytree(run, folder / "worse")
    weak(folder / "worse" / "weights.safetensors")
    pixels = np.random.RandomState(0).randint(0, 256, (SIDE, SIDE, 1))
    write_png(folder / "image.png", pixels.astype(np.uint8))
    write_png(folder / "mask.png", (pixels > 127).astype(np.uint8) * 255)
    return folder


def weak(path):
    """Shrink a UNet's weights, in the file."""
    tensors = open_tensors(path)
    shrunk = {
        k: tensors[k] * np.float32(0.5 if k.startswith("unet") else 1.0)
        for k in tensors
    }
    write_safetensors(path, shrunk)


@pytest.fixture(scope="module")
def made(things):
    """The last image of a kind of edit, made once."""
    names = {
        "I": things / "image.png",
        "M": things / "mask.png",
        "W": things / "worse",
    }

    def make(kind):
        out = things / kind.replace(" ", "_")
        if not out.exists():
            given = [names.get(word, word) for word in EDITS[kind].split()]
            few = [] if "--labels" in given else ["--labels", 1, "--seeds", "3,4"]
            args = ["--workdir", things / "run", "--out", out, "--steps", 2]
            sample_here(*args, *few, *given)
        return max(out.glob("0*.png"))

    return make


@pytest.fixture
def plain(made, tmp_path):
    """A plain image, to be harmed."""
    return shutil.copy(made("plain"), tmp_path / "plain.png")


def rewrite(path, **texts):
    """Write a PNG again with other texts; None takes one out."""
    kept = {k: v for k, v in {**read_texts(path), **texts}.items() if v is not None}
    write_png(path, read_png(path), kept)


def constant(name):
    raise AssertionError(f"{name} is no JSON")


@pytest.mark.parametrize("kind", EDITS)
def test_every_kind_of_edit_is_made_again_to_the_pixel(made, capsys, kind):
    path = made(kind)
    assert json.loads(read_texts(path)["settings"], parse_constant=constant)
    if kind not in ("plain", "a size and tiles", "a margin"):
        assert not np.array_equal(read_png(path), read_png(made("plain")))
    capsys.readouterr()
    sample_here("--replay", path)
    said = capsys.readouterr()
    pixels = read_png(path)[..., 0].size
    assert said.out == f"{path}: every one of {pixels} pixels is the same\n"
    assert said.err == ""


def test_metadata_holds_the_scale_that_had_effect():
    plain = SamplingConfig(workdir=".", guidance_scale=(3.0,))
    settings = [dataclasses.replace(plain, autoguidance="worse"), plain]
    scales = [
        make_metadata(ImageSpec(condition_texts, 0), given, {})["guidance_scale"]
        for given in settings
        for condition_texts in ({"label": "1"}, {})
    ]
    assert scales == ["3.0", "3.0", "3.0", "1.0"]


def test_what_was_otherwise_when_it_was_made_is_told(plain, capsys):
    texts = read_texts(plain)
    versions = {**json.loads(texts["versions"]), "jax": "0.1"}
    rewrite(
        plain, versions=json.dumps(versions), platform="tpu v9", checkpoint="f" * 64
    )
    sample_here("--replay", plain)
    said = capsys.readouterr()
    assert "is the same" in said.out
    told = [
        line.removeprefix("ldm sample: warning: ") for line in said.err.splitlines()
    ]
    assert told == [
        f"checkpoint: {'f' * 64} when it was made, here {texts['checkpoint']}",
        f"jax: 0.1 when it was made, here {json.loads(texts['versions'])['jax']}",
        f"platform: tpu v9 when it was made, here {texts['platform']}",
    ]


def test_a_changed_pixel_is_told(plain, capsys):
    pixels = read_png(plain).copy()
    pixels[2, 3] ^= 4
    write_png(plain, pixels, read_texts(plain))
    line = refusal(capsys, "--replay", plain)
    assert "--replay: 1 of 64 pixels differ, by at most 4 grey levels" in line


def test_another_shape_or_mode_is_told_before_anything_is_drawn(plain, capsys):
    texts, pixels = read_texts(plain), read_png(plain)
    write_png(plain, pixels[:4], texts)
    line = refusal(capsys, "--replay", plain)
    assert "4x8 pixels, its metadata gives 8x8: it was changed since" in line
    write_png(plain, pixels.repeat(3, axis=-1), texts)
    assert "mode RGB, wanted L" in refusal(capsys, "--replay", plain)


def with_setting(texts, **values):
    settings = json.loads(texts["settings"])
    return {"settings": json.dumps({**settings, **values})}


DAMAGES = [
    (lambda t: {"settings": None}, "has no metadata"),
    (lambda t: {"seed": None}, "has no metadata"),
    (lambda t: {"settings": "{"}, "damaged metadata"),
    (lambda t: {"settings": "[]"}, "damaged metadata: settings: wanted an object"),
    (lambda t: {"settings": "{}"}, "damaged metadata: settings: autoguidance unknown"),
    (lambda t: {"settings": "[" * 5000}, "damaged metadata"),
    (
        lambda t: with_setting(t, eta=float("nan")),
        "damaged metadata: settings: got NaN",
    ),
    (lambda t: with_setting(t, steps="2"), "damaged metadata: steps: got '2'"),
    (lambda t: with_setting(t, sampler="foo"), "damaged metadata: sampler: got 'foo'"),
    (lambda t: with_setting(t, eta=7), "damaged metadata: eta: got 7.0, wanted 0 to 1"),
    (lambda t: with_setting(t, size=[8]), "damaged metadata: size: got [8]"),
    (lambda t: with_setting(t, steps=1001), "(--steps: got 1001, wanted 1 to 1000)"),
    (lambda t: with_setting(t, image="gone.png"), "(--image: no file gone.png)"),
    (lambda t: {"seed": "x"}, "damaged metadata"),
    (lambda t: {"seed": "-1"}, "seed: got -1, wanted 0 to 4294967295"),
    (lambda t: {"other_seed": "5", "weight": "nan"}, "weight: got nan"),
    (lambda t: {"label": "10"}, "label: got 10, wanted a class, 0 to 9"),
    (lambda t: {"label": None}, "label: got none"),
]


@pytest.mark.parametrize(("harm", "words"), DAMAGES, ids=[d[1] for d in DAMAGES])
def test_a_damaged_metadata_is_one_line(plain, capsys, harm, words):
    rewrite(plain, **harm(read_texts(plain)))
    line = refusal(capsys, "--replay", plain)
    assert line.startswith("ldm sample: error: --replay: ") and words in line, line


def test_a_model_that_has_moved_is_found_where_it_is_said_to_be(
    things, plain, capsys, tmp_path
):
    there = tmp_path / "gone"
    rewrite(plain, **with_setting(read_texts(plain), workdir=str(there)))
    line = refusal(capsys, "--replay", plain)
    assert "is missing" in line and str(there) in line
    assert "try --workdir or --weights" in line
    sample_here("--replay", plain, "--workdir", things / "run")
    assert "is the same" in capsys.readouterr().out
    sample_here("--replay", plain, "--weights", things / "run")
    said = capsys.readouterr()
    assert "is the same" in said.out and said.err == ""


def test_a_picture_that_has_moved_is_found_where_it_is_said_to_be(
    things, made, capsys, tmp_path
):
    path = shutil.copy(made("a hole"), tmp_path / "hole.png")
    gone = {name: str(tmp_path / f"{name}.png") for name in ("image", "mask")}
    rewrite(path, **with_setting(read_texts(path), **gone))
    assert "--image: no file" in refusal(capsys, "--replay", path)
    args = ["--image", things / "image.png", "--mask", things / "mask.png"]
    sample_here("--replay", path, *args)
    said = capsys.readouterr()
    assert "is the same" in said.out and said.err == ""
