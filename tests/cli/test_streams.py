"""Standard streams as supervisors, cron and shells leave them."""

import contextlib
import errno
import os
import subprocess
import sys

import pytest

from ldm_jax.cli import main
from ldm_jax.cli.exit_codes import MAX_LINE, run_main
from ldm_jax.types import InputError
from tests.support.commands import ROOT, TIMEOUT, environment

WORDS = """
import sys
from pathlib import Path
from ldm_jax.cli.exit_codes import run_main
def main(args):
    for i in range(20_000):
        print("step", i, flush=i % 1000 == 0)
    Path(args[0]).write_text("done")
run_main(main, "ldm", sys.argv[1:])
"""


def shell(line, *args):
    """Run a line of the shell, in which $PY is this Python."""
    return subprocess.run(
        ["sh", "-c", line, "sh", *map(str, args)],
        cwd=ROOT,
        env={**environment(), "PY": sys.executable},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("$PY sample.py --workdir nope >&-", 2, "--workdir: nope is not a run"),
        ("$PY train.py --config nope.py --workdir x >&- <&-", 2, "--config: no file"),
        ("$PY sample.py --help >&-", 2, "stdout: it is closed"),
        ("$PY -m ldm_jax.cli inspect ldm_jax >&-", 2, "stdout: it is closed"),
        ("$PY sample.py --help >/dev/full", 1, "No space left on device; make room"),
        ("$PY sample.py --workdir nope >/dev/full", 2, "--workdir: nope is not a run"),
    ],
)
def test_the_one_line_comes_whatever_became_of_stdout(line, code, words):
    done = shell(line)
    assert done.returncode == code
    assert words in done.stderr and len(done.stderr.splitlines()) == 2


def test_without_both_streams_the_exit_code_is_left():
    done = shell("$PY sample.py --workdir nope >&- 2>&-")
    assert (done.returncode, done.stderr) == (2, "")


@pytest.mark.parametrize("end", ["| head -n 1", "| true", ">&-"])
def test_work_goes_on_when_nobody_reads(tmp_path, end):
    line = f'{{ $PY -c "$1" "$2"; echo $? >"$3"; }} {end}'
    done = shell(line, WORDS, tmp_path / "work", tmp_path / "code")
    assert (tmp_path / "work").read_text() == "done"
    assert (tmp_path / "code").read_text() == "0\n"
    assert done.stderr == ""


def test_a_name_that_the_terminal_cannot_show_is_escaped():
    code = "import sys; from ldm_jax.cli.exit_codes import run_main\n"
    code += "run_main(lambda args: print('\\udcff', '\\u732b'), 'ldm', [])"
    done = shell('PYTHONIOENCODING=ascii $PY -c "$1"', code)
    assert (done.stdout, done.returncode) == ("\\udcff \\u732b\n", 0), done.stderr


def ended(capsys, error):
    """End a program by an error; return its exit code and its line."""

    def fail(args):
        raise error

    with pytest.raises(SystemExit) as stop:
        run_main(fail, "ldm train", [])
    blank, line = capsys.readouterr().err.splitlines()
    assert not blank
    return stop.value.code, line


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (InputError("a\nb\x1b[31mc\udcff"), 2, r"a b\x1b[31mc\udcff"),
        (OSError(errno.ENOSPC, "full", "here"), 1, "here: full; make room"),
        (MemoryError(), 1, "out of memory (MemoryError); try a smaller batch"),
        (RuntimeError("RESOURCE_EXHAUSTED: 9 GB"), 1, "out of memory"),
        (SystemExit(0), 1, "called sys.exit(0)"),
        (SystemExit(1), 1, "called sys.exit(1)"),
        (SystemExit("stop"), 1, "called sys.exit('stop')"),
        (KeyError("label"), 1, "unforeseen KeyError: 'label'; "),
    ],
)
def test_every_error_is_one_printable_line(capsys, error, code, words):
    found, line = ended(capsys, error)
    assert found == code and line.startswith("ldm train: error: ")
    assert words in line and line.isprintable()
    if "unforeseen" in line:
        path = line.partition("'label'; ")[2].partition(" says")[0]
        with open(path) as file:
            assert "raise error" in file.read()
        os.remove(path)


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (1, 1)])
def test_a_program_ends_with_the_code_that_its_main_returns(capsys, returned, code):
    with pytest.raises(SystemExit) as stop:
        run_main(lambda args: returned, "ldm check-images", [])
    assert stop.value.code == code and not capsys.readouterr().err


def test_a_long_line_is_cut_in_its_middle(capsys):
    _, line = ended(capsys, InputError(f"--x: got {'9' * 10**6}, wanted less"))
    assert len(line) < 2 * MAX_LINE
    assert line.startswith("ldm train: error: --x: got 9")
    assert line.endswith("9, wanted less")


def test_no_flag_takes_an_empty_value_but_a_text():
    for args in (
        ["train", "--config", "digits", "--workdir", ""],
        ["train", "--config", "", "--workdir", "x"],
        ["train", "--config", "digits", "--workdir", "x", "--first-stage="],
        ["sample", "--workdir", " "],
        ["inspect", ""],
        ["export", "run", "--out", ""],
        ["check-images", "pictures", "--out="],
        ["serve", ""],
        ["evaluate", "--workdir", "x", "--lpips", "a", ""],
    ):
        with pytest.raises(InputError, match=r"got .*, which is empty"):
            main.run(args)
    with pytest.raises(InputError, match="--workdir: nope is not a run"):
        main.run(["sample", "--workdir", "nope", "--prompt", "", "a"])


def test_a_file_of_the_user_cannot_end_a_command_as_done(tmp_path):
    with contextlib.chdir(tmp_path):
        (tmp_path / "mine.py").write_text("import sys\nsys.exit(0)\n")
        with pytest.raises(InputError, match=r"mine.py line 2 called sys.exit\(0\)"):
            main.run(["train", "--config", "mine.py", "--workdir", "x"])
