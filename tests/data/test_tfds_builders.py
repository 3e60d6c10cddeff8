"""A user's TFDS builder, given by the path of its Python file."""

import shutil
import sys
import textwrap

import pytest

from ldm_jax.config import DataConfig
from ldm_jax.data.sources import find_class_names, open_source, read_captions
from ldm_jax.types import InputError

BUILDER = '''
import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from {neighbour} import CLASSES


class Builder(tfds.core.GeneratorBasedBuilder):
    """Grey squares, each darker than the one before."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(name="few"),
        tfds.core.BuilderConfig(name="many"),
    ]

    def _info(self):
        return self.dataset_info_from_configs(
            description="Squares.",
            features=tfds.features.FeaturesDict(
                {{
                    "image": tfds.features.Image(shape=(8, 8, 3), dtype=np.uint8),
                    "label": tfds.features.ClassLabel(names=CLASSES),
                    "caption": tfds.features.Text(),
                }}
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        return {{"train": self._generate_examples()}}

    def _generate_examples(self):
        for i in range({{"few": 2, "many": 4}}[self.builder_config.name]):
            image, png = np.full((8, 8, 3), 10 * i, np.uint8), io.BytesIO()
            Image.fromarray(image).save(png, format="PNG")
            words = {{"label": i % 2, "caption": f"square {{i}}"}}
            yield i, {{"image": png.getvalue(), **words}}
'''


def write(folder, name, *, package=None):
    """Write a builder and the module it imports, in a package if one is named."""
    inside = folder / package if package else folder
    inside.mkdir(parents=True, exist_ok=True)
    if package:
        (inside / "__init__.py").write_text("")
    (inside / f"{name}_classes.py").write_text('CLASSES = ["even", "odd"]\n')
    # In a package, a relative import.
    neighbour = f".{name}_classes" if package else f"{name}_classes"
    path = inside / f"{name}_dataset_builder.py"
    path.write_text(BUILDER.format(neighbour=neighbour))
    return path


@pytest.mark.parametrize(
    ("name", "package"), [("lone_squares", None), ("packed_squares", "squares_room")]
)
def test_a_builder_is_found_by_its_file_and_prepared(tmp_path, name, package):
    path = write(tmp_path / "code", name, package=package)
    data = str(tmp_path / "data")
    source_name = f"builder:{path}/many"
    assert DataConfig(source=source_name).source == source_name
    assert find_class_names(source_name, directory=data) == ("even", "odd")
    assert not (tmp_path / "data").exists()
    source = open_source(source_name, "train", directory=data)
    assert (source.class_names, source.channels) == (("even", "odd"), 3)
    assert [int(row["image"][0, 0, 0]) for row in source.examples] == [0, 10, 20, 30]
    assert read_captions(source_name, "train[:1]", directory=data) == ["square 0"]
    # Without a config name, TFDS takes the first config.
    first = open_source(f"builder:{path}", "train", directory=data)
    assert len(first.examples) == 2
    # A prepared data set opens without the builder's file.
    shutil.rmtree(tmp_path / "code")
    again = open_source(f"tfds:{name}/many", "train", directory=data)
    assert len(again.examples) == 4


def error_line(source, tmp_path):
    with pytest.raises(InputError) as caught:
        open_source(source, "train", directory=str(tmp_path / "data"))
    (line,) = str(caught.value).splitlines()
    assert line.startswith("data.source: ")
    return line


def test_unknown_builder_config_is_refused_with_the_nearest_name(tmp_path):
    path = write(tmp_path, "few_squares")
    line = error_line(f"builder:{path}/fwe", tmp_path)
    assert line.endswith("wanted a config of few_squares: few, many; try few")


def test_builder_path_that_is_missing_or_not_python_is_refused(tmp_path):
    line = error_line("builder:nowhere/x_dataset_builder.py/one", tmp_path)
    assert "no file nowhere/x_dataset_builder.py in " in line and "; try " in line
    assert "no Python file mnist in " in error_line("builder:mnist", tmp_path)
    assert find_class_names("builder:nowhere.py", directory=None) == ()
    with pytest.raises(InputError, match=r"folder:PATH or builder:FILE\.py"):
        DataConfig(source="bilder:x.py")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("broken_a", "x = 1\nx.y\n", " line 2 raised AttributeError: 'int' object"),
        ("broken_b", "import no_such_thing_here\n", " line 1 raised ModuleNotFound"),
        ("broken_c", "x =\n", " raised SyntaxError: invalid syntax"),
        ("broken_d", "x = 1\n", " has the builders none, wanted one class of"),
        ("json", "x = 1\n", " is imported as json, which is another file: "),
    ],
)
def test_file_without_a_builder_is_refused_in_one_line(tmp_path, name, text, message):
    path = tmp_path / f"{name}.py"
    path.write_text(text)
    assert f"data.source: {path}{message}" in error_line(f"builder:{path}", tmp_path)


def test_exception_of_a_builder_is_reported_with_its_line_number(tmp_path):
    path = write(tmp_path, "late_squares")
    text = path.read_text()
    path.write_text(text.replace("        for i in", "        1 / 0\n        for i in"))
    line = 1 + text[: text.index("        for i in")].count("\n")
    message = error_line(f"builder:{path}", tmp_path)
    assert message == f"data.source: {path} line {line} raised ZeroDivisionError: " + (
        "division by zero"
    )


def test_builder_image_that_needs_tensorflow_is_refused_with_advice(tmp_path):
    path = write(tmp_path, "array_squares")
    path.write_text(path.read_text().replace("png.getvalue()", "image"))
    message = error_line(f"builder:{path}", tmp_path)
    assert "No module named 'tensorflow'" in message and len(message) < 900
    assert "; try examples whose image is the bytes of a PNG file" in message


def test_file_with_two_builders_is_refused(tmp_path):
    path = tmp_path / "two_builders.py"
    path.write_text(
        textwrap.dedent("""
        import tensorflow_datasets as tfds
        class TwoOne(tfds.core.GeneratorBasedBuilder):
            pass
        class TwoOther(tfds.core.GeneratorBasedBuilder):
            pass
        """)
    )
    assert "has the builders TwoOne, TwoOther" in error_line(
        f"builder:{path}", tmp_path
    )


@pytest.mark.parametrize("name", ["someone:squares", "huggingface:squares/few:1.0.0"])
def test_a_community_data_set_is_not_downloaded_with_its_code(tmp_path, name):
    assert "a community data set" in error_line(f"tfds:{name}", tmp_path)


@pytest.mark.parametrize(
    "features",
    [
        '{"pythonClassName": "squares_evil.Feature"}',
        '{"python\\u0043lassName": "squares_evil.Feature"}',
        '{"type": "squares_evil.Feature", "content": {}}',
        '{"pythonClassName": "tensorflow_datasets.core.features.features_dict.Features'
        'Dict", "featuresDict": {"features": {"image": {"pythonClassName": '
        '"squares_evil.Feature"}}}}',
    ],
)
def test_a_prepared_data_set_imports_nothing(tmp_path, features, monkeypatch):
    (tmp_path / "squares_evil.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "data" / "sly_squares" / "1.0.0"
    folder.mkdir(parents=True)
    (folder / "features.json").write_text(features)
    (folder / "dataset_info.json").write_text('{"name": "sly_squares"}')
    assert "squares_evil.Feature" in error_line("tfds:sly_squares", tmp_path)
    assert "squares_evil" not in sys.modules
