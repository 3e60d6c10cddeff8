"""Damaged checkpoints: a restore never uses values that differ from the saved ones."""

import random
import re
import shutil
import warnings

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from ldm_jax.training.checkpoint import CheckpointStore
from ldm_jax.training.loop import stage_target
from tests.support.pods import digest_of, ended, pair
from tests.support.toys import root_key, run_toy, toy_stage

FLIPS = 25
STEPS = 12
NEWEST, BEFORE, FIRST = 12, 8, 4


def restore(place):
    """Restore the newest checkpoint of a folder, as a new process would."""
    store = CheckpointStore(place, keep=3)
    found = store.restore(stage_target(toy_stage(num_steps=STEPS), root_key(0)))
    store.close()
    return found


def compared(found):
    """Return the fields of a checkpoint that a restore must reproduce."""
    return found.step, found.digest, found.notes


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run's three checkpoints."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    run_toy(workdir, toy_stage(num_steps=STEPS))
    return workdir / "diffusion/checkpoints"


@pytest.fixture(scope="module")
def good(whole, tmp_path_factory):
    """The compared fields of the two newest steps."""
    before = tmp_path_factory.mktemp("before") / "checkpoints"
    shutil.copytree(whole, before)
    shutil.rmtree(before / str(NEWEST))
    return {NEWEST: compared(restore(whole)), BEFORE: compared(restore(before))}


@pytest.fixture
def copies(whole, tmp_path):
    """Return a function that copies the checkpoints."""

    def copy():
        place = tmp_path / "checkpoints"
        shutil.rmtree(place, ignore_errors=True)
        return shutil.copytree(whole, place)

    return copy


def files(step):
    return sorted(path for path in step.rglob("*") if path.is_file())


def arrays(step):
    """The files of a step that hold more than an index."""
    return [
        path
        for path in files(step)
        if path.parent.name == "d" and path.stat().st_size > 4096
    ]


def flip(path, chance):
    content = bytearray(path.read_bytes())
    bit = chance.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def read_by_orbax_alone(step):
    """Return a step's arrays as Orbax reads them, or None where Orbax refuses."""
    reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Orbax warns that no sharding was given
        try:
            return reader.restore(step / "state")
        except ValueError:
            return None


def test_every_flipped_bit_that_changes_an_array_is_detected(
    copies, whole, good, caplog
):
    chance, changed, undetected_by_orbax = random.Random(0), 0, 0
    saved = read_by_orbax_alone(whole / str(NEWEST))
    while changed < FLIPS:
        place = copies()
        step = place / str(NEWEST)
        flip(chance.choice(arrays(step)), chance)
        read = read_by_orbax_alone(step)
        same = read is not None and all(
            jax.tree.leaves(jax.tree.map(np.array_equal, saved, read))
        )
        caplog.clear()
        found = compared(restore(place))
        if same:
            assert found == good[NEWEST]
            continue
        changed += 1
        undetected_by_orbax += read is not None
        assert found == good[BEFORE]
        (line,) = caplog.messages
        assert re.match(r"damaged checkpoint: step 12: .*(params|ema|state)", line)
        if read is not None:
            assert re.search(r"\['state'\]\.(params|ema)\['w'\] is not what was", line)
    assert undetected_by_orbax > FLIPS // 2  # the digests detect these


def test_a_flipped_bit_outside_the_arrays_is_detected_or_harmless(copies, good, caplog):
    chance, found = random.Random(0), []
    for _ in range(FLIPS):
        place = copies()
        step = place / str(NEWEST)
        path = chance.choice(sorted({*files(step)} - {*arrays(step)}))
        flip(path, chance)
        caplog.clear()
        found.append(compared(restore(place)))
        assert found[-1] == good[found[-1][0]], path
        assert len(caplog.messages) == (found[-1][0] == BEFORE)
    assert {step for step, _, _ in found} == {NEWEST, BEFORE}


def test_a_flipped_bit_in_the_notes_is_detected(copies, good):
    chance, detected = random.Random(0), 0
    for _ in range(FLIPS):
        place = copies()
        flip(place / str(NEWEST) / "notes/metadata", chance)
        step, digest, notes = compared(restore(place))
        detected += step == BEFORE
        # A flip in the name of the notes' digest is not detected; the notes are intact.
        known = {name: notes[name] for name in notes if name in good[step][2]}
        assert (step, digest, known) == good[step]
    assert detected > FLIPS - 3


def cut_in_half(step):
    for path in arrays(step):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def overwrite_with_zeros(step):
    for path in arrays(step):
        content = path.read_bytes()
        path.write_bytes(content[:512] + bytes(1024) + content[1536:])


def lose_arrays(step):
    for path in arrays(step):
        path.unlink()


def lose_the_index(step):
    (step / "state/manifest.ocdbt").unlink()


def lose_the_state(step):
    shutil.rmtree(step / "state")


def lose_the_notes(step):
    shutil.rmtree(step / "notes")


def lose_the_file_of_notes(step):
    (step / "notes/metadata").unlink()


def empty_the_notes(step):
    (step / "notes/metadata").write_text("")


def notes_of_another_step(step):
    shutil.copy(step.parent / str(BEFORE) / "notes/metadata", step / "notes/metadata")


def arrays_of_another_step(step):
    shutil.rmtree(step / "state")
    shutil.copytree(step.parent / str(BEFORE) / "state", step / "state")


def lose_everything(step):
    shutil.rmtree(step)
    step.mkdir()


@pytest.mark.parametrize(
    "damage",
    [
        cut_in_half,
        overwrite_with_zeros,
        lose_arrays,
        lose_the_index,
        lose_the_state,
        lose_the_notes,
        lose_the_file_of_notes,
        empty_the_notes,
        notes_of_another_step,
        arrays_of_another_step,
        lose_everything,
    ],
)
def test_a_damaged_step_is_reported_and_moved_aside(copies, good, caplog, damage):
    place = copies()
    damage(place / str(NEWEST))
    assert compared(restore(place)) == good[BEFORE]
    (line,) = caplog.messages
    assert re.match(r"damaged checkpoint: step 12: \S", line)
    assert len(list((place / "damaged").glob("12-*"))) == 1
    assert not (place / str(NEWEST)).exists()


def test_a_half_written_step_is_not_a_checkpoint(copies, good, caplog):
    place = copies()
    half = place / f"{NEWEST}.orbax-checkpoint-tmp"
    (place / str(NEWEST)).rename(half)
    cut_in_half(half)
    assert compared(restore(place)) == good[BEFORE]
    assert caplog.messages == []


# Two processes. Each process reads only its own file of a leaf that both share:
# the other process cannot detect damage in that file.


@pytest.fixture(scope="module")
def run_of_two(tmp_path_factory):
    """A run that two processes finished."""
    workdir = tmp_path_factory.mktemp("two") / "run"
    found = ended(pair(workdir, "fsdp", STEPS))
    assert [code for code, _, _ in found] == [0, 0], found
    return workdir


def file_of_process_1(workdir, step):
    """Return the file of arrays that only process 1 reads."""
    parts = workdir / "diffusion/checkpoints" / str(step) / "state/ocdbt.process_1/d"
    return max(parts.iterdir(), key=lambda path: path.stat().st_size)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def check_both_go_back_to(step, workdir, layout, whole_digest, *reasons):
    found = ended(pair(workdir, layout, STEPS))
    assert [code for code, _, _ in found] == [0, 0], found
    for _, out, err in found:
        lines = re.findall("damaged checkpoint: (.*)", err)
        assert len(lines) == len(reasons)
        assert all(map(re.search, reasons, lines)), lines
        assert "Traceback" not in err
        assert re.findall(r"^step (\d+)", out, re.MULTILINE)[0] == str(step + 1)
        assert digest_of(out) == whole_digest


def test_both_processes_skip_a_step_that_one_finds_damaged(run_of_two, good, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(run_of_two, workdir)
    cut(file_of_process_1(workdir, NEWEST))
    flip_in_the_middle(file_of_process_1(workdir, BEFORE))
    check_both_go_back_to(
        FIRST,
        workdir,
        "fsdp",
        good[NEWEST][1],
        r"step 12: .*state\.(params|ema)\.w.* is not valid",
        r"step 8: \['state'\]\.\w+\['w'\] is not what was saved",
    )


def test_both_processes_skip_a_step_that_both_find_damaged(run_of_two, good, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(run_of_two, workdir)
    cut(file_of_process_1(workdir, NEWEST))
    reason = r"step 12: .*state\.(params|ema)\.w.* is not valid"
    check_both_go_back_to(BEFORE, workdir, "pmap", good[NEWEST][1], reason)


def flip_in_the_middle(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
