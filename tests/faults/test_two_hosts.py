"""Commands in two processes give the numbers of one; differing configs are refused."""

import json
import os
import shutil
import socket
import subprocess

import numpy as np
import pytest

from ldm_jax.evaluation.features import read_reference
from ldm_jax.training.metrics import read_metrics
from tests.support.commands import (
    LDM,
    TIMEOUT,
    TINY,
    error_line,
    start,
    succeeded,
    train,
)

TORTURE = int(os.environ.get("LDM_JAX_KILLS", "0")) > 20
FLAGS = ("--diffusion.steps", 20, "--log.images-every", 100)
SCORED = ("--scores.every", 10, "--scores.images", 300, "--scores.steps", 2)


def ended(processes):
    """Wait for processes; return the exit code and output of each."""
    outputs = [process.communicate(timeout=TIMEOUT) for process in processes]
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *output)
        for process, output in zip(processes, outputs, strict=True)
    ]


def start_two(command, *flags, second_flags=()):
    """Start a command in two processes of four devices, the second with more flags."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    together = ("--coordinator", f"localhost:{port}", "--num-processes", 2)
    return [
        start(*LDM, command, *flags, *together, "--process-id", this, *extra, devices=4)
        for this, extra in enumerate([(), second_flags])
    ]


def start_two_trainings(workdir, *flags, second_flags=()):
    flags = ("--config", TINY, "--workdir", workdir, *flags)
    return start_two("train", *flags, second_flags=second_flags)


def losses(workdir):
    rows = read_metrics(workdir / "metrics.jsonl")
    return [(r["stage"], r["step"], r["loss"]) for r in rows if "loss" in r]


def scores(workdir):
    return [r for r in read_metrics(workdir / "metrics.jsonl") if "fid" in r]


def real_statistics(workdir):
    (path,) = (workdir / "evaluation").glob("real_*.npz")
    return read_reference(path)


@pytest.fixture(scope="module")
def run_of_one(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("one") / "run"
    succeeded(train(workdir, *FLAGS, *SCORED, devices=8))
    return workdir


@pytest.fixture(scope="module")
def losses_of_one(run_of_one):
    return losses(run_of_one)


@pytest.mark.parametrize("layout", ["pmap", "fsdp"] if TORTURE else ["fsdp"])
def test_two_hosts_have_the_losses_and_scores_of_one(
    tmp_path, run_of_one, losses_of_one, layout
):
    flags = (*FLAGS, *SCORED, "--parallel.layout", layout)
    # The classifier is copied; both processes measure the real images again.
    shutil.copytree(
        run_of_one / "evaluation",
        tmp_path / "run" / "evaluation",
        ignore=shutil.ignore_patterns("real_*"),
    )
    for done in ended(start_two_trainings(tmp_path / "run", *flags)):
        succeeded(done)
    here, there = map(real_statistics, (tmp_path / "run", run_of_one))
    assert here.provenance == there.provenance
    np.testing.assert_array_equal(here.pooled.mean, there.pooled.mean)
    np.testing.assert_array_equal(here.pooled.covariance, there.pooled.covariance)
    np.testing.assert_array_equal(here.features, there.features)
    assert not list((tmp_path / "run" / "evaluation").glob("share_*"))
    # Both processes drew: 300 images are two feature files, one of each process.
    ours, theirs = scores(tmp_path / "run"), scores(run_of_one)
    assert [one["step"] for one in ours] == [10, 20]
    for here, there in zip(ours, theirs, strict=True):
        assert here["fid"] == pytest.approx(there["fid"], rel=1e-3)
    found = losses(tmp_path / "run")
    assert len(found) >= 20
    assert [row[:2] for row in found] == [row[:2] for row in losses_of_one]
    for (_, _, here), (_, _, there) in zip(found, losses_of_one, strict=True):
        assert here == pytest.approx(there, rel=1e-5)


def test_two_hosts_share_an_evaluation(run_of_one, tmp_path):
    flags = ("--workdir", run_of_one, "--num-images", 300, "--steps", 2)
    out = ("--out", tmp_path / "out")
    shutil.copytree(run_of_one / "evaluation", tmp_path / "out")
    for done in ended(start_two("evaluate", *flags, *out)):
        succeeded(done)
    (path,) = (tmp_path / "out").glob("*/metrics.json")
    assert len(list(path.parent.glob("features_*.npz"))) == 2
    found, wanted = json.loads(path.read_text())["scores"], scores(run_of_one)[-1]
    for name, value in found.items():
        assert value is None or value == wanted[name], name


def test_hosts_with_different_configs_name_the_difference_and_write_nothing(tmp_path):
    workdir, other = tmp_path / "run", ("--diffusion.optim.lr", 0.5)
    for done in ended(start_two_trainings(workdir, second_flags=other)):
        line = error_line(done)
        assert "diffusion.optim.lr" in line and "0.5" in line and "process 1" in line
    assert not list(workdir.rglob("*.json*"))
