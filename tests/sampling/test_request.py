"""Requests to `ldm sample`: a mistake is one line and writes nothing."""

import dataclasses
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.digits import get_config
from ldm_jax.build import build_model
from ldm_jax.cli.sample import SampleArguments, SampleCommand, parse_sample
from ldm_jax.config import ClipConfig, ConditionConfig, Config, to_json
from ldm_jax.images import write_png
from ldm_jax.sampling.conditions import ImageSpec, check_settings, image_specs
from ldm_jax.sampling.outputs import open_work
from ldm_jax.sampling.request import (
    FLAG_NAMES,
    INTERVAL,
    SampleRequest,
    command_line,
    list_text,
)
from ldm_jax.sampling.sampling_config import SamplingConfig
from ldm_jax.types import InputError
from tests.data.test_tokenizer import write_clip
from tests.support.commands import ROOT, refusal, write_run
from tests.support.stand_ins import config_with

SIDE = 8
MASKED = ConditionConfig(concat="masked_image")
ENLARGES = ConditionConfig(concat="low_resolution", low_resolution_factor=2)
EMBEDDING = ConditionConfig(context="embedding", embedding_width=4)


def command_of(*args: str) -> SampleCommand:
    command = parse_sample(list(args))
    assert isinstance(command, SampleCommand)
    return command


def specs_of(config: Config, command: SampleCommand) -> list[ImageSpec]:
    guided = command.settings.guided
    return image_specs(build_model(config), command.request, guided=guided)


def error(*args: object) -> str:
    with pytest.raises(InputError) as caught:
        parse_sample(list(map(str, args)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def grey(path, height=SIDE, width=SIDE):
    pixels = np.random.RandomState(0).randint(0, 256, (height, width, 1))
    write_png(path, pixels.astype(np.uint8))
    return path


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Write a run's config, all that parsing reads, and two images."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.json").write_text(to_json(get_config()))
    for name in ("i.png", "m.png"):
        grey(folder / name)
    return folder


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--labels 0-10", ["--labels", "10", "0 to 9"]),
        ("--steps 0", ["--steps: got 0", "at least 1"]),
        ("--steps 1001", ["--steps", "1001", "1 to 1000"]),
        ("--seeds 9-0", ["--seeds", "9-0"]),
        ("--seeds x", ["--seeds", "x"]),
        ("--seeds 4294967296", ["--seeds", "4294967296"]),
        ("--seeds 0-4294967295", ["--seeds: got 0-4294967295", "at most 10000000"]),
        ("--process 4/4", ["--process: got '4/4'", "0/4"]),
        ("--process x", ["--process: got 'x'"]),
        ("--sampler ddimm", ["--sampler: got 'ddimm'", "mean ddim?"]),
        ("--sampler dpmpp2m", ["--sampler: got 'dpmpp2m'", "mean dpmpp_2m?"]),
        ("--spacing trail", ["--spacing: got 'trail'", "mean trailing?"]),
        ("--eta 1.5", ["--eta: got 1.5, wanted 0 to 1"]),
        ("--eta -0.1", ["--eta: got -0.1, wanted 0 to 1"]),
        ("--eta nan", ["--eta: got nan, wanted a finite number"]),
        ("--sampler lcm --eta 0.5", ["--eta: got 0.5 with --sampler lcm"]),
        ("--sampler plms --eta 1", ["--eta: got 1.0 with --sampler plms"]),
        ("--sampler ddpm --eta 1", ["--eta: got 1.0 with --sampler ddpm"]),
        ("--guidance-scale -1", ["--guidance-scale", "-1"]),
        ("--guidance-scale nan", ["--guidance-scale", "nan"]),
        ("--guidance-scale 1,,2", ["--guidance-scale", "1,,2"]),
        ("--guidance-scal 2", ["--guidance-scal:", "--guidance-scale?"]),
        ("--guidance-rescale 1.1", ["--guidance-rescale: got 1.1, wanted 0 to 1"]),
        ("--guidance-interval 2 1", ["--guidance-interval: got 2 1", "rising"]),
        ("--guidance-interval nan 1", ["--guidance-interval: got nan 1"]),
        ("--guidance-interval inf inf", ["--guidance-interval: got inf inf"]),
        ("--guidance-interval 1", ["--guidance-interval"]),
        ("--autoguidance-step 3", ["--autoguidance-step: got 3 without"]),
        ("--negative-prompt x --autoguidance r", ["--negative-prompt: got it beside"]),
        ("--tile 3", ["--tile: got 3, wanted 0, or at least 4 latents"]),
        ("--size 0 8", ["--size: got (0, 8)"]),
        ("--size 8", ["--size"]),
        ("--interpolate 1", ["--interpolate: got 1, wanted 2 or more"]),
        ("--config c.py", ["--config: got it beside --workdir"]),
        ("--mask M", ["--mask: got it without --image"]),
        ("--strength 0.5", ["--strength: got it without --image"]),
        ("--invert", ["--invert: got it without --image"]),
        ("--outpaint 2 2 2 2", ["--outpaint: got it without --image"]),
        ("--image nowhere.png", ["--image: no file nowhere.png"]),
        ("--image DIR", ["--image: no file"]),
        ("--image I --mask nowhere.png", ["--mask: no file nowhere.png"]),
        ("--image I --strength 0", ["--strength: got 0.0, wanted above 0"]),
        ("--image I --strength 1.5", ["--strength: got 1.5", "at most 1"]),
        ("--image I --outpaint 0 0 0 0", ["--outpaint: got (0, 0, 0, 0)"]),
        ("--image I --outpaint -2 0 0 4", ["--outpaint: got (-2, 0, 0, 4)"]),
        ("--image I --outpaint 2 2", ["--outpaint"]),
        ("--image I --mask M --outpaint 2 0 0 0", ["--mask: got it beside --outpaint"]),
        ("--image I --mask M --invert", ["--invert: got it beside --mask"]),
        ("--image I --invert --strength 0.5", ["--invert: got it beside --strength"]),
        ("--image I --invert --sampler heun", ["--invert: got it with --sampler heun"]),
        ("--image I --invert --eta 0.5", ["--invert: got it with --eta 0.5"]),
        ("--image I --source 3", ["--source: got '3' without --invert"]),
        ("--image I --size 8 8", ["--size: got it beside --image"]),
        ("--image I --interpolate 3", ["--interpolate: got it beside --image"]),
        ("--replay nowhere.png", ["--replay: no file nowhere.png"]),
        ("--replay I --steps 3", ["--steps: got it beside --replay"]),
        ("--replay I --weights w", ["--weights: got it beside --workdir"]),
    ],
)
def test_bad_flag_is_refused_in_one_line_and_writes_nothing(workdir, flags, words):
    names = {"I": workdir / "i.png", "M": workdir / "m.png", "DIR": workdir}
    arguments = [names.get(word, word) for word in flags.split()]
    out = [] if "--replay" in flags else ["--out", workdir / "out"]
    message = error("--workdir", workdir, *out, *arguments)
    assert all(word in message for word in words), message
    assert not (workdir / "out").exists()


def test_workdir_that_is_not_a_run_is_refused(tmp_path):
    assert "not a run" in error("--workdir", tmp_path, "--out", tmp_path / "out")


def test_missing_or_second_model_source_is_refused(workdir):
    assert error().startswith("--workdir: not given")
    both = ["--workdir", workdir, "--weights", "x"]
    assert error(*both).startswith("--weights: got it beside --workdir")


def test_out_that_is_a_file_is_refused_and_kept(workdir):
    picture = workdir / "i.png"
    before = picture.read_bytes()
    message = error("--workdir", workdir, "--out", picture)
    assert "is a file, wanted a folder" in message
    assert picture.read_bytes() == before


def test_labels_default_to_every_class_of_the_run(workdir):
    command = command_of("--workdir", str(workdir), "--out", "o", "--seeds", "3")
    specs = specs_of(get_config(), command)
    assert [spec.condition_texts["label"] for spec in specs] == list("0123456789")
    assert {spec.seed for spec in specs} == {3}
    assert command.settings.eta == 0.0


@pytest.mark.parametrize(
    ("settings", "request_"),
    [
        ({}, {}),
        ({"guidance_scale": (1.0, 4.5, 1 / 3)}, {"labels": (0, 1, 2, 9, 3)}),
        ({"guidance_low": 0.5, "guidance_high": 5.0, "step": 3}, {"process": (1, 4)}),
        ({"guidance_low": 0.5, "spacing": "karras"}, {"as_dataset": Path("a b")}),
        ({"image": "I", "outpaint": (2, 0, 0, 4)}, {"out": Path("o"), "seeds": (7,)}),
        ({"image": "I", "invert": True, "source": "3"}, {"trajectory": True}),
        ({"ema_length": 0.1, "size": (8, 12)}, {"prompts": ("a 'b'",)}),
        ({"precision": "highest"}, {"overwrite": True}),
        ({"sampler": "unipc"}, {"negative_prompt": "-blue", "prompts": ("-x",)}),
    ],
)
def test_command_line_round_trips_settings_and_request(workdir, settings, request_):
    config = get_config()
    diffusion = dataclasses.replace(config.diffusion, average_lengths=(0.05, 0.1))
    config = dataclasses.replace(config, diffusion=diffusion)
    (workdir / "config.json").write_text(to_json(config))
    if "image" in settings:
        settings = {**settings, "image": str(workdir / "i.png")}
    expected = (
        SamplingConfig(workdir=str(workdir), **settings),
        SampleRequest(**request_),
    )
    words = shlex.split(command_line(*expected))
    assert words[:2] == ["ldm", "sample"]
    assert command_of(*words[2:])[:2] == expected


def test_list_of_integers_is_written_as_ranges():
    assert list_text((0, 1, 2, 3, 9)) == "0-3,9"
    assert list_text((3, 2, 2, 4)) == "3,2,2,4"


def test_default_guidance_scale_is_two_and_one_for_an_inversion():
    assert SamplingConfig().guidance_scale == (2.0,)
    assert SamplingConfig(image="i.png", invert=True).guidance_scale == (1.0,)


def test_guidance_interval_may_have_no_end(workdir):
    flags = ["--workdir", str(workdir), "--guidance-interval", "0.5", "inf"]
    settings = command_of(*flags).settings
    assert (settings.guidance_low, settings.guidance_high) == (0.5, None)


def test_model_of_classes_and_texts_samples_every_pair(workdir):
    both = ConditionConfig(label=True, context="text")
    config = config_with(both, transformer_depth=1)
    arguments = ["--workdir", str(workdir), "--labels", "3,1", "--seeds", "5"]
    command = command_of(*arguments, "--prompt", "a", "b", "--negative-prompt", "c")
    condition_texts = [spec.condition_texts for spec in specs_of(config, command)]
    assert condition_texts == [
        {"label": label, "prompt": prompt, "negative_prompt": "c"}
        for label in "31"
        for prompt in "ab"
    ]


@pytest.mark.parametrize(
    ("flags", "counts"),
    [
        ("--labels 0,1,2 --seeds 0", "3 classes or texts and 1 seeds"),
        ("--labels 0 --seeds 0", "1 classes or texts and 1 seeds"),
        ("--labels 0,1 --seeds 0-2", "2 classes or texts and 3 seeds"),
    ],
)
def test_interpolation_without_two_ends_is_refused(workdir, flags, counts):
    arguments = ["--workdir", str(workdir), "--interpolate", "3", *flags.split()]
    with pytest.raises(InputError, match=counts):
        specs_of(get_config(), command_of(*arguments))


def test_sample_help_shows_every_flag_and_parsing_imports_no_jax(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_sample(["--help"])
    assert not stop.value.code
    text = capsys.readouterr().out
    for field in dataclasses.fields(SampleArguments):
        if field.name not in (*INTERVAL, "launch"):  # whose fields are flags
            name = FLAG_NAMES.get(field.name, field.name)
            assert f"--{name.replace('_', '-')}" in text, field.name
    code = "import sys, ldm_jax.cli.sample; print('jax' in sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert found.stdout == "False\n", found.stderr


@pytest.mark.parametrize(
    ("condition", "flags", "words"),
    [
        (ConditionConfig(), "--image I --invert --source 1", "--source: this model"),
        (MASKED, "", "--mask: not given"),
        (MASKED, "--image I", "--mask: not given"),
        (MASKED, "--image I --mask M --strength 0.5", "--strength: this model"),
        (MASKED, "--image I --outpaint 2 2 2 2", "--mask: not given"),
        (ENLARGES, "", "--image: not given"),
        (ENLARGES, "--image I --mask M", "--mask: this model upscales whole"),
        (ENLARGES, "--image I --invert", "--invert: this model is conditioned"),
        (
            ENLARGES,
            "--image I --outpaint 2 2 2 2",
            "--outpaint: this model is conditioned",
        ),
        (EMBEDDING, "", "--workdir: this model is conditioned on embedding"),
    ],
)
def test_settings_that_do_not_fit_the_condition_are_refused(
    workdir, condition, flags, words
):
    names = {"I": str(workdir / "i.png"), "M": str(workdir / "m.png")}
    arguments = [names.get(word) or word for word in flags.split()]
    settings = command_of("--workdir", str(workdir), *arguments).settings
    depth = int(condition.context != "none")
    model = build_model(config_with(condition, transformer_depth=depth))
    with pytest.raises(InputError, match=words):
        check_settings(model, settings)


def clip_run(folder):
    """Write a run that reads texts of 77 tokens, and its tokenizer."""
    clip = ClipConfig(
        vocab_size=521, width=8, depth=1, num_heads=2, mlp_width=8, eos_token_id=520
    )
    condition = ConditionConfig(context="clip", clip=clip)
    run = write_run(config_with(condition, transformer_depth=1), folder / "run")
    (folder / "tokenizer").mkdir()
    write_clip(folder / "tokenizer", "sd1")
    return run


def test_every_text_that_is_cut_is_told_by_its_flag(tmp_path, caplog):
    run, long = clip_run(tmp_path), "x " * 100
    args = ["--workdir", run, "--tokenizer", tmp_path / "tokenizer", "--seeds", 0]
    args += ["--image", grey(tmp_path / "i.png"), "--invert", "--prompt", "a cat"]
    args += ["--out", tmp_path / "out"]
    for flags in (
        ("--source", long),
        ("--negative-prompt", long, "--guidance-scale", 2),
        ("--prompt", "a cat", long),
    ):
        caplog.clear()
        command = command_of(*map(str, [*args, *flags]))
        open_work(command.settings, command.request)
        (said,) = [x for x in caplog.messages if "and is cut" in x]
        assert said.startswith(f"{flags[0]}: 'x x ") and "77 tokens" in said


# Checks that need the model: the whole command, which writes nothing.


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Write runs of several kinds, and images that they refuse."""
    folder = tmp_path_factory.mktemp("runs")
    write_run(config_with(), folder / "label")
    write_run(config_with(), folder / "other_stage", seed=1)
    write_run(config_with(ConditionConfig()), folder / "nothing")
    shutil.copytree(folder / "label", folder / "velocity")
    velocity = to_json(config_with(prediction="v"))
    (folder / "velocity" / "config.json").write_text(velocity)
    grey(folder / "i.png")
    grey(folder / "odd.png", 8, 7)
    grey(folder / "small.png", 4, 4)
    rgb = np.zeros((SIDE, SIDE, 3), np.uint8)
    write_png(folder / "rgb.png", rgb)
    Image.fromarray(rgb[..., 0].astype(np.float32)).save(folder / "floats.tif")
    Image.fromarray(rgb).save(folder / "page.eps")
    Image.fromarray(rgb).save(folder / "comment.jpg", comment="seed settings")
    Image.fromarray(rgb[..., 0] + np.arange(SIDE, dtype=np.uint8) % 3).save(
        folder / "labels.png"
    )
    Image.new("1", (SIDE, 21 * SIDE)).save(folder / "strip.png")
    Image.new("1", (14000, 14000)).save(folder / "bomb.png")
    Image.new("1", (10000, 10000)).save(folder / "large.png")
    (folder / "text.png").write_text("no picture")
    content = (folder / "i.png").read_bytes()
    (folder / "cut.png").write_bytes(content[:-30])
    (folder / "wrong.png").write_bytes(content[:60] + b"\0\0\0\0" + content[64:])
    return folder


@pytest.mark.parametrize(
    ("run", "flags", "words"),
    [
        ("label", "--spacing ldm --steps 998", ["--steps: got 998", "try"]),
        ("label", "--size 2 16386", ["--size: got 2x16386", "16,384 a side"]),
        ("label", "--size 8194 8194", ["--size: got 8194x8194", "67,108,864 in all"]),
        ("label", "--size 8 7", ["--size: got 8x7", "multiples of 2", "try 8x8"]),
        ("label", "--image odd.png", ["--image: got 8x7", "multiples of 2"]),
        (
            "label",
            "--image i.png --outpaint 1 0 0 0",
            ["--image, outpainted: got 8x9", "multiples of 2"],
        ),
        (
            "label",
            "--image i.png --outpaint 0 0 0 1000000000",
            ["--image, outpainted: got 1000000008x8", "16,384 a side"],
        ),
        ("label", "--image floats.tif", ["--image:", "floats"]),
        ("label", "--image page.eps", ["--image:", "not an image"]),
        ("label", "--image i.png --mask page.eps", ["--mask:", "not an image"]),
        ("label", "--image text.png", ["--image:", "not an image"]),
        ("label", "--image cut.png", ["--image:", "cannot be read"]),
        ("label", "--image wrong.png", ["--image:", "wrong.png"]),
        ("label", "--image bomb.png", ["--image:", "more than 67,108,864 pixels"]),
        ("label", "--image large.png", ["--image:", "wanted at most 67,108,864"]),
        ("label", "--image strip.png", ["--image:", "wanted at most 20 to 1"]),
        ("label", "--image i.png --mask small.png", ["--mask: got 4x4", "wanted 8x8"]),
        ("label", "--image i.png --mask rgb.png", ["--mask:", "levels of 0 to 0"]),
        ("label", "--image i.png --mask labels.png", ["--mask:", "levels of 0 to 2"]),
        ("label", "--image i.png --invert --source 10", ["--source: got '10'", "0 to"]),
        ("label", "--image i.png --invert --source ²", ["--source: got '²'"]),
        ("label", "--prompt x", ["--prompt: this model reads no text"]),
        ("label", "--negative-prompt x", ["--negative-prompt: this model reads no"]),
        ("nothing", "--labels 1", ["--labels: this model has no classes"]),
        ("label", "--interpolate 3 --seeds 0-2", ["--interpolate: got 10 classes"]),
        (
            "label",
            "--autoguidance nowhere",
            ["--autoguidance:", "nowhere", "not a run"],
        ),
        ("label", "--autoguidance velocity", ["--autoguidance:", "trained alike"]),
        (
            "label",
            "--autoguidance nothing",
            ["--autoguidance:", "classes 0, wanted 10"],
        ),
        ("label", "--autoguidance other_stage", ["--autoguidance:", "first stage"]),
        (
            "label",
            "--autoguidance label --autoguidance-step 3",
            ["--autoguidance-step: got 3", "without checkpoints"],
        ),
        ("label", "--replay text.png", ["--replay:", "not an image"]),
        ("label", "--replay i.png", ["--replay:", "has no metadata"]),
        ("label", "--replay comment.jpg", ["--replay:", "has no metadata"]),
        ("label", "--replay page.eps", ["--replay:", "not an image"]),
        ("label", "--replay bomb.png", ["--replay:", "more than 67,108,864 pixels"]),
    ],
)
def test_request_that_the_model_cannot_do_is_refused_in_one_line(
    runs, capsys, run, flags, words, tmp_path
):
    names = {path.name: path for path in runs.iterdir()}
    arguments = [names.get(word, word) for word in flags.split()]
    out = [] if "--replay" in flags else ["--out", tmp_path / "out"]
    message = refusal(capsys, "--workdir", runs / run, *out, *arguments)
    assert message.startswith("ldm sample: error: ")
    assert all(word in message for word in words), message
    assert list(tmp_path.iterdir()) == []
