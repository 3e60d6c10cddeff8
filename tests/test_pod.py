"""Two processes as one run, as the documentation says to start them."""

import re
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest

from ldm_jax.config import ParallelConfig
from ldm_jax.training.parallel import make_layout
from tests.commands import ROOT, environment
from tests.toys import run_toy, toy_stage

TIMEOUT = 120


def pair(workdir, layout, num_steps, *args):
    """Start both processes, four devices each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.pod_worker", workdir, layout]
            + [str(num_steps), f"localhost:{port}", "2", str(this), *map(str, args)],
            cwd=ROOT,
            env=environment(devices=4),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for this in range(2)
    ]


def ended(processes):
    outputs = [process.communicate(timeout=TIMEOUT) for process in processes]
    return [
        (process.returncode, out, err)
        for process, (out, err) in zip(processes, outputs, strict=True)
    ]


def digest_of(output):
    return re.search(r"digest (\w+)", output)[1]


def wait_for_step(process, step):
    for line in process.stdout:
        if line.startswith("step ") and int(line.split()[1]) >= step:
            return
    raise AssertionError(process.stderr.read())


@pytest.mark.parametrize("layout", ["pmap", "fsdp"])
def test_two_processes_are_one_run_and_stop_together_when_one_is_told_to(
    tmp_path, layout
):
    parallel = ParallelConfig(layout=layout)
    whole = run_toy(tmp_path / "one", toy_stage(num_steps=200), parallel=parallel)
    workdir = tmp_path / "two"
    first, second = pair(workdir, layout, 200, 0.1)
    wait_for_step(first, 5)
    second.send_signal(signal.SIGTERM)
    told = time.monotonic()
    found = ended([first, second])
    assert time.monotonic() - told < 30
    assert [code for code, _, _ in found] == [75, 75], found
    saved = [re.search(r"diffusion step (\d+) is saved", err)[1] for _, _, err in found]
    assert saved[0] == saved[1]
    found = ended(pair(workdir, layout, 200))
    assert [code for code, _, _ in found] == [0, 0], found
    assert {digest_of(out) for _, out, _ in found} == {whole.digest}
    steps = [int(n) for n in re.findall(r"step (\d+)", found[0][1])]
    assert steps == list(range(int(saved[0]) + 1, 201))


def test_a_layout_is_what_its_name_says():
    for name in ("pmap", "fsdp"):
        layout = make_layout(ParallelConfig(layout=name))
        assert type(layout).__name__.lower() == f"{name}layout"
        assert layout.num_devices == jax.device_count()
