"""Runs killed at random moments, also during saves, end like unbroken runs.

LDM_JAX_KILLS is the number of kills; `make torture` has ten times as many.
"""

import json
import os
import random
import re
import signal
import time

import pytest

from ldm_jax.training.checkpoint import CheckpointStore
from ldm_jax.training.loop import stage_target
from tests.proofs.test_pod import check_two_processes_resume
from tests.support.pods import (
    MOST_STEPS,
    alone,
    digest_of,
    ended,
    pair,
    wait_for_step,
)
from tests.support.toys import root_key, run_toy, toy_stage

KILLS = int(os.environ.get("LDM_JAX_KILLS", "20"))
STEPS = 60 * KILLS
SAVE_EVERY = 4


@pytest.mark.timeout(1200 * KILLS)
def test_a_run_killed_at_random_moments_ends_like_an_unbroken_run(tmp_path):
    whole = run_toy(tmp_path / "whole", toy_stage(num_steps=STEPS))
    chance, killed, torn = random.Random(0), 0, 0
    workdir = tmp_path / "killed"
    for _ in range(KILLS):
        process = alone(workdir, STEPS, 0.005, SAVE_EVERY)
        wait_for_step(process, 1)
        time.sleep(chance.uniform(0.0, 1.0))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
        torn += any((workdir / "diffusion/checkpoints").glob("*tmp*"))
    assert killed == KILLS
    assert torn, "no kill interrupted a save"
    ((code, out, err),) = ended([alone(workdir, STEPS, 0, SAVE_EVERY)])
    assert code == 0, err
    assert digest_of(out) == whole.digest
    assert rows(workdir) == rows(tmp_path / "whole")


def rows(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [(row["step"], row["loss"]) for row in map(json.loads, lines)]


def test_two_processes_with_fsdp_resume_like_one_process(tmp_path):
    check_two_processes_resume(tmp_path, "fsdp")


def test_two_processes_save_the_same_step_after_sigterm(tmp_path):
    processes = pair(tmp_path / "run", "pmap", 400, 0.1)
    before = wait_for_step(processes[0], 3)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    found = ended(processes)
    assert [code for code, _, _ in found] == [75, 75], found
    store = CheckpointStore(tmp_path / "run/diffusion/checkpoints", keep=3)
    stage = toy_stage(num_steps=400)
    step = store.restore(stage_target(stage, root_key(0))).step
    store.close()
    assert all(f"step {step} is saved" in err for _, _, err in found)
    assert step - before < MOST_STEPS


def test_a_killed_process_is_named_by_the_other(tmp_path):
    first, second = pair(tmp_path / "run", "pmap", 4000, 0.05)
    before = wait_for_step(first, 3)
    second.send_signal(signal.SIGKILL)
    # The first ends by itself; how soon is JAX's business (tests/parallel/test_launch).
    ((code, out, err), (_, theirs, _)) = ended([first, second])
    assert code != 0
    assert "unhealthy" in err and "\n1\n" in err
    # It waits in the step that the second did not make.
    assert max(before, last_step(out)) <= last_step(theirs) + 1


def last_step(output):
    return max(map(int, re.findall(r"^step (\d+)$", output, re.MULTILINE)), default=0)
