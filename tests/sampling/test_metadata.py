"""Replay of images from their metadata: equal pixels, or named differences."""

import dataclasses
import itertools
import json
import os
import shutil

import numpy as np
import pytest

from ldm_jax.cli import main
from ldm_jax.cli.exit_codes import run_main
from ldm_jax.files import write_safetensors
from ldm_jax.images import read_png, write_png
from ldm_jax.pretrained.tensors import open_tensors
from ldm_jax.sampling import metadata
from ldm_jax.sampling.conditions import ImageSpec
from ldm_jax.sampling.metadata import make_metadata
from ldm_jax.sampling.pipeline import open_pipeline
from ldm_jax.sampling.sampling_config import SamplingConfig
from tests.support.commands import refusal, sample_here, write_run
from tests.support.pngs import read_texts
from tests.support.stand_ins import config_with, no_networks

SIDE = 8
PRECISIONS = ("default", "highest")
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
def inputs(tmp_path_factory):
    """Write a run, a worse one with the same first stage, an image and a mask."""
    folder = tmp_path_factory.mktemp("things")
    run = write_run(config_with(), folder / "run")
    shutil.copytree(run, folder / "worse")
    shrink_unet(folder / "worse" / "weights.safetensors")
    pixels = np.random.RandomState(0).randint(0, 256, (SIDE, SIDE, 1))
    write_png(folder / "image.png", pixels.astype(np.uint8))
    write_png(folder / "mask.png", (pixels > 127).astype(np.uint8) * 255)
    return folder


def shrink_unet(path):
    """Halve the UNet's weights in a file."""
    tensors = open_tensors(path)
    shrunk = {
        k: tensors[k] * np.float32(0.5 if k.startswith("unet") else 1.0)
        for k in tensors
    }
    write_safetensors(path, shrunk)


@pytest.fixture(scope="module")
def sampled(inputs):
    """Return a function that samples an edit once and gives its last image."""
    names = {
        "I": inputs / "image.png",
        "M": inputs / "mask.png",
        "W": inputs / "worse",
    }

    def make(kind):
        out = inputs / kind.replace(" ", "_")
        if not out.exists():
            words = [names.get(word, word) for word in EDITS[kind].split()]
            few = [] if "--labels" in words else ["--labels", 1, "--seeds", "3,4"]
            args = ["--workdir", inputs / "run", "--out", out, "--steps", 2]
            sample_here(*args, *few, *words)
        return max(out.glob("0*.png"))

    return make


@pytest.fixture(scope="module")
def by_hand(inputs):
    """The files of a kind of edit, which metadata alone may not choose."""

    def flags(kind):
        given = EDITS[kind].split()
        named = {"I": "image.png", "M": "mask.png", "W": "worse"}
        pairs = itertools.pairwise(given)
        found = ((flag, inputs / named[word]) for flag, word in pairs if word in named)
        return [x for pair in found for x in pair]

    return flags


@pytest.fixture
def plain(sampled, tmp_path):
    """Copy a plain image, to be damaged."""
    return shutil.copy(sampled("plain"), tmp_path / "plain.png")


def rewrite(path, **texts):
    """Write a PNG file again with other texts; None removes one."""
    kept = {k: v for k, v in {**read_texts(path), **texts}.items() if v is not None}
    write_png(path, read_png(path), kept)


def constant(name):
    raise AssertionError(f"{name} is no JSON")


@pytest.mark.parametrize("kind", EDITS)
def test_replay_of_every_kind_of_edit_gives_the_same_pixels(
    sampled, by_hand, capsys, kind
):
    path = sampled(kind)
    assert json.loads(read_texts(path)["settings"], parse_constant=constant)
    if kind not in ("plain", "a size and tiles", "a margin"):
        assert not np.array_equal(read_png(path), read_png(sampled("plain")))
    capsys.readouterr()
    sample_here("--replay", path, *by_hand(kind))
    printed = capsys.readouterr()
    pixels = read_png(path)[..., 0].size
    assert printed.out == f"{path}: every one of {pixels} pixels is the same\n"
    assert printed.err == ""


def test_metadata_holds_the_effective_guidance_scale():
    plain = SamplingConfig(workdir=".", guidance_scale=(3.0,))
    settings = [dataclasses.replace(plain, autoguidance="worse"), plain]
    scales = [
        make_metadata(ImageSpec(condition_texts, 0), config, {})["guidance_scale"]
        for config in settings
        for condition_texts in ({"label": "1"}, {})
    ]
    assert scales == ["3.0", "3.0", "3.0", "1.0"]


def test_replay_warns_of_other_versions_platform_and_checkpoint(plain, capsys):
    texts = read_texts(plain)
    versions = {**json.loads(texts["versions"]), "jax": "0.1"}
    rewrite(
        plain, versions=json.dumps(versions), platform="tpu v9", checkpoint="f" * 64
    )
    sample_here("--replay", plain)
    printed = capsys.readouterr()
    assert "is the same" in printed.out
    warnings = [
        line.removeprefix("ldm sample: warning: ") for line in printed.err.splitlines()
    ]
    assert warnings == [
        f"checkpoint: {'f' * 64} when it was made, here {texts['checkpoint']}",
        f"jax: 0.1 when it was made, here {json.loads(texts['versions'])['jax']}",
        f"platform: tpu v9 when it was made, here {texts['platform']}",
    ]


def test_an_image_is_replayed_in_the_precision_it_was_made_with(
    inputs, plain, tmp_path, capsys
):
    config = dataclasses.replace(config_with(), precision="highest")
    highest = write_run(config, tmp_path / "highest")
    found = {}
    for run, flag in itertools.product((inputs / "run", highest), ("", *PRECISIONS)):
        out = tmp_path / f"{run.name}_{flag}"
        asked = ["--precision", flag] if flag else []
        args = ["--workdir", run, "--out", out, "--labels", 1, "--seeds", 3]
        sample_here(*args, "--steps", 2, *asked)
        found[run.name, flag] = read_texts(out / "000000.png")
        capsys.readouterr()
        sample_here("--replay", out / "000000.png")
        assert capsys.readouterr().err == ""
    usual = [("run", ""), ("run", "default"), ("highest", "default")]
    named = {key: texts.pop("precision", None) for key, texts in found.items()}
    assert named == {key: None if key in usual else "highest" for key in found}
    # How the precision was asked for is no part of an image.
    assert found["run", "highest"] == found["run", ""] == found["run", "default"]
    sample_here("--replay", plain, "--precision", "highest")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("precision: default when it was made, here highest")


def test_metadata_of_a_precision_makes_a_model_of_it(inputs, tmp_path):
    args = ["--workdir", inputs / "run", "--out", tmp_path, "--labels", 1, "--steps", 2]
    sample_here(*args, "--seeds", 3, "--precision", "highest")
    settings = metadata.read_metadata(tmp_path / "000000.png")[1]
    assert settings.precision == "highest"
    assert open_pipeline(settings).model.precision == "highest"


def test_replay_refuses_a_changed_pixel(plain, capsys):
    pixels = read_png(plain).copy()
    pixels[2, 3] ^= 4
    write_png(plain, pixels, read_texts(plain))
    line = refusal(capsys, "--replay", plain)
    assert "--replay: 1 of 64 pixels differ, by at most 4 grey levels" in line


def test_replay_refuses_another_image_size_or_mode(plain, capsys):
    texts, pixels = read_texts(plain), read_png(plain)
    write_png(plain, pixels[:4], texts)
    line = refusal(capsys, "--replay", plain)
    assert "4x8 pixels of 1 channels, its metadata gives 8x8 of 1" in line
    write_png(plain, pixels.repeat(3, axis=-1), texts)
    line = refusal(capsys, "--replay", plain)
    assert "8x8 pixels of 3 channels, its metadata gives 8x8 of 1" in line


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
    (lambda t: with_setting(t, image="gone.png"), "names files that are not in"),
    (lambda t: with_setting(t, eta=10**400), "damaged metadata"),
    (lambda t: with_setting(t, workdir="a\x1b[2Jb"), "damaged metadata: workdir: got"),
    (lambda t: with_setting(t, image="a\0b"), "damaged metadata: image: got"),
    (lambda t: with_setting(t, spacing="x" * 10**5), "damaged metadata: spacing: got"),
    (lambda t: {"seed": "x"}, "damaged metadata"),
    (lambda t: {"seed": "-1"}, "seed: got -1, wanted 0 to 4294967295"),
    (lambda t: {"other_seed": "5", "weight": "nan"}, "weight: got nan"),
    (lambda t: {"seed": "9" * 5000}, "damaged metadata"),
    (lambda t: {"label": "9" * 5000}, "label: got 999"),
    (lambda t: {"label": "10"}, "label: got 10, wanted a class, 0 to 9"),
    (lambda t: {"label": None}, "label: got none"),
    (lambda t: {"precision": "low"}, "damaged metadata: precision: got 'low'"),
]


@pytest.mark.parametrize(("harm", "words"), DAMAGES, ids=[d[1] for d in DAMAGES])
def test_damaged_metadata_is_refused_in_one_line(plain, capsys, harm, words):
    rewrite(plain, **harm(read_texts(plain)))
    line = refusal(capsys, "--replay", plain)
    assert line.startswith("ldm sample: error: --replay: ") and words in line, line


def test_replay_of_a_moved_run_takes_workdir_or_weights(
    inputs, plain, capsys, tmp_path
):
    there = tmp_path / "gone"
    rewrite(plain, **with_setting(read_texts(plain), workdir=str(there)))
    line = refusal(capsys, "--replay", plain)
    assert f"{plain} cannot be made again (--workdir: " in line and str(there) in line
    assert "try --workdir or --weights" in line
    sample_here("--replay", plain, "--workdir", inputs / "run")
    assert "is the same" in capsys.readouterr().out
    sample_here("--replay", plain, "--weights", inputs / "run")
    printed = capsys.readouterr()
    assert "is the same" in printed.out and printed.err == ""


def test_replay_says_which_setting_has_no_meaning_for_the_model(plain, capsys):
    rewrite(plain, **with_setting(read_texts(plain), steps=10**6))
    line = refusal(capsys, "--replay", plain)
    assert f"--replay: {plain} cannot be made again (--steps: got 1000000" in line


def test_replay_of_a_moved_image_takes_image_and_mask(
    inputs, sampled, capsys, tmp_path
):
    path = shutil.copy(sampled("a hole"), tmp_path / "hole.png")
    gone = {name: str(tmp_path / f"{name}.png") for name in ("image", "mask")}
    rewrite(path, **with_setting(read_texts(path), **gone))
    line = refusal(capsys, "--replay", path)
    assert all(f"--{name} {there}" in line for name, there in gone.items())
    args = ["--image", inputs / "image.png", "--mask", inputs / "mask.png"]
    sample_here("--replay", path, *args)
    printed = capsys.readouterr()
    assert "is the same" in printed.out and printed.err == ""


# Metadata may be anyone's.

RUNS = "import pathlib; pathlib.Path(__file__).with_suffix('.ran').touch()\n"
FOREIGN = {
    "weights": "--weights",
    "config_file": "--config",
    "tokenizer": "--tokenizer",
    "autoguidance": "--autoguidance",
    "image": "--image",
    "mask": "--mask",
}


def refused_by_name(capsys, picture, **named):
    """Assert that a picture which names files is refused, and each is shown."""
    rewrite(picture, **with_setting(read_texts(picture), **named))
    line = refusal(capsys, "--replay", picture)
    for name, path in named.items():
        if name in FOREIGN and path is not None:
            assert f"{FOREIGN[name]} {path}" in line, line
    return line


@pytest.mark.parametrize("name", FOREIGN)
def test_a_picture_opens_no_file_outside_its_run(
    inputs, plain, capsys, tmp_path, name, monkeypatch
):
    monkeypatch.setattr(metadata, "open_run", unwanted)
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    image = {"image": str(inputs / "run" / "inner.png")} if name == "mask" else {}
    refused_by_name(capsys, plain, **{**image, name: str(pipe)})


def unwanted(*args, **kwargs):
    raise AssertionError("something was opened")


@pytest.mark.parametrize("suffix", [".py", ".json"])
def test_a_picture_runs_no_config(plain, capsys, tmp_path, suffix, monkeypatch):
    path = tmp_path / f"recipe{suffix}"
    path.write_text(RUNS)
    monkeypatch.chdir(tmp_path)
    for name in (path.name, str(path)):
        refused_by_name(
            capsys, plain, workdir=None, weights="weights.ckpt", config_file=name
        )
    assert not path.with_suffix(".ran").exists()


def test_a_file_of_the_run_needs_no_flag_and_a_link_out_of_it_does(
    inputs, sampled, capsys, tmp_path
):
    run = shutil.copytree(inputs / "run", tmp_path / "run")
    inner = shutil.copy(inputs / "image.png", run / "inner.png")
    path = shutil.copy(sampled("a picture"), tmp_path / "picture.png")
    names = {"workdir": str(run), "image": str(inner)}
    rewrite(path, **with_setting(read_texts(path), **names))
    sample_here("--replay", path)
    assert "is the same" in capsys.readouterr().out
    (run / "link.png").symlink_to(inputs / "image.png")
    refused_by_name(capsys, path, **{**names, "image": str(run / "link.png")})
    refused_by_name(capsys, path, **{**names, "image": f"{run}/../run2/inner.png"})
    refused_by_name(capsys, path, workdir="/", image=str(inputs / "image.png"))
    inner.unlink()
    os.mkfifo(inner)
    rewrite(path, **with_setting(read_texts(path), **names))
    assert "not a regular file" in refusal(capsys, "--replay", path)


@pytest.mark.parametrize("size", [[8192, 8192], [2, 10**9]])
def test_a_picture_does_not_choose_the_memory(plain, capsys, size):
    line = refused_by_name(capsys, plain, size=size)
    assert "8x8 of its model" in line and f"--size {size[0]} {size[1]}" in line


def test_a_picture_of_a_size_beyond_numbers_is_refused(plain, capsys):
    line = refused_by_name(capsys, plain, size=[10**400, 8])
    assert "damaged metadata: size: got 1000" in line and len(line) < 400


def test_a_picture_does_not_choose_its_margins(sampled, by_hand, capsys, tmp_path):
    path = shutil.copy(sampled("a margin"), tmp_path / "margin.png")
    rewrite(path, **with_setting(read_texts(path), outpaint=[0, 0, 0, 10**9]))
    line = refusal(capsys, "--replay", path, *by_hand("a margin"))
    assert "give --outpaint 0 0 0 1000000000 by hand" in line


def test_a_large_size_is_made_again_when_it_is_given_by_hand(inputs, capsys, tmp_path):
    size = ["--size", 32, 40]
    args = ["--workdir", inputs / "run", "--labels", 1, "--seeds", 0, "--steps", 1]
    sample_here(*args, *size, "--out", tmp_path)
    capsys.readouterr()
    line = refusal(capsys, "--replay", tmp_path / "000000.png")
    assert "--size 32 40" in line
    sample_here("--replay", tmp_path / "000000.png", *size)
    assert "is the same" in capsys.readouterr().out


def test_a_strip_is_made_kept_and_made_again(inputs, capsys, tmp_path):
    args = ["--workdir", inputs / "run", "--labels", 1, "--seeds", 0, "--steps", 1]
    for _ in range(2):
        sample_here(*args, "--size", 2, 64, "--out", tmp_path)
    capsys.readouterr()
    sample_here("--replay", tmp_path / "000000.png")
    assert "every one of 128 pixels is the same" in capsys.readouterr().out


def test_what_a_picture_says_is_shown_escaped_and_short(plain, capsys):
    rewrite(plain, platform="a\x1b[2J\n" + "b" * 10**5)
    sample_here("--replay", plain)
    (line,) = capsys.readouterr().err.splitlines()
    assert "platform: a\\x1b[2J\\nbbb" in line and len(line) < 500


STRANGE = (
    *(0, -1, 1, 2**63, 10**400, 1e308, 5e-324, True, None, "", "x" * 10**4),
    *("\u00b2", "a\x1b[2J", "/dev/zero", "/", "..", ".", "nan", "9" * 5000, "[" * 9999),
    *([], [1, 2], [10**9, 10**9], [-1, 2, 3, 4], [2, 0, 2, 0], [[[]]], {}, "lcm"),
)
WORDS = ("seed", "label", "prompt", "weight", "other_seed", "other_label", "versions")
NUM_DRAWN = 60


def test_no_metadata_ends_in_a_traceback_or_without_an_answer(plain, capsys):
    random = np.random.RandomState(0)
    texts, pixels = read_texts(plain), read_png(plain)
    fields = [field.name for field in dataclasses.fields(SamplingConfig)]
    for _ in range(NUM_DRAWN):
        names = random.choice([*fields, *WORDS], size=random.choice([1, 1, 2]))
        values = {str(name): STRANGE[random.choice(len(STRANGE))] for name in names}
        printed = {k: str(v)[:20000] for k, v in values.items() if k in WORDS}
        settings = {k: v for k, v in values.items() if k not in WORDS}
        harmed = {**texts, **with_setting(texts, **settings), **printed}
        write_png(plain, pixels, {k: v.replace("\0", "") for k, v in harmed.items()})
        with pytest.raises(SystemExit) as stop:
            run_main(main.run, "ldm sample", ["sample", "--replay", str(plain)])
        out, err = capsys.readouterr()
        assert stop.value.code in (0, 1, 2), values
        assert ("is the same" in out) == (stop.value.code == 0), values
        assert len(err.splitlines()) <= 10 and len(err) < 4000, (values, err)
