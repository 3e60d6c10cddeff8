"""A run of an earlier version resumes, samples, replays and exports as it did then.

`fixtures/old_run/run.tar.xz` holds a run that was killed after 300 of the 400 steps of
its second stage, the records of the same run without a kill, samples of both, and
exported weights; `expected.json` lists the commands, run beside the unpacked folders.
A checkpoint has only the files that are read, its arrays packed into one file.

Equal bits are required on the processor and with the versions of the metadata: then all
pixels and digests must be equal. Otherwise a pixel may differ by one grey level, and a
resumed run only has to end.
"""

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import tarfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm_jax.images import read_png
from tests.support.commands import ldm_here, run, sample_here, succeeded

FIXTURE = Path(__file__).parents[1] / "fixtures/old_run"
EXPECTED = json.loads((FIXTURE / "expected.json").read_text())
OURS = "ldm_jax"
"""The package whose version may differ where bits are equal."""
SAME = re.compile(r": every one of \d+ pixels is the same")
DIFFERING = re.compile(r"pixels differ, by at most (\d+) grey levels")
BY_HAND = ("--weights", "--image", "--mask")
"""Flags of what metadata alone may not choose."""
MOST_APART = 1
"""Grey levels, on another processor or with other versions."""
pytestmark = pytest.mark.skipif(
    "LDM_JAX_AS_SHIPPED" not in os.environ, reason="bits of optimised programs"
)


def every(kind: str) -> list[str]:
    """List the recorded commands of a kind."""
    return list(EXPECTED[kind])


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """The unpacked folder, with an interrupted run."""
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(FIXTURE / "run.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def resumed(old, tmp_path_factory):
    """A copy of the folder, in which the run was resumed to its end."""
    folder = tmp_path_factory.mktemp("resumed") / "old"
    shutil.copytree(old, folder)
    flags = ("--config", "--workdir")
    args = [x if x in flags else folder / x for x in EXPECTED["resume"]]
    output = succeeded(run("train.py", *args))
    assert "finished:" in output
    return folder


def read_texts(path: Path) -> dict[str, str]:
    with Image.open(path) as picture:
        return dict(getattr(picture, "text", {}))


def known_versions() -> bool:
    return all(version(name) == v for name, v in EXPECTED["versions"].items())


def must_have_equal_bits(made: dict[str, str], recorded: dict[str, str]) -> bool:
    """Return whether two images with this metadata must have equal bits."""
    versions = [json.loads(texts["versions"]) for texts in (made, recorded)]
    ours, theirs = ({k: v for k, v in each.items() if k != OURS} for each in versions)
    return made["platform"] == recorded["platform"] and ours == theirs


def parts(texts: dict[str, str], *, hidden: tuple[str, ...]) -> dict[str, str]:
    return {k: v for k, v in texts.items() if k not in hidden}


def compare(made: Path, recorded: Path, *, same_weights: bool) -> None:
    """Assert that an image has the recorded metadata and pixels."""
    texts = [read_texts(path) for path in (made, recorded)]
    pixels = [read_png(path).astype(int) for path in (made, recorded)]
    assert pixels[0].shape == pixels[1].shape
    if "settings" not in texts[1]:  # a grid of samples
        assert texts[0] == texts[1] == {}
        beside = (path.with_name("000000.png") for path in (made, recorded))
        exact = must_have_equal_bits(*map(read_texts, beside))
    else:
        exact = must_have_equal_bits(*texts)
        hidden = ("platform", "versions", *([] if same_weights else ["checkpoint"]))
        ours, theirs = (parts(t, hidden=() if exact else hidden) for t in texts)
        if exact:
            ours, theirs = (
                {**t, "versions": parts(json.loads(t["versions"]), hidden=(OURS,))}
                for t in (ours, theirs)
            )
        assert ours == theirs
        assert list(ours) == list(theirs)
    if exact:
        assert np.array_equal(*pixels)
    elif same_weights:
        assert np.abs(pixels[0] - pixels[1]).max() <= MOST_APART


def check_command(folder, made, kind, name, *, same_weights=True):
    """Run a recorded command again, and compare all images."""
    recorded = EXPECTED[kind][name]
    args = list(recorded["args"])
    place = args.index("--out") + 1
    out, args[place] = folder / args[place], made
    with contextlib.chdir(folder):
        sample_here(*args)
    names = {Path(path).name for path in recorded["pixels_sha256"]}
    assert {path.name for path in made.iterdir()} == names | {"grid.png"}
    for file in sorted(names):
        compare(made / file, out / file, same_weights=same_weights)


def check_replay(folder, capsys, kind, name, *args, same_weights=True):
    """Replay every image of a recorded command.

    Files outside the run's folder are given by hand, as in the command.
    """
    given = EXPECTED[kind][name]["args"]
    pairs = itertools.pairwise(given)
    args = (*args, *(x for pair in pairs if pair[0] in BY_HAND for x in pair))
    paths = [Path(path) for path in EXPECTED[kind][name]["pixels_sha256"]]
    paths = [path for path in paths if path.stem.isdigit()]
    for path in paths:
        capsys.readouterr()
        with contextlib.chdir(folder):
            check_one_replay(path, capsys, *args, same_weights=same_weights)


def check_one_replay(path, capsys, *args, same_weights):
    try:
        sample_here("--replay", path, *args)
    except Exception as error:
        assert (found := DIFFERING.search(str(error))), error
        known = known_versions() and "platform: " not in capsys.readouterr().err
        assert not known, error
        assert int(found[1]) <= MOST_APART or not same_weights, error
    else:
        assert SAME.search(capsys.readouterr().out)


def test_old_files_have_their_recorded_digests(old):
    for kind in ("stopped", "finished", "weights"):
        for recorded in EXPECTED[kind].values():
            for path, digest in recorded["pixels_sha256"].items():
                pixels = read_png(old / path)
                pixels = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
                head = f"{pixels.shape} {pixels.dtype}".encode()
                assert hashlib.sha256(head + pixels.tobytes()).hexdigest() == digest
    for path, digest in EXPECTED["exported_sha256"].items():
        assert hashlib.sha256((old / path).read_bytes()).hexdigest() == digest


@pytest.mark.parametrize("name", every("stopped"))
def test_an_old_checkpoint_gives_its_recorded_samples(old, tmp_path, name):
    check_command(old, tmp_path / "out", "stopped", name)


@pytest.mark.parametrize("name", every("stopped"))
def test_replay_reproduces_an_old_image(old, capsys, name):
    check_replay(old, capsys, "stopped", name)


def test_replay_reproduces_an_old_image_with_its_run_elsewhere(old, capsys, tmp_path):
    """Replay in a folder where the paths of the metadata do not exist."""
    paths = {name: old / f"pictures/{name}.png" for name in ("image", "mask")}
    args = [x for name, path in paths.items() for x in (f"--{name}", path)]
    with contextlib.chdir(tmp_path):
        path = old / "samples/mask/000001.png"
        args = ["--workdir", old / "runs/old", *args]
        check_one_replay(path, capsys, *args, same_weights=True)


@pytest.mark.parametrize("name", every("weights"))
def test_old_weights_give_their_recorded_samples(old, tmp_path, name):
    check_command(old, tmp_path / "out", "weights", name)


@pytest.mark.parametrize("name", every("weights"))
def test_replay_reproduces_an_image_of_old_weights(old, capsys, name):
    check_replay(old, capsys, "weights", name)


def rows(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [parts(json.loads(line), hidden=("images_per_second",)) for line in lines]


def final(folder: Path) -> dict:
    return json.loads((folder / "final.json").read_text())


def resumes_exactly(resumed: Path) -> bool:
    ours, theirs = (final(resumed / "runs" / x) for x in ("old", "whole"))
    return ours["trained_on"] == theirs["trained_on"] and known_versions()


def test_an_old_run_resumes_to_the_end_of_the_unbroken_run(resumed):
    ours, theirs = (resumed / "runs" / x for x in ("old", "whole"))
    assert final(theirs)["digest"] == EXPECTED["digest"]
    assert final(ours).keys() == final(theirs).keys()
    assert final(ours)["config_digest"] == final(theirs)["config_digest"]
    assert [row.keys() for row in rows(ours)] == [row.keys() for row in rows(theirs)]
    if resumes_exactly(resumed):
        timed = ("seconds_by_stage",)
        left, right = (parts(final(run), hidden=timed) for run in (ours, theirs))
        assert left == right
        assert rows(ours) == rows(theirs)


@pytest.mark.parametrize("name", every("finished"))
def test_a_resumed_old_run_gives_its_recorded_samples(resumed, tmp_path, name):
    check_command(resumed, tmp_path / "out", "finished", name, same_weights=False)


@pytest.mark.parametrize("name", every("finished"))
def test_replay_reproduces_images_of_a_resumed_old_run(resumed, capsys, name):
    check_replay(resumed, capsys, "finished", name, same_weights=False)


@pytest.mark.parametrize("name", EXPECTED["exports"])
def test_a_resumed_old_run_exports_the_recorded_files(resumed, tmp_path, name):
    args = list(EXPECTED["exports"][name])
    args[args.index("export") + 1] = "runs/old"
    place = args.index("--out") + 1
    written, args[place] = args[place], str(tmp_path / Path(args[place]).name)
    with contextlib.chdir(resumed):
        ldm_here(*args)
    wanted = {
        Path(path).relative_to(Path(written).parent): digest
        for path, digest in EXPECTED["exported_sha256"].items()
        if path.startswith(written)
    }
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    digests = {
        path.relative_to(tmp_path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }
    assert digests.keys() == wanted.keys()
    if resumes_exactly(resumed):
        assert digests == wanted
