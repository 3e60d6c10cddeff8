import ast
import dataclasses
import importlib
import os
import re
import subprocess
import sys

import pytest

from ldm_jax.cli import main, sample, steps
from ldm_jax.cli.exit_codes import run_main
from ldm_jax.config import flags, to_json
from ldm_jax.config.load_config import shipped_configs
from ldm_jax.config.validation import in_words
from ldm_jax.sampling.request import FLAG_NAMES
from ldm_jax.types import InputError
from tests.support.commands import LDM, ROOT, error_line, run, succeeded
from tests.support.stand_ins import config_with

HELP = """
import resource, sys
from ldm_jax.cli.main import run
try:
    run({args!r})
except SystemExit as stop:
    assert not stop.code, stop.code
heavy = {{"jax", "flax", "numpy", "matplotlib", "tensorflow", "nicegui"}}
print("imported:", sorted(heavy & sys.modules.keys()))
print("seconds:", resource.getrusage(resource.RUSAGE_SELF).ru_utime)
"""
REFUSED = """
import sys
from ldm_jax.cli.main import run
try:
    run({args!r})
except ValueError as error:
    print(error)
print("jax" in sys.modules)
"""
FREE_OF_JAX = re.compile("imports no JAX|nothing here imports JAX|without JAX", re.I)
"""What the docstring of a module says whose import does not import JAX."""
MOST_SECONDS = 1.0
"""CPU seconds, not wall-clock seconds, for the help of a command."""


@pytest.mark.parametrize("command", ["", *main.COMMANDS])
def test_help_of_each_command_is_fast_and_imports_no_numerics(command):
    args = [command, "--help"] if command else ["--help"]
    text = succeeded(run("-c", HELP.format(args=args)))
    assert f"usage: ldm {command}".strip() in text
    assert "imported: []" in text
    assert float(text.split("seconds:")[1]) < MOST_SECONDS


@pytest.mark.parametrize(
    "args",
    [
        ["sample", "--workdir", "nowhere"],
        ["evaluate", "--workdir", "nowhere"],
        ["steps", "--workdir", "nowhere"],
        ["report", "--workdir", "nowhere"],
        ["serve", "nowhere"],
        ["cache-latents", "--workdir", "nowhere", "--out", "latents"],
    ],
    ids=lambda args: args[0],
)
def test_a_folder_that_is_no_run_is_refused_before_jax_is_imported(args):
    told, imported = succeeded(run("-c", REFUSED.format(args=args))).splitlines()
    assert "nowhere is not a run" in told and imported == "False"


def says_free_of_jax():
    """List the modules whose docstring says that they import no JAX."""
    for path in sorted((ROOT / "ldm_jax").rglob("*.py")):
        told = ast.get_docstring(ast.parse(path.read_text())) or ""
        if FREE_OF_JAX.search(" ".join(told.split())):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(part for part in parts if part != "__init__")


@pytest.mark.parametrize("name", list(says_free_of_jax()))
def test_a_module_that_says_so_imports_no_jax(name):
    code = f"import sys, {name}; print('jax' in sys.modules)"
    assert succeeded(run("-c", code)) == "False\n"


def test_help_lists_every_command():
    text = succeeded(run(*LDM, "--help"))
    assert all(f"\n  {name} " in text for name in main.COMMANDS)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "command: not given"),
        (["trian"], "command: got 'trian', wanted one of train, "),
        (["trian"], "did you mean train?"),
        (["steps", "--sampler", "ddim"], "--sampler: no such flag; did you mean --sam"),
        (["inspect"], "PATH: not given"),
        (["inspect", "--deep", "x"], "--deep: no such flag"),
        (["import", "x"], "--out: not given"),
        (["export", "x", "--out", "y", "--format", "comvis"], "did you mean compvis?"),
        (["train", "--config", "digts", "--workdir", "x"], "did you mean digits?"),
        (["train", "--config", "configs/ldm/sd51.py", "--workdir", "x"], "ldm/sd15?"),
        (["plan", "--config", "ldm/sd15", "--diffusion.remt"], "--diffusion.remat?"),
    ],
)
def test_a_mistyped_argument_is_refused_with_the_nearest(args, words):
    with pytest.raises(InputError) as caught:
        main.run(args)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_an_error_is_one_line_with_the_name_of_the_command(capsys):
    with pytest.raises(SystemExit) as stop:
        run_main(main.run, "ldm inspect", ["inspect", "nowhere"])
    assert stop.value.code == 2
    captured = capsys.readouterr()
    done = subprocess.CompletedProcess("ldm", 2, captured.out, captured.err)
    assert error_line(done).startswith("ldm inspect: error: nowhere: ")


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_train_and_sample_scripts_equal_the_sub_commands(script):
    by_script = error_line(run(script, "--seeed", 3))
    by_command = error_line(run(*LDM, script.removesuffix(".py"), "--seeed", 3))
    assert by_script == by_command


def test_shipped_configs_are_found_from_any_folder(tmp_path):
    assert {"digits", "ldm/sd15", "autoencoder/kl_f8"} <= shipped_configs().keys()
    (tmp_path / "configs").mkdir()  # another folder of that name
    code = (
        "from ldm_jax.config.load_config import load_config\n"
        "print(load_config('digits').seed)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.returncode) == ("0\n", 0), done.stderr


@pytest.mark.parametrize(
    ("args", "starts_again"),
    [
        (["train", "--config", "digits"], True),
        (["sample", "--steps", "2"], True),
        (["train", "--help"], False),
        (["inspect", "x"], False),
        (["--help"], False),
        ([], False),
    ],
)
def test_only_commands_that_compute_restart_with_huge_pages(
    monkeypatch, args, starts_again
):
    requested, ran = [], []
    monkeypatch.setattr(main, "use_huge_pages", lambda: requested.append(True))
    monkeypatch.setattr(main, "run_main", lambda run, prog, given: ran.append(given))
    monkeypatch.setattr(sys, "argv", ["ldm", *args])
    main.main()
    assert bool(requested) == starts_again and ran == [args]


@pytest.mark.parametrize(
    "args",
    [
        ["evaluate"],
        ["steps"],
        ["report"],
        ["cache-latents", "--out", "latents"],
    ],
    ids=lambda args: args[0],
)
def test_a_file_that_a_run_names_is_run_only_if_it_is_given(
    args, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "squares.py").write_text("raise AssertionError('imported')")
    config = config_with()
    data = dataclasses.replace(config.data, source="builder:squares.py/few")
    text = to_json(dataclasses.replace(config, data=data))
    (tmp_path / "config.json").write_text(text)
    for given in ([], ["--builder", "other.py"]):
        with pytest.raises(InputError) as caught:
            main.run([*args, "--workdir", ".", *given])
        assert "give --builder 'squares.py/few'" in str(caught.value)
    (tmp_path / "config.json").write_text(to_json(config))
    with pytest.raises(InputError, match=r"got squares\.py, but the data"):
        main.run([*args, "--workdir", ".", "--builder", "squares.py"])


def test_steps_keeps_its_compiled_programs_beside_the_run(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text(to_json(config_with()))
    folders = []

    def start(launch, *, beside):
        folders.append(launch.cache_folder(beside=beside))
        raise KeyboardInterrupt  # before anything is computed

    monkeypatch.setattr(steps, "start", start)
    for given in ([], ["--compilation-cache", "none"]):
        with pytest.raises(KeyboardInterrupt):
            main.run(["steps", "--workdir", str(tmp_path / "run"), *given])
    assert folders == [tmp_path / ".compiled", None]


GIVEN = {
    "train": ["--config", "digits", "--workdir", "run"],
    "sample": ["--workdir", "run"],
    "evaluate": ["--workdir", "run"],
    "steps": ["--workdir", "run"],
    "report": ["--workdir", "run"],
    "plan": ["--config", "digits", "--topology", "local"],
    "serve": ["run"],
    "import": ["weights", "--out", "run"],
    "export": ["run", "--out", "weights"],
    "inspect": ["run"],
    "check-images": ["pictures"],
    "cache-latents": ["--workdir", "run", "--out", "latents"],
}
"""Arguments of each command that are good but for the files."""


def paths():
    """List the arguments that are paths: the command, the name, the words."""
    for command, given in GIVEN.items():
        module = importlib.import_module(f"ldm_jax.cli.{main.COMMANDS[command].module}")
        cls = sample.SampleArguments if command == "sample" else module.Flags
        kinds = {flag: in_words(kind) for flag, kind in flags._flags(cls)}
        names = [flag for flag, kind in kinds.items() if kind in ("a path", "paths")]
        if command == "sample":
            names += [f"--{FLAG_NAMES.get(name, name)}" for name in sample.PATHS]
        for name in dict.fromkeys(names):
            yield command, name, [*given, name, "gs://bucket/x"]
        if not given[0].startswith("--"):
            yield command, flags._positional(cls), ["gs://bucket/x", *given[1:]]


def test_every_command_has_its_arguments_here():
    assert GIVEN.keys() == main.COMMANDS.keys()


@pytest.mark.parametrize(("command", "name", "args"), list(paths()))
def test_the_address_of_a_bucket_is_refused_wherever_a_path_is_given(
    command, name, args
):
    with pytest.raises(InputError, match=rf"^{name}: got gs:/+bucket/x, wanted a fo"):
        main.run([command, *args])
