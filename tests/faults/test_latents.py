"""A cache of latents, struck while it is made, made by two hosts, begun with late."""

import json
import signal
import socket
import time

import pytest

from tests.faults.test_two_hosts import TORTURE, ended
from tests.support.commands import LDM, TINY, error_line, run, start, succeeded, train

MAKER = (*LDM, "cache-latents")
FLAGS = ("--diffusion.steps", 20, "--log.images-every", 100)


def make(*args, devices=1):
    return run(*MAKER, *args, devices=devices)


def start_maker(*args, devices=1):
    return start(*MAKER, *args, devices=devices)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def losses(workdir):
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows if row["stage"] == "diffusion"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run, and its cache made by one process without interruption."""
    folder = tmp_path_factory.mktemp("finished")
    succeeded(train(folder / "run", *FLAGS))
    said = succeeded(make("--workdir", folder / "run", "--out", folder / "latents"))
    assert "16 of 16 shards made now" in said
    return folder


def test_killed_again_and_again_a_cache_is_the_bytes_of_one_made_at_once(
    finished, tmp_path
):
    out, kills = tmp_path / "latents", 0
    asked = ("--workdir", finished / "run", "--out", out, "--batch", 1)
    for wanted in (2, 6, 11):
        maker = start_maker(*asked)
        while len(list(out.glob("*.array_record"))) < wanted and maker.poll() is None:
            time.sleep(0.01)
        maker.kill()
        maker.communicate()
        kills += maker.returncode == -signal.SIGKILL
    assert kills
    asked_of_train = ("--first-stage", finished / "run", "--data.latents", out)
    line = error_line(train(tmp_path / "run", *asked_of_train))
    assert "is not finished; give the same command of" in line
    assert not (tmp_path / "run").exists()
    assert "finished" in succeeded(make(*asked))
    assert contents(out) == contents(finished / "latents")
    assert "nothing left to write" in succeeded(make(*asked))


def test_two_hosts_make_the_bytes_of_one_also_when_one_is_killed(finished, tmp_path):
    out = tmp_path / "latents"

    def both():
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        asked = ("--workdir", finished / "run", "--out", out, "--batch", 1)
        asked += ("--coordinator", f"localhost:{port}", "--num-processes", 2)
        asked += ("--compilation-cache", "none")
        return [start_maker(*asked, "--process-id", i, devices=4) for i in range(2)]

    first, second = both()
    while not list(out.glob("*.array_record")) and second.poll() is None:
        time.sleep(0.01)
    second.kill()
    first.kill()  # it would wait as long as a process may be silent
    ended([first, second])
    for done in ended(both()):
        succeeded(done)
    assert contents(out) == contents(finished / "latents")


@pytest.mark.skipif(not TORTURE, reason="make torture")
def test_a_run_begun_on_images_goes_on_from_latents(finished, tmp_path):
    workdir = tmp_path / "run"
    begun = start(*LDM, "train", "--config", TINY, "--workdir", workdir, *FLAGS)
    while not (workdir / "diffusion/checkpoints/4").exists():
        assert begun.poll() is None
        time.sleep(0.01)
    begun.send_signal(signal.SIGTERM)
    begun.communicate()
    out = workdir / "latents"
    succeeded(make("--workdir", workdir, "--out", out))
    cached = ("--data.latents", out)
    assert "finished" in succeeded(train(workdir, *FLAGS, *cached, devices=4))
    found, wanted = losses(workdir), losses(finished / "run")
    assert list(found) == list(wanted) == list(range(1, 21))
    assert found == pytest.approx(wanted, rel=1e-5)


def test_latents_are_learned_from_by_every_layout(finished, tmp_path):
    asked = (*FLAGS, "--first-stage", finished / "run")
    asked += ("--data.latents", finished / "latents", "--parallel.layout", "fsdp")
    asked += ("--parallel.accumulate", 2, "--parallel.steps-per-dispatch", 3)
    succeeded(train(tmp_path / "run", *asked, devices=4))
    assert losses(tmp_path / "run") == pytest.approx(losses(finished / "run"), rel=1e-5)
