"""Image files of `ldm sample`: resumed, checked and shared by processes."""

import os
import shutil
import time
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from ldm_jax.build import build_model
from ldm_jax.images import read_png, write_png
from ldm_jax.sampling import outputs
from ldm_jax.sampling.pipeline import Pipeline, sample_images
from tests.support.commands import refusal, sample_here, write_run
from tests.support.pngs import read_texts
from tests.support.stand_ins import config_with, no_networks, picture

REQUEST = ["--labels", "1,2", "--seeds", "0-2", "--steps", 2]
NAMES = [f"{i:06d}.png" for i in range(6)]  # two calls of four, the last one short


@pytest.fixture(scope="module", autouse=True)
def formulas():
    with no_networks():
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(config_with(), tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def complete(run, tmp_path_factory):
    """Run one command without interruption."""
    out = tmp_path_factory.mktemp("whole")
    sample_here("--workdir", run, "--out", out, *REQUEST)
    return out


@pytest.fixture
def out(complete, tmp_path):
    """Copy the complete output, to be damaged."""
    shutil.copytree(complete, tmp_path / "out")
    return tmp_path / "out"


def snapshot(folder):
    return {
        path.name: (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.iterdir()
    }


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_existing_images_are_kept_and_missing_ones_are_sampled(
    run, complete, out, monkeypatch
):
    sampled = []

    def recorded(pipeline, specs):
        sampled.extend((s.condition_texts["label"], s.seed) for s in specs)
        return sample_images(pipeline, specs)

    monkeypatch.setattr(outputs, "sample_images", recorded)
    for name in (NAMES[1], NAMES[4]):
        (out / name).unlink()
    (out / (NAMES[1] + ".part")).write_bytes(b"half an image")
    kept = snapshot(out)
    sample_here("--workdir", run, "--out", out, *REQUEST)
    assert sampled == [("1", 1), ("2", 1)]
    assert contents(out) == contents(complete)
    assert all(snapshot(out)[n] == kept[n] for n in NAMES if n in kept)


@pytest.mark.parametrize("num", [1, 5])
def test_interrupted_command_resumes_to_the_same_files(
    run, complete, monkeypatch, capsys, tmp_path, num
):
    def interrupted(pipeline, specs):
        for i, made in enumerate(sample_images(pipeline, specs)):
            if i == num:
                raise KeyboardInterrupt
            yield made

    with monkeypatch.context() as patch:
        patch.setattr(outputs, "sample_images", interrupted)
        line = refusal(capsys, "--workdir", run, "--out", tmp_path, *REQUEST)
    assert line == "ldm sample: error: interrupted; the same command resumes"
    assert sorted(path.name for path in tmp_path.iterdir()) == NAMES[:num]
    sample_here("--workdir", run, "--out", tmp_path, *REQUEST)
    assert contents(tmp_path) == contents(complete)


@pytest.mark.parametrize(
    ("flags", "difference"),
    [
        ("--steps 1", "steps: 2 there, 1 here"),
        ("--eta 0.5", "eta: 0.0 there, 0.5 here"),
        ("--sampler heun", "eta: 0.0 there, none here, sampler: ddim there, heun here"),
        ("--spacing leading", "spacing: None there, leading here"),
        ("--guidance-scale 3", "guidance_scale: 2.0 there, 3.0 here"),
        ("--guidance-rescale 0.5", "guidance_rescale: 0.0 there, 0.5 here"),
        ("--labels 2,1", "label: 1 there, 2 here"),
        ("--seeds 3,1,2", "seed: 0 there, 3 here"),
    ],
)
def test_images_of_other_settings_are_refused_and_kept(
    run, out, capsys, flags, difference
):
    (out / NAMES[5]).unlink()
    before = snapshot(out)
    line = refusal(capsys, "--workdir", run, "--out", out, *REQUEST, *flags.split())
    assert f"{NAMES[0]} was made differently ({difference})" in line, line
    assert "--overwrite" in line
    assert snapshot(out) == before


def test_foreign_file_in_the_output_folder_is_refused(run, out, capsys):
    for name in NAMES[:3]:
        (out / name).unlink()
    picture(out / NAMES[5])
    before = snapshot(out)
    line = refusal(capsys, "--workdir", run, "--out", out, *REQUEST)
    assert NAMES[5] in line and "seed: none there, 2 here" in line
    (out / NAMES[5]).write_text("my notes")
    line = refusal(capsys, "--workdir", run, "--out", out, *REQUEST)
    assert f"{NAMES[5]} cannot be read: not an image" in line
    assert "--overwrite" in line
    assert snapshot(out) == {**before, NAMES[5]: snapshot(out)[NAMES[5]]}


@pytest.mark.parametrize("kind", ["eps", "pipe", "folder", "larger"])
def test_nothing_else_in_the_place_of_an_image_is_opened_or_replaced(
    run, out, capsys, kind
):
    path = out / NAMES[5]
    texts, pixels = read_texts(path), read_png(path)
    path.unlink()
    match kind:
        case "eps":
            Image.fromarray(pixels[..., 0]).save(path, format="EPS")
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case _:
            write_png(path, pixels.repeat(2, axis=0), texts)
    line = refusal(capsys, "--workdir", run, "--out", out, *REQUEST)
    told = {"eps": "not an image", "larger": "pixels: 8 x 16 there, 8 x 8 here"}
    assert NAMES[5] in line and told.get(kind, "wanted an image") in line
    if kind in ("pipe", "folder"):
        line = refusal(capsys, "--workdir", run, "--out", out, *REQUEST, "--overwrite")
        assert line.startswith("ldm sample: error: --overwrite: ") and path.exists()


def test_overwrite_replaces_only_images_that_differ(run, complete, out):
    picture(out / NAMES[1])
    (out / NAMES[4]).write_text("my notes")
    kept = snapshot(out)
    sample_here("--workdir", run, "--out", out, *REQUEST, "--overwrite")
    assert contents(out) == contents(complete)
    assert all(snapshot(out)[n] == kept[n] for n in NAMES if n not in NAMES[1:5:3])


def test_another_checkpoint_is_refused_and_a_moved_run_is_not(
    run, out, capsys, tmp_path
):
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    before = snapshot(out)
    sample_here("--workdir", moved, "--out", out, *REQUEST)
    assert {n: snapshot(out)[n] for n in NAMES} == {n: before[n] for n in NAMES}
    other = write_run(config_with(), tmp_path / "other", seed=1)
    line = refusal(capsys, "--workdir", other, "--out", out, *REQUEST)
    assert "was made differently (checkpoint: " in line


def cut(data):
    return data[:-30]


def flipped(data):
    return data[:-40] + bytes([data[-40] ^ 1]) + data[-39:]


def emptied(data):
    return b""


@pytest.mark.parametrize("harm", [cut, flipped, emptied])
def test_damaged_or_empty_image_is_sampled_again(run, complete, out, harm):
    path = out / NAMES[2]
    path.write_bytes(harm(path.read_bytes()))
    sample_here("--workdir", run, "--out", out, *REQUEST)
    assert contents(out) == contents(complete)


def test_image_cut_before_its_metadata_is_refused(run, out, capsys):
    path = out / NAMES[2]
    path.write_bytes(path.read_bytes()[:100])
    before = snapshot(out)
    line = refusal(capsys, "--workdir", run, "--out", out, *REQUEST)
    assert NAMES[2] in line and "--overwrite" in line
    assert snapshot(out) == before


def test_fifty_thousand_seeds_are_planned_in_two_seconds(run, monkeypatch, tmp_path):
    planned = []

    def planning_only(pipeline, specs):
        planned.extend(specs)
        raise KeyboardInterrupt

    monkeypatch.setattr(outputs, "sample_images", planning_only)
    args = ["--workdir", run, "--out", tmp_path, "--labels", "1", "--seeds", "0-49999"]
    start = time.process_time()
    with pytest.raises(KeyboardInterrupt):
        sample_here(*args)
    assert time.process_time() - start < 2.0
    assert len(planned) == 50_000 and planned[-1].seed == 49_999


def test_check_for_an_existing_image_decodes_no_pixel(complete, monkeypatch):
    def decoded(self):
        raise AssertionError("an image was decoded")

    path = complete / NAMES[0]
    metadata = read_texts(path)
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", decoded)
    assert outputs.is_made(path, metadata, overwrite=False)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_take_sampler_calls_in_turn(processes):
    num, size = 25, 2 * 3
    shares = []
    for index in range(processes):
        fields: dict[str, Any] = dict.fromkeys(Pipeline._fields)
        fields["model"] = build_model(config_with())._replace(chunk=3)
        fields["layout"] = SimpleNamespace(devices=[0, 1], platform="tpu")
        pipeline = Pipeline(**fields)
        shares.append(outputs.share(num, pipeline, (index, processes)))
    assert sorted(i for share in shares for i in share) == list(range(num))
    for index, share in enumerate(shares):
        assert share == sorted(share)
        assert {i // size % processes for i in share} == {index}


def test_trajectory_is_added_beside_existing_images(run, out):
    kept = snapshot(out)
    sample_here("--workdir", run, "--out", out, *REQUEST, "--trajectory")
    assert {n: snapshot(out)[n] for n in NAMES} == {n: kept[n] for n in NAMES}
    height, width, _ = read_png(out / "trajectory.png").shape
    assert (height, width) == (6 * 66 + 2, 3 * 66 + 2)


def test_several_processes_write_the_files_of_one(run, complete, tmp_path):
    for share_index in (1, 2):
        args = ["--workdir", run, "--out", tmp_path, *REQUEST]
        sample_here(*args, "--process", f"{share_index}/3")
    assert not (tmp_path / "grid.png").exists()
    assert not (tmp_path / NAMES[0]).exists()
    sample_here("--workdir", run, "--out", tmp_path, *REQUEST, "--process", "0/3")
    assert contents(tmp_path) == contents(complete)
