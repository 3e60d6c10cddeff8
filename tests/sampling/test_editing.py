"""Edits through `ldm sample`: kept pixels, new pixels and image sizes."""

import dataclasses
import itertools

import numpy as np
import pytest
from PIL import Image

from ldm_jax.build import build_model
from ldm_jax.cli.sample import SampleCommand, parse_sample
from ldm_jax.config import ClipConfig, ConditionConfig
from ldm_jax.data import image_files
from ldm_jax.data.image_files import to_channels
from ldm_jax.images import read_png, write_png
from ldm_jax.sampling.input_images import read_input_images
from ldm_jax.sampling.pipeline import with_strength
from ldm_jax.sampling.sampling_config import SamplingConfig
from tests.data.test_tokenizer import write_clip
from tests.support.commands import sample_here, write_run
from tests.support.stand_ins import SIDE, config_with, no_networks, picture


@pytest.fixture(scope="module", autouse=True)
def formulas():
    with no_networks():
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(config_with(), tmp_path_factory.mktemp("runs") / "run")


def sampled(run, out, *args, labels="1", seeds="0"):
    base = ["--workdir", run, "--out", out, "--steps", 2, "--labels", labels]
    sample_here(*base, "--seeds", seeds, *args)
    return [read_png(path).astype(int) for path in sorted(out.glob("0*.png"))]


@pytest.fixture
def image(tmp_path):
    return picture(tmp_path / "image.png")


@pytest.fixture
def mask(tmp_path):
    pixels = np.zeros((SIDE, SIDE, 1), np.uint8)
    pixels[3:6, 1:5] = 255
    write_png(tmp_path / "mask.png", pixels)
    return tmp_path / "mask.png"


def test_mask_keeps_every_byte_outside_its_hole(run, image, mask, tmp_path):
    arguments = ["--image", image, "--mask", mask]
    first, second = sampled(run, tmp_path / "out", *arguments, seeds="0,1")
    hole = read_png(mask)[..., 0] == 255
    assert np.array_equal(first[~hole], read_png(image)[~hole])
    assert np.array_equal(second[~hole], read_png(image)[~hole])
    assert not np.array_equal(first[hole], second[hole])


MASKS = {
    "0 and 1": lambda x: Image.fromarray(x // 255),
    "0 and 1 in 16 bits": lambda x: Image.fromarray((x // 255).astype(np.uint16)),
    "0 and 40": lambda x: Image.fromarray(x // 255 * 40),
    "bits": lambda x: Image.fromarray(x > 0),
    "RGB": lambda x: Image.fromarray(x).convert("RGB"),
    "RGBA": lambda x: Image.fromarray(x).convert("RGBA"),
    "palette": lambda x: Image.fromarray(x).convert("P"),
    "white on nothing": lambda x: Image.merge(
        "LA", [Image.new("L", x.shape, 255), Image.fromarray(x)]
    ),
    "red on black": lambda x: Image.fromarray(
        np.stack([x, 0 * x, 0 * x], axis=-1).astype(np.uint8)
    ),
    "smooth": lambda x: Image.fromarray(np.where(x > 0, x - 3, 20).astype(np.uint8)),
    "sideways": lambda x: Image.fromarray(np.rot90(x)),
}


@pytest.mark.parametrize("kind", MASKS)
def test_every_kind_of_mask_makes_its_white_part_anew(run, image, mask, tmp_path, kind):
    hole = read_png(mask)[..., 0]
    exif = Image.Exif()
    exif[0x0112] = 6 if kind == "sideways" else 1
    MASKS[kind](hole).save(tmp_path / "other.png", exif=exif)
    model = build_model(config_with())
    asked = {"workdir": str(run), "image": str(image)}
    wanted, found = (
        read_input_images(model, SamplingConfig(**asked, mask=str(path))).mask
        for path in (mask, tmp_path / "other.png")
    )
    assert np.array_equal(wanted, found)


def test_an_image_is_read_as_training_reads_it(run, tmp_path):
    pixels = np.random.RandomState(0).randint(0, 256, (4, SIDE, 4), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, picture_of in {
        "phone.jpg": Image.fromarray(pixels[..., :3]),
        "clear.png": Image.fromarray(pixels),
        "palette.png": Image.fromarray(pixels[..., 0]).convert("P"),
        "wide.png": Image.fromarray(pixels[..., 0].astype(np.uint16) * 257),
    }.items():
        picture_of.save(tmp_path / name, exif=exif)
        for channels, config in ((1, config_with()), (3, coloured(config_with()))):
            settings = SamplingConfig(workdir=str(run), image=str(tmp_path / name))
            found = read_input_images(build_model(config), settings).image
            wanted = to_channels(image_files.read_image(tmp_path / name), channels)
            assert wanted.shape == (SIDE, 4, channels)
            assert np.array_equal(found, wanted)


def coloured(config):
    data = dataclasses.replace(config.data, image_channels=3)
    return dataclasses.replace(config, data=data)


def test_outpainting_keeps_every_byte_of_the_middle(run, image, tmp_path):
    arguments = ["--image", image, "--outpaint", 2, 4, 6, 0]
    first, second = sampled(run, tmp_path / "out", *arguments, seeds="0,1")
    assert first.shape == (SIDE + 4, SIDE + 8, 1)
    assert np.array_equal(first[4:, 2 : 2 + SIDE], read_png(image))
    assert not np.array_equal(first[:4], second[:4])


@pytest.mark.parametrize(
    ("concat", "flags", "strength"),
    [
        ("none", "--image I", 0.75),
        ("none", "--image I --strength 0.4", 0.4),
        ("none", "--image I --mask I", 1.0),
        ("none", "--image I --mask I --strength 0.4", 0.4),
        ("none", "--image I --outpaint 2 0 0 0", 1.0),
        ("none", "--image I --invert", None),
        ("low_resolution", "--image I", None),
        ("masked_image", "--image I --mask I", None),
    ],
)
def test_default_strength_depends_on_the_edit(run, image, concat, flags, strength):
    arguments = [str(image) if word == "I" else word for word in flags.split()]
    command = parse_sample(["--workdir", str(run), *arguments])
    assert isinstance(command, SampleCommand)
    config = config_with(ConditionConfig(concat=concat, low_resolution_factor=2))
    resolved = with_strength(build_model(config), command.settings)
    assert resolved.strength == strength


def test_interpolation_ends_at_the_plain_images(run, tmp_path):
    between = sampled(
        run, tmp_path / "out", "--interpolate", 4, labels="1,2", seeds="5,7"
    )
    (first,) = sampled(run, tmp_path / "first", labels="1", seeds="5")
    (last,) = sampled(run, tmp_path / "last", labels="2", seeds="7")
    assert len(between) == 4
    # A mixture of all class embeddings rounds differently from a lookup.
    assert np.abs(between[0] - first).max() <= 1
    assert np.abs(between[3] - last).max() <= 1
    steps = [np.abs(a - b).mean() for a, b in itertools.pairwise(between)]
    assert min(steps) > 1


def test_size_flag_sets_the_image_size(run, tmp_path):
    (wide,) = sampled(run, tmp_path / "out", "--size", 6, 14)
    assert wide.shape == (6, 14, 1)


def test_guidance_scale_of_one_is_no_guidance(run, tmp_path):
    (plain,) = sampled(run, tmp_path / "plain", "--guidance-scale", 1)
    nowhere = ["--guidance-scale", 3, "--guidance-interval", 1e5, 1e6]
    (unguided,) = sampled(run, tmp_path / "unguided", *nowhere)
    (guided,) = sampled(run, tmp_path / "guided", "--guidance-scale", 3)
    assert np.abs(plain - unguided).max() <= 1
    assert np.abs(plain - guided).max() > 1


def test_inpainting_model_keeps_every_byte_outside_the_mask(image, mask, tmp_path):
    config = config_with(ConditionConfig(concat="masked_image"))
    run = write_run(config, tmp_path / "run")
    args = ["--workdir", run, "--image", image, "--mask", mask, "--steps", 1]
    sample_here(*args, "--seeds", "0,1", "--out", tmp_path / "out")
    first, second = (read_png(tmp_path / "out" / f"00000{i}.png") for i in (0, 1))
    hole = read_png(mask)[..., 0] == 255
    assert np.array_equal(first[~hole], read_png(image)[~hole])
    assert not np.array_equal(first[hole], second[hole])


def test_super_resolution_model_is_conditioned_on_its_image(tmp_path):
    condition = ConditionConfig(concat="low_resolution", low_resolution_factor=2)
    run = write_run(config_with(condition), tmp_path / "run")
    small = [picture(tmp_path / f"{i}.png", height=4, width=6, seed=i) for i in (0, 1)]
    for i, path in enumerate(small):
        args = ["--workdir", run, "--image", path, "--steps", 1, "--seeds", 0]
        sample_here(*args, "--out", tmp_path / f"out{i}")
    images = [read_png(tmp_path / f"out{i}" / "000000.png") for i in (0, 1)]
    assert images[0].shape == (8, 12, 1)
    assert not np.array_equal(images[0], images[1])


def test_tiled_decoding_equals_plain_decoding(run, tmp_path):
    size = ["--size", 16, 24]
    (plain,) = sampled(run, tmp_path / "plain", *size)
    (one_tile,) = sampled(run, tmp_path / "whole", *size, "--tile", 12)
    (tiled,) = sampled(run, tmp_path / "tiled", *size, "--tile", 4)
    assert np.array_equal(one_tile, plain)
    assert np.abs(tiled - plain).max() <= 1


def test_model_of_classes_and_texts_is_conditioned_on_both(tmp_path):
    clip = ClipConfig(
        vocab_size=521, width=8, depth=1, num_heads=2, mlp_width=8, eos_token_id=520
    )
    condition = ConditionConfig(label=True, context="clip", clip=clip)
    run = write_run(config_with(condition, transformer_depth=1), tmp_path / "run")
    (tmp_path / "tokenizer").mkdir()
    write_clip(tmp_path / "tokenizer", "sd1")
    args = ["--tokenizer", tmp_path / "tokenizer", "--prompt", "hello", "cat"]
    images = sampled(run, tmp_path / "out", *args, labels="1,2")
    assert len(images) == 4
    pairs = [(a, b) for a in range(4) for b in range(a)]
    assert not any(np.array_equal(images[a], images[b]) for a, b in pairs)
