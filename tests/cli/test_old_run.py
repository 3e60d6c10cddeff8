"""A run from before: it goes on, samples, replays and exports as it did.

`fixtures/old_run/run.tar.xz` holds a run that was killed after 300 of the 400 steps of
its second stage, what it said when it was not killed, samples of both, and its weights
as they were exported; `expected.json` the commands, run beside the unpacked folders.
Of a checkpoint only what is read is kept, its arrays packed into one file.

Bits are promised for one processor and one set of versions. With those of the metadata
every pixel must be the same, and every digest. With others a pixel may be one grey
level off, and a run that went on is another run: that it ends is all that is asked.
"""

import contextlib
import hashlib
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
"""Its version may rise without another bit."""
SAME = re.compile(r": every one of \d+ pixels is the same")
DIFFERING = re.compile(r"pixels differ, by at most (\d+) grey levels")
MOST_APART = 1
"""Grey levels, where the processor or the versions are others."""
pytestmark = pytest.mark.skipif(
    "LDM_JAX_AS_SHIPPED" not in os.environ, reason="bits of optimised programs"
)


def every(kind: str) -> list[str]:
    """List the recorded commands of a kind."""
    return list(EXPECTED[kind])


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """The folder as it was unpacked: a run that was stopped."""
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(FIXTURE / "run.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def resumed(old, tmp_path_factory):
    """Another folder, in which it went on to its end."""
    folder = tmp_path_factory.mktemp("resumed") / "old"
    shutil.copytree(old, folder)
    flags = ("--config", "--workdir")
    args = [x if x in flags else folder / x for x in EXPECTED["resume"]]
    said = succeeded(run("train.py", *args))
    assert "finished:" in said
    return folder


def read_texts(path: Path) -> dict[str, str]:
    with Image.open(path) as picture:
        return dict(getattr(picture, "text", {}))


def known_versions() -> bool:
    return all(version(name) == v for name, v in EXPECTED["versions"].items())


def promised(made: dict[str, str], recorded: dict[str, str]) -> bool:
    """Return whether two images with this metadata must have equal bits."""
    versions = [json.loads(texts["versions"]) for texts in (made, recorded)]
    ours, theirs = ({k: v for k, v in each.items() if k != OURS} for each in versions)
    return made["platform"] == recorded["platform"] and ours == theirs


def parts(texts: dict[str, str], *, hidden: tuple[str, ...]) -> dict[str, str]:
    return {k: v for k, v in texts.items() if k not in hidden}


def compare(made: Path, recorded: Path, *, same_weights: bool) -> None:
    """Assert that an image is what it was: its texts, and its pixels as promised."""
    texts = [read_texts(path) for path in (made, recorded)]
    pixels = [read_png(path).astype(int) for path in (made, recorded)]
    assert pixels[0].shape == pixels[1].shape
    if "settings" not in texts[1]:  # a sheet of several
        assert texts[0] == texts[1] == {}
        beside = (path.with_name("000000.png") for path in (made, recorded))
        exact = promised(*map(read_texts, beside))
    else:
        exact = promised(*texts)
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
    """Give a recorded command again, and compare all that it wrote."""
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
    """Make images of a recorded command again from their recipes: each, or one."""
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


def test_the_files_are_what_they_were(old):
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
def test_a_checkpoint_of_before_is_sampled_as_before(old, tmp_path, name):
    check_command(old, tmp_path / "out", "stopped", name)


@pytest.mark.parametrize("name", every("stopped"))
def test_an_image_of_before_is_made_again(old, capsys, name):
    check_replay(old, capsys, "stopped", name)


def test_an_image_of_before_is_made_again_with_its_run_elsewhere(old, capsys, tmp_path):
    """From a folder where no path of the recipe leads anywhere."""
    paths = {name: old / f"pictures/{name}.png" for name in ("image", "mask")}
    args = [x for name, path in paths.items() for x in (f"--{name}", path)]
    with contextlib.chdir(tmp_path):
        path = old / "samples/mask/000001.png"
        args = ["--workdir", old / "runs/old", *args]
        check_one_replay(path, capsys, *args, same_weights=True)


@pytest.mark.parametrize("name", every("weights"))
def test_weights_of_before_are_sampled_as_before(old, tmp_path, name):
    check_command(old, tmp_path / "out", "weights", name)


@pytest.mark.parametrize("name", every("weights"))
def test_an_image_of_weights_is_made_again(old, capsys, name):
    check_replay(old, capsys, "weights", name)


def rows(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [parts(json.loads(line), hidden=("images_per_second",)) for line in lines]


def final(folder: Path) -> dict:
    return json.loads((folder / "final.json").read_text())


def goes_on_exactly(resumed: Path) -> bool:
    ours, theirs = (final(resumed / "runs" / x) for x in ("old", "whole"))
    return ours["trained_on"] == theirs["trained_on"] and known_versions()


def test_a_run_of_before_goes_on_to_the_end_of_one_that_was_not_stopped(resumed):
    ours, theirs = (resumed / "runs" / x for x in ("old", "whole"))
    assert final(theirs)["digest"] == EXPECTED["digest"]
    assert final(ours).keys() == final(theirs).keys()
    assert final(ours)["config_digest"] == final(theirs)["config_digest"]
    assert [row.keys() for row in rows(ours)] == [row.keys() for row in rows(theirs)]
    if goes_on_exactly(resumed):
        timed = ("seconds_by_stage",)
        left, right = (parts(final(run), hidden=timed) for run in (ours, theirs))
        assert left == right
        assert rows(ours) == rows(theirs)


@pytest.mark.parametrize("name", every("finished"))
def test_when_it_has_gone_on_it_is_sampled_as_before(resumed, tmp_path, name):
    check_command(resumed, tmp_path / "out", "finished", name, same_weights=False)


@pytest.mark.parametrize("name", every("finished"))
def test_when_it_has_gone_on_its_images_are_made_again(resumed, capsys, name):
    check_replay(resumed, capsys, "finished", name, same_weights=False)


@pytest.mark.parametrize("name", EXPECTED["exports"])
def test_when_it_has_gone_on_it_is_exported_as_before(resumed, tmp_path, name):
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
    if goes_on_exactly(resumed):
        assert digests == wanted
