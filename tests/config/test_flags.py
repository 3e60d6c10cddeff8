import pytest

from configs.digits import get_config
from ldm_jax.cli.train import parse
from ldm_jax.config.flags import parse_list
from ldm_jax.config.load_config import load_config
from ldm_jax.types import InputError

CONFIG = "from ldm_jax.config import Config, DataConfig, OptimConfig\n"
DIGITS = ["--config", "configs/digits.py", "--workdir", "x"]


def error(call, *args, **kwargs) -> str:
    with pytest.raises(InputError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("3", [3]),
        ("0-3", [0, 1, 2, 3]),
        ("1,4,7", [1, 4, 7]),
        ("0-2,9,5-6", [0, 1, 2, 9, 5, 6]),
        ("7, 7", [7, 7]),
    ],
)
def test_parse_list_reads_numbers_and_ranges_in_order(text, numbers):
    assert parse_list(text, name="--seeds", low=0, high=9) == numbers


@pytest.mark.parametrize(
    "text", ["", "a", "1-", "-1", "1--3", "1-2-3", "1,,2", "²", "٣", "1" * 5000]
)
def test_parse_list_refuses_other_texts(text):
    assert "--seeds" in error(parse_list, text, name="--seeds", low=0, high=9)


def test_a_backward_range_is_refused_with_the_forward_one():
    assert "3-5" in error(parse_list, "5-3", name="--seeds", low=0, high=9)


def test_a_number_out_of_range_is_refused_with_the_range():
    message = error(parse_list, "0-10", name="--labels", low=0, high=9)
    assert "10" in message and "0 to 9" in message


def test_many_ranges_are_bounded_together():
    text = ",".join(["0-4999999"] * 1000)
    message = error(parse_list, text, name="--seeds", low=0, high=2**32 - 1)
    assert "at most 10000000 numbers" in message and len(message) < 400


def test_a_huge_range_out_of_bounds_is_refused_before_it_is_built():
    text = "0-99999999999999"
    assert "--seeds" in error(parse_list, text, name="--seeds", low=0, high=2**32 - 1)


def test_every_field_is_a_flag():
    arguments = parse(
        [*DIGITS, "--diffusion.optim.lr", "2e-4", "--autoencoder.channel-multipliers"]
        + ["1", "1", "--seed=7", "--diffusion.condition_dropout", "0"]
    )
    config = arguments.config
    assert config.diffusion.optim.lr == 2e-4
    assert config.autoencoder.channel_multipliers == (1, 1)
    assert config.seed == 7
    assert config.diffusion.condition_dropout == 0.0
    assert config.diffusion.steps == get_config().diffusion.steps


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--diffusion.optim.lrr", "1"],
            ["--diffusion.optim.lrr", "--diffusion.optim.lr"],
        ),
        (["--diffusion.stepz=3"], ["--diffusion.stepz", "--diffusion.steps"]),
        (["--sede", "1"], ["--sede", "--seed"]),
        (["--work-dir", "x"], ["--work-dir", "--workdir"]),
        (["--seed", "abc"], ["--seed", "abc"]),
        (["--seed", "-1"], ["--seed: got -1", "0 to 4294967295"]),
        (["--seed"], ["--seed"]),
        (["--diffusion.optim.lr", "-3"], ["--diffusion.optim.lr: got -3", "above 0"]),
        (["--data.source", "mnist"], ["--data.source: got 'mnist'", "tfds:digits"]),
        (["--diffusion.loss", "l3"], ["--diffusion.loss: got 'l3'", "did you mean l2"]),
        (["--autoencoder.steps", "1.5"], ["--autoencoder.steps", "1.5"]),
        (["stray"], ["stray"]),
        (["--seed", "9" * 5000], ["--seed: got '999", "whole number"]),
        (["--seed", "²"], ["--seed: got '²'", "whole number"]),
        (["--diffusion.steps", "9" * 30], ["--diffusion.steps: got 999", "at most"]),
        (["--profile", f"1:{'9' * 5000}"], ["--profile", "START:STOP"]),
        (["--profile", "1:²"], ["--profile", "START:STOP"]),
        (["--diffusion.channels", "65568"], ["--diffusion.channels: got", "at most"]),
        (
            ["--diffusion.channel-multipliers", "99999"],
            ["--diffusion.channel-multipliers: got", "at most 65536 channels"],
        ),
        (["--data.image-size", "65537"], ["--data.image-size: got", "at most 65536"]),
        (["--autoencoder.batch-size", "99999999"], ["--autoencoder.batch-size: got"]),
        (["--diffusion.steps", str(2**31)], ["--diffusion.steps: got", "at most"]),
        (["--parallel.stall-timeout", str(2**31)], ["--parallel.stall-timeout: got"]),
        (["--diffusion.condition.rescale-stages", str(2**62)], ["rescale-stages: got"]),
        (["--join-timeout", "0"], ["--join-timeout: got 0, wanted 1 to 1000000"]),
    ],
)
def test_a_bad_flag_is_refused_by_name_in_one_line(flags, words):
    message = error(parse, [*DIGITS, *flags])
    assert all(word in message for word in words), message


def test_a_missing_config_or_workdir_is_refused():
    assert "--config" in error(parse, ["--workdir", "x"])
    assert "--workdir" in error(parse, DIGITS[:2])


def test_a_dry_run_needs_no_workdir():
    assert parse([*DIGITS[:2], "--dry-run"]).workdir is None


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["no file"]),
        ("x = 1\n", ["get_config"]),
        ("def get_config():\n    return 3\n", ["int", "Config"]),
        ("def get_config():\n    return 1 / 0\n", ["line 2", "ZeroDivisionError"]),
        ("import nothing_of_that_name\n", ["nothing_of_that_name"]),
        ("x = 1\ndef get_config(:\n", ["mine.py line 2: invalid syntax"]),
        ("\0", ["mine.py"]),
        ("import sys\nsys.exit(0)\n", ["line 2 called sys.exit(0)"]),
        ("def get_config():\n    raise SystemExit\n", ["line 2 called sys.exit(None)"]),
        ("raise GeneratorExit\n", ["line 1 raised GeneratorExit"]),
        ("def get_config():\n    return get_config()\n", ["RecursionError"]),
        (f"{CONFIG}class Mine(Config):\n    pass\nget_config = Mine\n", ["Mine"]),
        (
            f"{CONFIG}class Mine(DataConfig):\n    pass\n"
            "get_config = lambda: Config(data=Mine())\n",
            ["data: got Mine(", "wanted DataConfig"],
        ),
        (
            f"{CONFIG}get_config = lambda: Config(seed=10**5000)\n",
            ["seed: got int that cannot be written"],
        ),
        (
            f"{CONFIG}get_config = lambda: Config(max_skipped_steps=2**63)\n",
            ["max_skipped_steps: got 9223372036854775808", "at most 92233720368547"],
        ),
        (
            f"{CONFIG}get_config = lambda: OptimConfig(lr=10**400)\n",
            ["lr: got 1000", "wanted a finite number"],
        ),
        (
            f"{CONFIG}get_config = lambda: Config(first_stage='')\n",
            ["first_stage: got"],
        ),
        (f"{CONFIG}get_config = lambda: Config(first_stage='a\\0')\n", ["first_stage"]),
        (
            "from ldm_jax.config import Config\ndef get_config():\n"
            "    return Config(seed=-4)\n",
            ["seed", "-4"],
        ),
    ],
)
def test_a_bad_config_file_is_refused_in_one_line(tmp_path, content, words):
    path = tmp_path / "mine.py"
    if content is not None:
        path.write_text(content)
    message = error(load_config, str(path))
    assert "--config" in message
    assert all(word in message for word in words), message


def test_values_of_derived_types_become_those_of_the_field(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        f"import enum\n{CONFIG}class Word(enum.StrEnum):\n    A = 'tfds:digits'\n"
        "    B = 'random'\nclass Number(enum.IntEnum):\n    A = 3\n"
        "get_config = lambda: Config(seed=Number.A, data=DataConfig("
        "source=Word.A, crop=Word.B))\n"
    )
    config = load_config(str(path))
    values = (config.seed, config.data.source, config.data.crop)
    assert values == (3, "tfds:digits", "random")
    assert [type(value) for value in values] == [int, str, str]


def test_a_config_that_is_not_json_is_refused_with_its_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("{")
    with pytest.raises(InputError, match=r"--config: .*config\.json: config: not JSON"):
        load_config(str(path))
