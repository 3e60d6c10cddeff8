"""A full or read-only disk, or a limit on file size, ends a run in one line.

Earlier files stay intact; the same command resumes once the cause is removed.
"""

import json
import re
import resource
import shutil
import subprocess
import time

import pytest

from ldm_jax.training.checkpoint import CheckpointStore
from ldm_jax.training.loop import stage_target
from ldm_jax.training.metrics import plot_losses
from tests.support.commands import error_line, train
from tests.support.pods import TIMEOUT, alone, digest_of, ended, pair, wait_for_step
from tests.support.toys import root_key, run_toy, toy_stage

STEPS = 120
LOG_EVERY = 2
"""Of `run_toy`."""


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The digest and the log of a run on an intact disk."""
    workdir = tmp_path_factory.mktemp("unbroken")
    return run_toy(workdir, toy_stage(num_steps=STEPS)).digest, logged(workdir)


@pytest.fixture
def disk(tmp_path):
    """A file system of four megabytes that nothing else uses."""
    place = tmp_path / "disk"
    place.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("there is no mount here")
    made = mount("-t", "tmpfs", "-o", "size=4m", "tmpfs", place)
    if made.returncode:
        pytest.skip(f"nothing may be mounted here: {made.stderr.strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


def mount(*args):
    command = ["mount", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True)


def logged(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [(row["step"], row["loss"]) for row in map(json.loads, lines)]


def fill(disk):
    """Fill the disk to the last byte; return the file that does so."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="space"):
        while True:
            file.write(bytes(4096))
    return filler


CLOSED_LOOP = re.compile(
    r"(Exception ignored in: .*\n)?Traceback \(most recent call last\):\n"
    r"(  .*\n)+RuntimeError: Event loop is closed\n"
)
"""What tensorstore prints of writes that Orbax did not wait for when one failed."""


def without_closed_loops(err):
    while (rest := CLOSED_LOOP.sub("", err)) != err:  # threads print into each other
        err = rest
    return err


def failed(*processes):
    """Wait for processes that must fail; return the last step and error lines."""
    found = ended(processes)
    assert [code for code, _, _ in found] == [1] * len(processes), found
    steps = re.findall(r"^step (\d+)$", found[0][1], re.MULTILINE)
    lines = [
        error_line(
            subprocess.CompletedProcess("", code, out, without_closed_loops(err))
        )
        for code, out, err in found
    ]
    return int(steps[-1]) if steps else 0, *lines


def wait_until(done):
    until = time.monotonic() + TIMEOUT
    while not done():
        assert time.monotonic() < until
        time.sleep(0.01)


def wait_for_checkpoint(workdir, step):
    wait_until((workdir / "diffusion/checkpoints" / str(step)).is_dir)


def newest(workdir):
    """Return the step of the newest checkpoint, read as another process would."""
    place = workdir / "diffusion/checkpoints"
    store = CheckpointStore(place, keep=3, read_only=True)
    found = store.restore(stage_target(toy_stage(num_steps=STEPS), root_key(0)))
    store.close()
    return found.step


def content(folder):
    """Return the files of a folder by relative path."""
    return {
        path.relative_to(folder): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def lost_and_kept(line, *, every):
    """Return the step that a message calls not written, and the one it calls kept.

    Both depend on the run's progress when the write failed.
    """
    match = re.search(r"step (\d+) could not be written .*step (\d+) is kept", line)
    lost, kept = int(match[1]), int(match[2])
    assert lost % every == 0 and kept == lost - every
    return lost, kept


def check_it_resumes(workdir, unbroken, *args):
    """Give the same command again: the run ends like the unbroken one."""
    step = newest(workdir)
    ((code, out, err),) = ended([alone(workdir, STEPS, *args)])
    assert code == 0, err
    assert f"step {step}\n" not in out and f"step {step + 1}\n" in out
    assert (digest_of(out), logged(workdir)) == unbroken


def test_a_full_disk_ends_a_run_that_resumes_after_room_is_made(disk, unbroken):
    workdir = disk / "run"
    process = alone(workdir, STEPS, 0.02, 4)
    wait_for_step(process, 14)
    filler = fill(disk)
    last, line = failed(process)
    assert re.search("could not be written .*No space left .* goes on from there", line)
    match = re.search(r"step (\d+) could not be .*step (\d+) is kept", line)
    assert newest(workdir) == int(match[2]) == int(match[1]) - 4
    assert last < int(match[1]) + 4
    _, line = failed(alone(workdir, STEPS, 0, 4))
    # Which write fails first depends on the size of the unfinished step.
    assert re.search("No space left on device|code='28'", line)
    filler.unlink()
    check_it_resumes(workdir, unbroken, 0, 4)


def test_a_log_line_cut_by_a_full_disk_is_reported_and_rewritten(disk, unbroken):
    workdir = disk / "run"
    process = alone(workdir, STEPS, 0.02, 40)
    wait_for_step(process, 44)
    wait_for_checkpoint(workdir, 40)
    # The log's last page has room for a few more lines and a part of one.
    filler = fill(disk)
    last, line = failed(process)
    assert f"{workdir / 'metrics.jsonl'}: No space left on device; make room" in line
    whole, _, cut = (workdir / "metrics.jsonl").read_text().rpartition("\n")
    assert cut and last == json.loads(whole.splitlines()[-1])["step"] + LOG_EVERY
    with pytest.raises(OSError, match=r"No space left on device: '.*loss.png.part'"):
        plot_losses(workdir / "metrics.jsonl", workdir / "loss.png")
    filler.unlink()
    check_it_resumes(workdir, unbroken, 0, 40)


def test_a_read_only_disk_ends_a_run_and_stays_unchanged(disk, unbroken):
    workdir = disk / "run"
    process = alone(workdir, STEPS, 0.02, 4)
    wait_for_step(process, 14)
    # The remount fails while a file is open for writing.
    wait_until(lambda: mount("-o", "remount,ro", disk).returncode == 0)
    before = content(workdir)
    last, line = failed(process)
    assert "Read-only file system" in line
    assert last <= logged(workdir)[-1][0] + LOG_EVERY
    _, line = failed(alone(workdir, STEPS, 0, 4))
    assert "metrics.jsonl.part: Read-only file system; make it writable" in line
    line = error_line(train(disk / "new"))
    assert f"{disk / 'new'}: Read-only file system; make it writable" in line
    assert content(workdir) == before
    assert mount("-o", "remount,rw", disk).returncode == 0
    check_it_resumes(workdir, unbroken, 0, 4)


# A limit on file size needs no file system of its own. The log stays below it; the
# arrays of a checkpoint, which a thread writes during training, exceed it.


def limit(process):
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (16384, 16384))


def test_a_failed_background_save_ends_the_run_before_the_next_save(tmp_path, unbroken):
    workdir = tmp_path / "run"
    process = alone(workdir, STEPS, 0.05, 20)
    wait_for_step(process, 25)
    wait_for_checkpoint(workdir, 20)
    limit(process)
    last, line = failed(process)
    assert "File too large" in line
    lost, kept = lost_and_kept(line, every=20)
    assert lost < last < lost + 20  # when the next save is due
    assert newest(workdir) == kept
    check_it_resumes(workdir, unbroken, 0, 20)


def test_a_save_that_fails_on_one_process_is_reported_by_both(tmp_path, unbroken):
    workdir = tmp_path / "run"
    processes = pair(workdir, "fsdp", STEPS, 0.05, 20)
    wait_for_step(processes[0], 25)
    wait_for_checkpoint(workdir, 20)
    limit(processes[1])
    last, first, second = failed(*processes)
    assert "File too large" in second
    lost, kept = lost_and_kept(second, every=20)
    assert lost < last < lost + 20  # when the next save is due
    assert "process 1: " in first and first.endswith(second.partition("error: ")[2])
    assert newest(workdir) == kept
    check_it_resumes(workdir, unbroken, 0, 20)


def test_a_removed_checkpoint_folder_ends_a_run(tmp_path):
    workdir = tmp_path / "run"
    process = alone(workdir, STEPS, 0.02, 20)
    wait_for_step(process, 25)
    wait_for_checkpoint(workdir, 20)
    place, elsewhere = workdir / "diffusion/checkpoints", tmp_path / "elsewhere"
    place.rename(elsewhere)
    place.write_text("")
    last, line = failed(process)
    lost, kept = lost_and_kept(line, every=20)
    assert last == lost
    place.unlink()
    elsewhere.rename(place)
    assert newest(workdir) == kept
