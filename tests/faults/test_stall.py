"""A hanging step prints its stack; a non-finite step is logged with its examples.

python -m tests.faults.test_stall WORKDIR is a run whose disk hangs once, until the
file of its standard error shows the stacks twice.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from ldm_jax import build
from ldm_jax.cli.exit_codes import run_main
from ldm_jax.config import ParallelConfig
from tests.support.commands import ROOT, environment, error_line, train
from tests.support.pods import digest_of, ended
from tests.support.toys import BATCH, run_toy, toy_stage

HANGS_AT = 6 * BATCH
HANGS_FOR_AT_MOST = 60.0
STALL_TIMEOUT = 2

prepare_example = build.prepare_example


def read_from_a_disk_that_hangs(example, **sizes):
    if example["index"] == HANGS_AT:
        until = time.monotonic() + HANGS_FOR_AT_MOST
        while len(stacks_in(Path(os.environ["STDERR"]).read_text())) < 2:
            assert time.monotonic() < until, "the stacks were not printed twice"
            time.sleep(0.1)
    return prepare_example(example, **sizes)


def stacks_in(err):
    """Return the timeout reports that show the hanging and the waiting thread."""
    parts = err.split(f"Timeout (0:00:0{STALL_TIMEOUT})!")[1:]
    both = (" in read_from_a_disk_that_hangs\n", " in take\n")
    return [part for part in parts if all(each in part for each in both)]


def main(args):
    build.prepare_example = read_from_a_disk_that_hangs
    parallel = ParallelConfig(stall_timeout=STALL_TIMEOUT)
    found = run_toy(Path(args[0]), toy_stage(), parallel=parallel)
    sys.stdout.write(f"digest {found.digest}\n")


def test_a_hanging_step_prints_its_stack_and_the_run_continues(tmp_path):
    stderr = tmp_path / "stderr"
    with stderr.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.test_stall", tmp_path / "stalled"],
            cwd=ROOT,
            env=environment(devices=4) | {"STDERR": str(stderr)},
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
        )
        ((code, out, _),) = ended([process])
    assert code == 0, stderr.read_text()
    assert len(stacks_in(stderr.read_text())) >= 2
    assert digest_of(out) == run_toy(tmp_path / "unbroken", toy_stage()).digest


def test_non_finite_steps_are_logged_and_skipped_up_to_max_skipped_steps(tmp_path):
    diverging = ["--autoencoder.optim.lr", "1e30", "--stages", "autoencoder"]
    diverging += ["--autoencoder.steps", "3"]
    line = error_line(train(tmp_path, *diverging))
    assert re.search(r"autoencoder step 2: loss = nan.* not_finite\.jsonl", line)
    assert faults(tmp_path) == [(2, [list(range(8, 16))])]
    # With two skips allowed the run reaches its end, where the latent scale is nan.
    line = error_line(train(tmp_path, *diverging, "--max-skipped-steps", "2"))
    assert "the scale of its latents is nan" in line
    assert [step for step, _ in faults(tmp_path)] == [2, 3]


def faults(workdir):
    lines = (workdir / "not_finite.jsonl").read_text().splitlines()
    return [(row["step"], row["example_index"]) for row in map(json.loads, lines)]


if __name__ == "__main__":
    run_main(main, "test_stall.py")
