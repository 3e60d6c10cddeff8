"""Drawn command lines: every one ends in one line, or does what it was asked to do."""

import dataclasses
import importlib
import json
import os
import random
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm_jax.cli import main
from ldm_jax.cli.exit_codes import run_main
from ldm_jax.config import flags
from ldm_jax.config.validation import in_words
from ldm_jax.images import write_png
from ldm_jax.pretrained.diffusers_export import write_folder
from ldm_jax.sampling.conditions import ImageSpec
from ldm_jax.sampling.metadata import make_metadata
from ldm_jax.sampling.sampling_config import SamplingConfig
from tests.support import tiny
from tests.support.commands import ROOT, write_run
from tests.support.models import model_of

NUM_DRAWN = int(os.environ.get("LDM_JAX_DRAWN", "40"))
"""Command lines of each door; each takes some milliseconds."""
HUGE = (2**31, 2**32, 2**62, 2**63, 2**64, 10**30)
CODES = {0, 1, 2, 75, 130}
MOST_LINES = 3
"""On the standard error output."""
TINY = str(ROOT / "tests/support/tiny.py")
RUN = ("--workdir", "run")

DOORS = {
    "train": [("--config", TINY, "--workdir", "new"), ("--config", "mine.json", *RUN)],
    "sample": [(*RUN, "--seeds", "0-1", "--labels", "0"), ("--replay", "picture.png")],
    "evaluate": [RUN, (*RUN, "--reconstructions")],
    "steps": [RUN],
    "report": [RUN, (*RUN, "--no-samples")],
    "plan": [("--config", TINY, "--topology", "local")],
    "serve": [("run", "--port", "0")],
    "import": [("weights", "--out", "new")],
    "export": [("run", "--out", "new")],
    "inspect": [("run",), ("weights",)],
    "check-images": [("pictures", "--out", "new.png")],
    "cache-latents": [(*RUN, "--out", "new")],
}
"""Good arguments of each sub-command, in the folder of `world`."""
WORK = {
    "train": [("ldm_jax.run", "train")],
    "sample": [
        ("ldm_jax.sampling.outputs", "write_images"),
        ("ldm_jax.sampling.synthetic_dataset", "write_dataset"),
        ("ldm_jax.sampling.metadata", "sample_images"),
    ],
    "evaluate": [
        ("ldm_jax.evaluation.evaluate", "evaluate"),
        ("ldm_jax.evaluation.evaluate", "evaluate_first_stage"),
    ],
    "steps": [("ldm_jax.evaluation.step_sweep", "sweep_steps")],
    "report": [("ldm_jax.tools.report.writing", "write_report")],
    "plan": [("ldm_jax.tools.plan.planner", "plan")],
    "serve": [("ldm_jax.tools.demo.renderer", "make_renderer")],
    "cache-latents": [("ldm_jax.training.encode_latents", "make_cache")],
}
"""What computes for long, behind good arguments: not done here."""
NUMBERS = ("-1", "0", "1", "2", "7", "1000", "0.5", "1e-9", "1e30", *(map(str, HUGE)))
WORDS = (
    *("", " ", "-", "--", "x", "none", "all", "²", "१", "1_0", "0x10", "1e400", "nan"),
    *("inf", "-inf", "-1", "0", "1", "2", "3.5", "1e-3", "9" * 30, "9" * 5000, "-0"),
    *("True", "a\nb", "a\x1b[31mb", "\0", "\udcff", "x" * 5000, "0-9", "9-0", "0/²"),
    *("0/1", "1,2", "1,,2", "v5e:2x2", "v5e:" + "9" * 5000, "localhost:99999999"),
    *("²:²", "[1:", "train[:²%]", "folder:", "folder:pictures", "builder:exit.py"),
    *("tfds:", "*", "$HOME", "%s", "{}", "--help=", "--seed", "-h=1"),
)
PATHS = (
    *(
        ".",
        "..",
        "/",
        "/dev/null",
        "~nobody/x",
        "~no one/x",
        "nowhere",
        "nowhere/deep",
        "run",
    ),
    *("text.txt", "text.txt/inside", "empty.txt", "empty", "loop", "fifo", "weights"),
    *("binary.json", "deep.json", "digits.json", "list.json", "exit.py", "syntax.py"),
    *("derived.py", "mine.json", "mine.py", "picture.png", "pictures", "gs://x/y"),
    *("broken", "broken/empty", "broken/deep", "broken/digits", "broken/binary"),
    *("a" * 300, "a/" * 3000, "a\0b", "a\nb", "\udcff", "run/../run", "broken.png"),
)
DEEP, DIGITS = "[" * 100_000 + "]" * 100_000, '{"seed": ' + "9" * 5000 + "}"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder of good files and of bad ones."""
    folder = tmp_path_factory.mktemp("world")
    write_run(tiny.get_config(), folder / "run")
    (folder / "weights").mkdir()
    write_folder(model_of(tiny.get_config()), folder / "weights")
    texts = {
        "text.txt": "text",
        "empty.txt": "",
        "deep.json": DEEP,
        "digits.json": DIGITS,
        "list.json": "[1]",
        "mine.json": (folder / "run/config.json").read_text(),
        "mine.py": Path(TINY).read_text(),
        "exit.py": "import sys\nsys.exit(0)\n",
        "syntax.py": "def get_config(:\n",
        "derived.py": "from ldm_jax.config import Config\n"
        "class Mine(Config):\n    pass\n\n\ndef get_config():\n    return Mine()\n",
        "broken.png": "no picture",
        "broken/empty/config.json": "",
        "broken/deep/config.json": DEEP,
        "broken/digits/config.json": DIGITS,
    }
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for name in ("binary.json", "broken/binary/config.json"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(range(256)))
    (folder / "empty").mkdir()
    (folder / "pictures").mkdir()
    for name in ("pictures/a.png", "pictures/b.png"):
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / name)
    metadata = make_metadata(
        ImageSpec({"label": "0"}, 0), SamplingConfig(workdir="run"), {}
    )
    write_png(folder / "picture.png", np.zeros((8, 8, 1), np.uint8), metadata)
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "fifo")
    return folder


class Done(BaseException):
    """The work has begun."""


@pytest.fixture
def work(world, monkeypatch):
    """Stand in for what computes; end a command where that begins."""

    def begin(*args, **kwargs):
        raise Done

    monkeypatch.chdir(world)
    shutil.rmtree("new", ignore_errors=True)
    for door, places in WORK.items():
        module = importlib.import_module(f"ldm_jax.cli.{main.COMMANDS[door].module}")
        if hasattr(module, "start"):
            monkeypatch.setattr(module, "start", lambda *args, **kwargs: None)
        for where, name in places:
            monkeypatch.setattr(importlib.import_module(where), name, begin)


def draw(door, seed):
    """Draw a command line: a good one with one or two changes."""
    rng = random.Random(f"{door} {seed}")
    args = list(rng.choice(DOORS[door]))
    for _ in range(rng.choice((1, 1, 2))):
        change, place = rng.randrange(10), rng.randrange(len(args)) if args else 0
        if change < 3 and args:
            args[place] = rng.choice(WORDS + PATHS)
        elif change == 3 and args:
            del args[place]
        elif change == 4 or not FLAGS[door]:
            args.insert(place, rng.choice(WORDS + PATHS))
        else:
            flag, kind = rng.choice(FLAGS[door])
            value = draw_value(rng, kind)
            args += [f"{flag}={value}"] if change == 5 else [flag, value]
    return args


def draw_value(rng, kind):
    """Draw a value of a flag: good, or nearly so, half of the times."""
    if rng.random() < 0.5:
        return rng.choice(WORDS + PATHS)
    wanted = in_words(kind)
    if "number" in wanted:
        return rng.choice(NUMBERS)
    if "one of " in wanted:
        return rng.choice(wanted.partition(" of ")[2].split(", "))
    return rng.choice(PATHS)


def flags_of(door):
    module = importlib.import_module(f"ldm_jax.cli.{main.COMMANDS[door].module}")
    cls = module.SampleArguments if door == "sample" else module.Flags
    assert dataclasses.is_dataclass(cls)
    return list(flags._flags(cls))


FLAGS = {door: flags_of(door) for door in DOORS}


def ended(door, args, capsys):
    """Run a command; return its exit code (None where its work began) and its words."""
    code = None
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # as `open_streams` opens them
    try:
        run_main(main.run, f"ldm {door}", [door, *args])
    except SystemExit as stop:
        code = stop.code
    except Done:
        pass
    said = capsys.readouterr()
    return code, said.out, said.err


def complaint(door, args, capsys):
    """Return what is wrong with how a command line ends; "" if nothing is."""
    code, out, err = ended(door, args, capsys)
    if code is None:  # its work began
        return ""
    if code not in CODES:
        return f"exit code {code}"
    if len(err.splitlines()) > MOST_LINES:
        return f"{len(err.splitlines())} lines: {err[:300]}"
    if "Traceback" in out + err or "unforeseen" in err:
        return err[-1000:]
    if code == 0 and "error:" in err:
        return f"exit code 0 with {err[:300]!r}"
    return "" if code or did_it(door, args, out) else f"0, but said {out[:300]!r}"


def did_it(door, args, out):
    """Return whether a command that ended with 0 left what it was asked for."""
    if flags.asks_help(args):
        return "usage: ldm" in out
    if door == "inspect" or "--json" in args:
        return bool(json.loads(out))
    out = re.sub(r"\\udc(..)", lambda byte: os.fsdecode(bytes.fromhex(byte[1])), out)
    names = [line.rpartition(" ")[2] for line in out.splitlines()]
    return any(map(os.path.exists, (*names, out.removesuffix("\n"))))


@pytest.mark.parametrize("door", DOORS)
def test_good_arguments_are_among_what_is_drawn_from(door, work, capsys):
    # Before the draws: some of them write where they are told to.
    codes = [ended(door, args, capsys)[0] for args in DOORS[door]]
    assert all(code in (None, 0) for code in codes), codes


@pytest.mark.parametrize("door", DOORS)
def test_a_drawn_command_line_ends_in_one_line_or_is_done(door, work, capsys):
    lines = [draw(door, seed) for seed in range(NUM_DRAWN)]
    found = {str(args)[:400]: complaint(door, args, capsys) for args in lines}
    assert not {args: words for args, words in found.items() if words}
