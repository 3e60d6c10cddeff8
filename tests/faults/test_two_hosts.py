"""The commands in two processes: the numbers of one, and no step where they differ."""

import json
import os
import socket
import subprocess

import pytest

from tests.commands import TIMEOUT, TINY, error_line, start, succeeded, train

TORTURE = int(os.environ.get("LDM_JAX_KILLS", "0")) > 20
FLAGS = ("--diffusion.steps", 20, "--log.images-every", 100)


def ended(processes):
    """Wait for processes, and return how each ended."""
    outputs = [process.communicate(timeout=TIMEOUT) for process in processes]
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *output)
        for process, output in zip(processes, outputs, strict=True)
    ]


def two_of_train(workdir, *flags, of_the_second=()):
    """Start train.py in two processes of four devices, the second with more flags."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    together = ("--coordinator", f"localhost:{port}", "--num-processes", 2)
    flags = ("--config", TINY, "--workdir", workdir, *flags, *together)
    return [
        start("train.py", *flags, "--process-id", this, *extra, devices=4)
        for this, extra in enumerate([(), of_the_second])
    ]


def losses(workdir):
    rows = (workdir / "metrics.jsonl").read_text().splitlines()
    return [(row["stage"], row["step"], row["loss"]) for row in map(json.loads, rows)]


@pytest.fixture(scope="module")
def of_one(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("one") / "run"
    succeeded(train(workdir, *FLAGS, devices=8))
    return losses(workdir)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("layout", ["pmap", "fsdp"] if TORTURE else ["fsdp"])
def test_two_hosts_have_the_losses_of_one(tmp_path, of_one, layout):
    flags = (*FLAGS, "--parallel.layout", layout)
    for done in ended(two_of_train(tmp_path / "run", *flags)):
        succeeded(done)
    found = losses(tmp_path / "run")
    assert len(found) >= 20
    assert [row[:2] for row in found] == [row[:2] for row in of_one]
    for (_, _, here), (_, _, there) in zip(found, of_one, strict=True):
        assert here == pytest.approx(there, rel=1e-5)


@pytest.mark.timeout(600)
def test_hosts_with_different_configs_name_the_difference_and_write_nothing(tmp_path):
    workdir, other = tmp_path / "run", ("--diffusion.optim.lr", 0.5)
    for done in ended(two_of_train(workdir, of_the_second=other)):
        line = error_line(done)
        assert "diffusion.optim.lr" in line and "0.5" in line and "process 1" in line
    assert not list(workdir.rglob("*.json*"))
