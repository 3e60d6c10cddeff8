import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from ldm_jax.cli.sample import parse_sample
from ldm_jax.cli.train import parse
from ldm_jax.config import to_json
from ldm_jax.config.launch import Launch
from ldm_jax.parallel import launch
from ldm_jax.parallel import multihost as hosts
from ldm_jax.types import InputError, RunError
from tests.support.tiny import get_config

TRAIN = ["--config", "tests/support/tiny.py", "--workdir", "runs/x"]
THREE = ["--coordinator", "localhost:1234", "--num-processes", "2", "--process-id", "1"]


def test_a_run_is_one_process_unless_flags_name_others():
    beside = Path("runs/x")
    alone = parse(TRAIN).launch
    assert alone == Launch() and not alone.joins
    assert alone.cache_folder(beside=beside) == Path("runs/.compiled").absolute()
    assert parse([*TRAIN, "--pod"]).launch.joins
    joined = parse([*TRAIN, *THREE, "--compilation-cache", "none"]).launch
    assert joined.joins and joined.coordinator == "localhost:1234"
    assert (joined.num_processes, joined.process_id) == (2, 1)
    assert joined.cache_folder(beside=beside) is None


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (THREE[:4], "--process-id: not given"),
        ([*THREE[:4], "--process-id", "2"], "--process-id: got 2, wanted 0 to 1"),
        (
            ["--coordinator", "here", *THREE[2:]],
            "--coordinator: got 'here', wanted HOST",
        ),
        (["--profile", "5:5"], "--profile: got '5:5', wanted START:STOP"),
        (["--workdir", "gs://bucket/run"], "--workdir: got gs:/bucket/run, wanted a"),
        (
            ["--parallel.peer-timeout", "1"],
            "--parallel.peer-timeout: got 1, wanted at least 10",
        ),
    ],
)
def test_inconsistent_launch_flags_are_refused(args, message):
    with pytest.raises(InputError, match=message):
        parse([*TRAIN, *args])


def test_the_process_flag_of_sample_is_refused_in_a_pod(tmp_path):
    (tmp_path / "config.json").write_text(to_json(get_config()))
    request = ["--workdir", str(tmp_path), *THREE]
    assert parse_sample(request).launch.process_id == 1
    with pytest.raises(InputError, match="--process: got 0/2 in a pod"):
        parse_sample([*request, "--process", "0/2"])


@pytest.mark.parametrize(
    ("given", "devices"),
    [
        ({}, min(2, launch.num_cores())),
        ({"JAX_NUM_CPU_DEVICES": "3"}, 3),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}, 4),
    ],
)
def test_cpu_devices_come_from_the_config_or_the_environment(given, devices):
    program = (
        "from ldm_jax.config.launch import Launch\n"
        "from ldm_jax.parallel.launch import start\n"
        "start(Launch(), cpu_devices=2)\n"
        "import jax; print(jax.device_count())\n"
        "start(Launch(), cpu_devices=2)"
    )
    names = ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")
    env = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=env | given,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert (done.stdout, done.returncode) == (f"{devices}\n", 0), done.stderr


def test_a_process_counts_as_dead_after_the_given_seconds(monkeypatch):
    joined = []
    monkeypatch.setattr(launch, "meet", lambda launch: None)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **how: joined.append(how))
    launch.start(parse([*TRAIN, *THREE]).launch, peer_timeout=17)
    (how,) = joined
    assert how["heartbeat_timeout_seconds"] == 17
    assert (how["num_processes"], how["process_id"]) == (2, 1)


@pytest.fixture
def peer_texts(monkeypatch):
    """A list for the text of another process; None stands for the same text as ours."""
    theirs = []
    monkeypatch.setattr(hosts, "gather_texts", lambda text: [text, theirs[0] or text])
    return theirs


def test_check_same_names_the_differing_fields_and_values(peer_texts):
    peer_texts.append(json.dumps({"seed": 1, "jax": "0.10.2"}))
    with pytest.raises(InputError, match=r"seed \(0 on process 0, 1 on process 1\)"):
        hosts.check_same({"seed": 0, "jax": "0.10.2"})
    peer_texts[0] = None
    hosts.check_same({"seed": 0})


def test_an_error_of_another_process_is_raised_here(peer_texts):
    peer_texts.append(json.dumps(["RunError", "no checkpoint is intact", None]))
    with pytest.raises(RunError, match="process 1: no checkpoint is intact"):
        hosts.first_alone(lambda: None)
    peer_texts[0] = json.dumps(["OSError", "[Errno 28] No space left: 'log'", 28])
    with pytest.raises(OSError, match=r"process 1: .*No space left") as found:
        hosts.first_alone(lambda: None)
    assert found.value.errno == 28  # it decides the exit code and the advice
    peer_texts[0] = None
    with pytest.raises(InputError, match="mine"), hosts.together():
        raise InputError("mine")
