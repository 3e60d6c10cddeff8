"""Pictures of one to three coloured shapes, and captions true of them."""

import dataclasses
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from examples.scenes.draw import SPLITS, SplitName, make_scene
from examples.scenes.things import MOST_THINGS, PAIRS

NAMES = {1: "one", 2: "two", 3: "three"}
NUM_TRAIN = {1: 20_000, 2: 40_000, 3: 40_000}
NUM_TEST, NUM_HELD_OUT = 2_000, 1_000


@dataclasses.dataclass(eq=False)
class SceneConfig(tfds.core.BuilderConfig):
    """How many things a picture has, how large it is, and how many there are."""

    most: int = 1
    """Things in a picture, at most; in [1, 3]."""
    pixels: int = 32
    """Of the picture's side; a divisor of 256."""
    num_train: int = 0
    """Examples to train on."""
    num_test: int = NUM_TEST
    """Examples of the same kind, to test on."""
    num_held_out: int = NUM_HELD_OUT
    """Examples with a pair of colour and shape that `train` never has."""


def _config(most: int, pixels: int) -> SceneConfig:
    name = NAMES[most] if pixels == 32 else f"{NAMES[most]}{pixels}"
    number = "One thing" if most == 1 else f"One to {NAMES[most]} things"
    return SceneConfig(
        name=name,
        description=f"{number} in a picture of {pixels}x{pixels} pixels.",
        most=most,
        pixels=pixels,
        num_train=NUM_TRAIN[most],
    )


class Builder(tfds.core.GeneratorBasedBuilder):
    """Captioned scenes, drawn here: nothing is downloaded.

    `image` is encoded as PNG, so that TFDS neither decodes nor encodes it and
    TensorFlow is not needed. `label` is the colour and shape of the first thing.
    `objects` has a row for each thing in the order of the caption's sense: shape,
    colour and size as indices of `examples.scenes.things`, x and y in points (256ths of
    the side); rows of -1 fill it up.
    """

    name = "scenes"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}  # noqa: RUF012 (TFDS' own convention)
    BUILDER_CONFIGS = [  # noqa: RUF012 (TFDS' own convention)
        _config(most, pixels) for pixels in (32, 64) for most in NAMES
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        pixels = self._scene_config.pixels
        return self.dataset_info_from_configs(
            description="Coloured shapes on a pale ground, with captions true of them.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(
                        shape=(pixels, pixels, 3), dtype=np.uint8, encoding_format="png"
                    ),
                    "caption": tfds.features.Text(),
                    "label": tfds.features.ClassLabel(
                        names=[f"{colour} {shape}" for colour, shape in PAIRS]
                    ),
                    "objects": tfds.features.Tensor(
                        shape=(MOST_THINGS, 5), dtype=np.int32
                    ),
                }
            ),
            supervised_keys=("image", "label"),
            disable_shuffling=True,  # record i is example i
        )

    @property
    def _scene_config(self) -> SceneConfig:
        if not isinstance(self.builder_config, SceneConfig):
            raise TypeError(f"got {self.builder_config!r}, wanted a SceneConfig")
        return self.builder_config

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        del dl_manager  # nothing is downloaded
        config = self._scene_config
        numbers = (config.num_train, config.num_test, config.num_held_out)
        return {
            split: self._generate_examples(split, number)
            for split, number in zip(SPLITS, numbers, strict=True)
        }

    def _generate_examples(
        self, split: SplitName, number: int
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        config = self._scene_config
        for index in range(number):
            scene = make_scene(split, index, most=config.most, pixels=config.pixels)
            png = io.BytesIO()
            Image.fromarray(scene.image).save(png, format="PNG")
            yield (
                index,
                {
                    "image": png.getvalue(),
                    "caption": scene.caption,
                    "label": scene.label,
                    "objects": scene.rows,
                },
            )
