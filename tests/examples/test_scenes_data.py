"""The scenes as a data set, a recipe and commands, as a user runs them."""

import ast
import re

import numpy as np
import pytest

from examples.scenes.draw import make_scene
from examples.scenes.scenes_dataset_builder import Builder
from ldm_jax import config as config_lib
from ldm_jax.config.load_config import load_config
from ldm_jax.data.sources import find_class_names, open_source
from ldm_jax.types import InputError
from tests.support.commands import ROOT, run, succeeded

SOURCE = "builder:examples/scenes/scenes_dataset_builder.py"
RECIPES = {"config": "one", "config_two": "two"}


def test_the_data_set_holds_what_is_drawn(tmp_path, monkeypatch):
    few = {"num_train": 3, "num_test": 2, "num_held_out": 1}
    for name, number in few.items():
        monkeypatch.setattr(Builder.builder_configs["three"], name, number)
    source = open_source(f"{SOURCE}/three", "train", directory=str(tmp_path))
    assert len(source.examples) == 3
    for i in range(3):
        row, scene = source.examples[i], make_scene("train", i, most=3, pixels=32)
        assert np.array_equal(row["image"], scene.image)
        assert bytes(row["caption"]).decode() == scene.caption
        assert np.array_equal(row["objects"], scene.rows)
    # Runs from before the builder was a file of its own name it so.
    assert len(open_source("tfds:scenes/three", "test", directory=str(tmp_path))[0])


def test_its_classes_are_pairs_and_its_configs_numbers(tmp_path):
    nowhere = str(tmp_path / "nowhere")
    assert find_class_names(f"{SOURCE}/one", directory=nowhere)[0] == "red circle"
    assert find_class_names(f"{SOURCE}/four", directory=nowhere) == ()
    with pytest.raises(InputError, match=r"a config of scenes: one, two.*; try one$"):
        open_source(f"{SOURCE}/onee", "train", directory=nowhere)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_reads_back_from_json_and_says_how_to_run_it(name):
    path = ROOT / f"examples/scenes/{name}.py"
    config = load_config(str(path))
    assert config_lib.from_json(config_lib.to_json(config)) == config
    assert config.data.source == f"{SOURCE}/{RECIPES[name]}"
    assert f"--config examples/scenes/{name}.py" in path.read_text()


@pytest.mark.parametrize("name", ["quality", "swapped_words"])
def test_a_command_runs_by_its_path_and_as_a_module(name):
    path = f"examples/scenes/{name}.py"
    command = re.search(
        r"python (-m \S+)",
        ast.get_docstring(ast.parse((ROOT / path).read_text())) or "",
    )
    assert command and command[1] == f"-m examples.scenes.{name}"
    for how in ((path,), ("-m", f"examples.scenes.{name}")):
        assert "--workdir" in succeeded(run(*how, "--help"))
