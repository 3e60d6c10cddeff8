"""Start one or two processes that run the toy stage, and collect their outputs."""

import re
import socket
import subprocess
import sys

from tests.support.commands import ROOT, environment

TIMEOUT = 1800
MOST_STEPS = 80
"""Made after SIGTERM, of 0.1 s each: JAX looks for the signal once a second, and asks
the other processes then."""


def pair(workdir, layout, num_steps, *args):
    """Start both processes, four devices each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.support.pod_worker", workdir, layout]
            + [str(num_steps), f"localhost:{port}", "2", str(this), *map(str, args)],
            cwd=ROOT,
            env=environment(devices=4),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for this in range(2)
    ]


def alone(workdir, num_steps, *args):
    """Start one process with four devices."""
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "tests.support.pod_worker",
            workdir,
            "pmap",
            str(num_steps),
        ]
        + ["none", "1", "0", *map(str, args)],
        cwd=ROOT,
        env=environment(devices=4),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(processes):
    try:
        outputs = [process.communicate(timeout=TIMEOUT) for process in processes]
    finally:
        for process in processes:
            process.kill()  # no effect on an ended process
    return [
        (process.returncode, out, err)
        for process, (out, err) in zip(processes, outputs, strict=True)
    ]


def digest_of(output):
    return re.search(r"digest (\w+)", output)[1]


def wait_for_step(process, step):
    """Wait until a process has printed a step or a later one; return which."""
    for line in process.stdout:
        if line.startswith("step ") and int(line.split()[1]) >= step:
            return int(line.split()[1])
    raise AssertionError(process.stderr.read())
