"""The 1,797 UCI handwritten digits that ship inside scikit-learn."""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

NUM_TRAIN = 1500
SPLIT_SEED = 20260
GREY_LEVELS = 16


class Builder(tfds.core.GeneratorBasedBuilder):
    """Real handwritten digits, 8x8 grey, 1,500 to train on and 297 held out.

    Images are yielded as encoded PNG, so that TFDS neither decodes nor encodes them
    and TensorFlow is not needed. The split is a fixed permutation: scikit-learn keeps
    the digits in the order of their writers.

    Source:
      Alpaydin & Kaynak, UCI "Optical Recognition of Handwritten Digits" (1998), the
      test part, as `sklearn.datasets.load_digits`.
    """

    name = "digits"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}  # noqa: RUF012 (TFDS' own convention)

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description="The UCI handwritten digits of scikit-learn, 8x8 grey.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(
                        shape=(8, 8, 1), dtype=np.uint8, encoding_format="png"
                    ),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        del dl_manager  # nothing is downloaded
        order = np.random.RandomState(SPLIT_SEED).permutation(1797)
        return {
            "train": self._generate_examples(order[:NUM_TRAIN]),
            "test": self._generate_examples(order[NUM_TRAIN:]),
        }

    def _generate_examples(
        self, rows: np.ndarray
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        from sklearn.datasets import load_digits

        digits: Any = load_digits()
        for row in rows:
            grey = np.rint(digits.images[row] * (255.0 / GREY_LEVELS))
            png = io.BytesIO()
            Image.fromarray(grey.astype(np.uint8)).save(png, format="PNG")
            yield int(row), {"image": png.getvalue(), "label": int(digits.target[row])}
