"""Two processes as one run."""

import re
import signal
import time

from ldm_jax.config import ParallelConfig
from tests.support.pods import digest_of, ended, pair, wait_for_step
from tests.support.toys import run_toy, toy_stage

SAVES = 3


def test_two_processes_are_one_run_and_stop_together(tmp_path):
    check_a_pair(tmp_path, "pmap")


def check_a_pair(tmp_path, layout):
    """Run, stop by one signal, and go on: the digest is that of one process."""
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
    # Every step took the buffers of the state it was given: it is never held twice.
    # On a CPU what a checkpoint is written from is no copy, so there it must wait.
    left = 200 - int(saved[0]) - 1
    for _, out, _ in found:
        kept, steps = map(int, re.search(r"kept (\d+) in (\d+) steps", out).groups())
        assert steps == left and kept <= SAVES
    steps = [int(n) for n in re.findall(r"step (\d+)", found[0][1])]
    assert steps == list(range(int(saved[0]) + 1, 201))
