"""Run the commands as a user does, with a run small enough for a test."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ldm_jax.cli import main
from ldm_jax.cli.exit_codes import run_main
from ldm_jax.config import Config, to_json
from ldm_jax.pretrained.model_weights import write_native
from tests.support.models import model_of

ROOT = Path(__file__).parents[2]
TIMEOUT = 1800
"""Seconds after which a command counts as hung; a busy machine is slow, not wrong."""
DEVICES = re.compile(r"(?<=--xla_force_host_platform_device_count=)\d+")
LDM = ("-m", "ldm_jax.cli")
TINY = Path("tests/support/tiny.py")


def environment(devices: int = 1) -> dict[str, str]:
    flags = DEVICES.sub(str(devices), os.environ["XLA_FLAGS"])  # of tests/conftest.py
    return {**os.environ, "XLA_FLAGS": flags, "PYTHONWARNINGS": "default"}


def start(*args: object, devices: int = 1) -> subprocess.Popen[str]:
    """Start Python with these arguments, as in `*LDM, "train"`, or a script."""
    return subprocess.Popen(
        [sys.executable, *map(str, args)],
        cwd=ROOT,
        env=environment(devices),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*args: object, devices: int = 1) -> subprocess.CompletedProcess[str]:
    process = start(*args, devices=devices)
    try:
        out, err = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def ldm(*args: object, devices: int = 1) -> subprocess.CompletedProcess[str]:
    return run(*LDM, *args, devices=devices)


def train(workdir: Path, *args: object, devices: int = 1):
    flags = ("--config", TINY, "--workdir", workdir, *args)
    return ldm("train", *flags, devices=devices)


def sample(workdir: Path, out: Path, *args: object):
    return ldm("sample", "--workdir", workdir, "--out", out, *args)


def succeeded(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def digests(workdir: Path) -> dict[str, str]:
    """Return the digests of a finished run's stages."""
    return json.loads((workdir / "final.json").read_text())["digest_by_stage"]


def error_line(result: subprocess.CompletedProcess[str]) -> str:
    """Assert that a command failed with one clear line and no traceback."""
    assert result.returncode != 0, result.stdout
    err = result.stderr
    assert "Traceback" not in err, err
    lines = [line for line in err.splitlines() if ": error: " in line]
    assert len(lines) == 1, err
    assert lines[0] == err.splitlines()[-1], err
    return lines[0]


def write_run(config: Config, folder: Path, seed: int = 0) -> Path:
    """Write a run folder with random parameters, to sample from without training."""
    folder.mkdir(exist_ok=True)
    write_native(model_of(config, seed), folder)
    (folder / "config.json").write_text(to_json(config))
    return folder


def ldm_here(*args: object) -> None:
    """Run `ldm` in this process, which has imported JAX already."""
    main.run(list(map(str, args)))


def sample_here(*args: object) -> None:
    ldm_here("sample", *args)


def refusal(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """Assert that `ldm sample` ends with one clear line, in this process; return it."""
    with pytest.raises(SystemExit) as stop:
        run_main(main.run, "ldm sample", ["sample", *map(str, args)])
    captured = capsys.readouterr()
    code = stop.value.code
    assert isinstance(code, int)
    return error_line(
        subprocess.CompletedProcess("ldm sample", code, captured.out, captured.err)
    )
