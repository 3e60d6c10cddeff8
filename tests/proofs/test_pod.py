"""Two processes as one run."""

import re
import signal

from ldm_jax.config import ParallelConfig
from tests.support.pods import MOST_STEPS, digest_of, ended, pair, wait_for_step
from tests.support.toys import run_toy, toy_stage

SAVES = 3


def test_two_processes_with_pmap_resume_like_one_process(tmp_path):
    check_two_processes_resume(tmp_path, "pmap")


def check_two_processes_resume(tmp_path, layout):
    """Check that a run of two processes stops by one signal and resumes exactly."""
    parallel = ParallelConfig(layout=layout)
    whole = run_toy(tmp_path / "one", toy_stage(num_steps=200), parallel=parallel)
    workdir = tmp_path / "two"
    first, second = pair(workdir, layout, 200, 0.1)
    before = wait_for_step(first, 5)
    second.send_signal(signal.SIGTERM)
    found = ended([first, second])
    assert [code for code, _, _ in found] == [75, 75], found
    saved = [re.search(r"diffusion step (\d+) is saved", err)[1] for _, _, err in found]
    assert saved[0] == saved[1]
    assert int(saved[0]) - before < MOST_STEPS
    found = ended(pair(workdir, layout, 200))
    assert [code for code, _, _ in found] == [0, 0], found
    assert {digest_of(out) for _, out, _ in found} == {whole.digest}
    # Every step donates its input state, except at saves: on a CPU a checkpoint is
    # written from the buffers of the state.
    left = 200 - int(saved[0]) - 1
    for _, out, _ in found:
        kept, steps = map(int, re.search(r"kept (\d+) in (\d+) steps", out).groups())
        assert steps == left and kept <= SAVES
    steps = [int(n) for n in re.findall(r"step (\d+)", found[0][1])]
    assert steps == list(range(int(saved[0]) + 1, 201))
