"""The commands of docs/how_to/pods.md for two processes on one machine."""

import json
import os
import re
import socket
import subprocess
import sys

from tests.support.commands import ROOT, TIMEOUT, environment, ldm, succeeded


def test_documented_commands_of_two_processes_train_and_sample(tmp_path):
    text = (ROOT / "docs/how_to/pods.md").read_text()
    block = text[text.index("Two processes on this machine:\n") :].split("\n\n")[1]
    lines = re.sub(r"(?m)^    ", "", block)
    assert len(lines.splitlines()) == 6
    with socket.socket() as free:
        free.bind(("localhost", 0))
        lines = lines.replace("12345", str(free.getsockname()[1]))
    few = ("--autoencoder.steps", "20", "--diffusion.steps", "20")
    lines = lines.replace("--config digits", f"--config digits {' '.join(few)}")
    lines = lines.replace("runs/digits", str(tmp_path / "run"))
    lines = lines.replace(
        "runs/samples", f"{tmp_path / 'samples'} --steps 2 --seeds 0-1"
    )
    done = subprocess.run(
        ["bash", "-c", f"set -e\nset -x\n{lines}"],
        cwd=ROOT,
        env={
            **environment(devices=2),
            "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
        },
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("finished:") == 1
    digest = json.loads((tmp_path / "run/final.json").read_text())["digest"]
    assert f"digest {digest}" in done.stdout
    assert len(list((tmp_path / "samples").glob("0*.png"))) == 20
    # Of two devices, each process uses one: the digits have two shards.
    alone = ("--config", "digits", *few, "--workdir", tmp_path / "alone")
    assert f"digest {digest}" in succeeded(ldm("train", *alone))
