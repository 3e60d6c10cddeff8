"""A run with exact sums ends in one digest on any number of devices and processes."""

import signal
import socket

import pytest

from tests.support.commands import LDM, TINY, digests, start, succeeded, train

# Several steps a dispatch need rare logs.
FLAGS = (
    *("--parallel.reduction", "exact", "--checkpoint.every", 4),
    *("--log.every", 4, "--log.images-every", 8),
)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The digests of the run on one device."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    succeeded(train(workdir, *FLAGS))
    return digests(workdir)


@pytest.mark.parametrize(
    ("devices", "flags"),
    [
        (8, ()),
        (2, ("--parallel.steps-per-dispatch", 4)),
        (4, ("--parallel.layout", "fsdp", "--parallel.steps-per-dispatch", 4)),
        (8, ("--data.latents", "own")),
        (2, ("--parallel.layout", "fsdp", "--data.latents", "own")),
    ],
)
def test_one_digest_on_any_number_of_devices(devices, flags, alone, tmp_path):
    succeeded(train(tmp_path / "run", *FLAGS, *flags, devices=devices))
    assert digests(tmp_path / "run") == alone


KILLED = """
import os, signal
from ldm_jax.cli.main import main
from ldm_jax.training.checkpoint import CheckpointStore

save = CheckpointStore.save

def killed(self, step, *args):
    if step == 8:
        self.wait()
        os.kill(os.getpid(), signal.SIGKILL)
    return save(self, step, *args)

CheckpointStore.save = killed
main()
"""


def test_a_run_killed_on_eight_devices_goes_on_with_two(alone, tmp_path):
    args = ("--config", TINY, "--workdir", tmp_path / "run", *FLAGS)
    process = start("-c", KILLED, "train", *args, devices=8)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    kept = tmp_path / "run" / "diffusion" / "checkpoints"
    assert (kept / "4").is_dir() and not (kept / "8").exists()
    succeeded(train(tmp_path / "run", *FLAGS, devices=2))
    assert digests(tmp_path / "run") == alone


@pytest.mark.parametrize(("devices", "layout"), [(1, "pmap"), (2, "fsdp"), (4, "pmap")])
def test_two_processes_have_the_digest_of_one(devices, layout, alone, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    args = (*LDM, "train", "--config", TINY, "--workdir", tmp_path / "run", *FLAGS)
    args = (*args, "--parallel.layout", layout)
    join = ("--coordinator", f"localhost:{port}", "--num-processes", 2)
    processes = [
        start(*args, *join, "--process-id", i, devices=devices) for i in range(2)
    ]
    found = [(*process.communicate(), process.returncode) for process in processes]
    assert [code for _, _, code in found] == [0, 0], found
    assert digests(tmp_path / "run") == alone
