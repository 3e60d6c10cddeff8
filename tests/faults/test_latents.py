"""Latent caches: killed while written, written by two hosts, used by a resumed run."""

import json
import signal
import socket
import time

import pytest

from tests.faults.test_two_hosts import TORTURE, ended
from tests.support.commands import LDM, TINY, error_line, run, start, succeeded, train

COMMAND = (*LDM, "cache-latents")
FLAGS = ("--diffusion.steps", 20, "--log.images-every", 100)


def make(*args, devices=1):
    return run(*COMMAND, *args, devices=devices)


def start_make(*args, devices=1):
    return start(*COMMAND, *args, devices=devices)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def losses(workdir):
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows if row["stage"] == "diffusion"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, and its cache, which one process made without interruption."""
    folder = tmp_path_factory.mktemp("finished")
    succeeded(train(folder / "run", *FLAGS))
    output = succeeded(make("--workdir", folder / "run", "--out", folder / "latents"))
    assert "16 of 16 shards made now" in output
    return folder


def test_a_cache_killed_and_resumed_has_the_bytes_of_an_unbroken_one(
    finished, tmp_path
):
    out, kills = tmp_path / "latents", 0
    flags = ("--workdir", finished / "run", "--out", out, "--batch", 1)
    for wanted in (2, 6, 11):
        process = start_make(*flags)
        while len(list(out.glob("*.array_record"))) < wanted and process.poll() is None:
            time.sleep(0.01)
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    assert kills
    train_flags = ("--first-stage", finished / "run", "--data.latents", out)
    line = error_line(train(tmp_path / "run", *train_flags))
    assert "is not finished; give the same command of" in line
    assert not (tmp_path / "run").exists()
    assert "finished" in succeeded(make(*flags))
    assert contents(out) == contents(finished / "latents")
    assert "nothing left to write" in succeeded(make(*flags))


def test_a_cache_of_two_hosts_has_the_bytes_of_one_also_after_a_kill(
    finished, tmp_path
):
    out = tmp_path / "latents"

    def start_both():
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        flags = ("--workdir", finished / "run", "--out", out, "--batch", 1)
        flags += ("--coordinator", f"localhost:{port}", "--num-processes", 2)
        flags += ("--compilation-cache", "none")
        return [start_make(*flags, "--process-id", i, devices=4) for i in range(2)]

    first, second = start_both()
    while not list(out.glob("*.array_record")) and second.poll() is None:
        time.sleep(0.01)
    second.kill()
    first.kill()  # it would wait for the heartbeat timeout
    ended([first, second])
    for done in ended(start_both()):
        succeeded(done)
    assert contents(out) == contents(finished / "latents")


@pytest.mark.skipif(not TORTURE, reason="make torture")
def test_a_run_started_on_images_resumes_on_latents(finished, tmp_path):
    workdir = tmp_path / "run"
    started = start(*LDM, "train", "--config", TINY, "--workdir", workdir, *FLAGS)
    while not (workdir / "diffusion/checkpoints/4").exists():
        assert started.poll() is None
        time.sleep(0.01)
    started.send_signal(signal.SIGTERM)
    started.communicate()
    out = workdir / "latents"
    succeeded(make("--workdir", workdir, "--out", out))
    cached = ("--data.latents", out)
    assert "finished" in succeeded(train(workdir, *FLAGS, *cached, devices=4))
    found, wanted = losses(workdir), losses(finished / "run")
    assert list(found) == list(wanted) == list(range(1, 21))
    assert found == pytest.approx(wanted, rel=1e-5)


def test_losses_on_latents_are_equal_under_fsdp_and_accumulation(finished, tmp_path):
    flags = (*FLAGS, "--first-stage", finished / "run")
    flags += ("--data.latents", finished / "latents", "--parallel.layout", "fsdp")
    flags += ("--parallel.accumulate", 2, "--parallel.steps-per-dispatch", 3)
    succeeded(train(tmp_path / "run", *flags, devices=4))
    assert losses(tmp_path / "run") == pytest.approx(losses(finished / "run"), rel=1e-5)
