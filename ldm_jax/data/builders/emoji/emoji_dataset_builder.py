"""Pictures of a colour-emoji font of this machine, with their Unicode names."""

import dataclasses
import hashlib
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from ldm_jax.data.color_fonts import ColorFont, find_font
from ldm_jax.data.emoji import Split, list_emoji

SPLITS: tuple[Split, ...] = ("train", "held_out")
SIDES = (64, 32, 128)


@dataclasses.dataclass(eq=False)
class EmojiConfig(tfds.core.BuilderConfig):
    """How large the pictures are.

    Attributes:
      pixels: Of a side.
    """

    pixels: int = 64


class Builder(tfds.core.GeneratorBasedBuilder):
    """Emoji of one font; what is prepared stays that font's, whatever comes later.

    `held_out` has combinations of parts that `train` has apart: see
    `ldm_jax.data.emoji`. `subject` is the name without the skin tone. The digest of the
    font is in the data set's metadata.
    """

    name = "emoji"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}  # noqa: RUF012 (TFDS' own convention)
    BUILDER_CONFIGS = [  # noqa: RUF012 (TFDS' own convention)
        EmojiConfig(name=str(side), description=f"{side}x{side} pixels.", pixels=side)
        for side in SIDES
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        pixels = self._side
        return self.dataset_info_from_configs(
            description="Colour emoji on white, with their Unicode names.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(
                        shape=(pixels, pixels, 3), dtype=np.uint8, encoding_format="png"
                    ),
                    "caption": tfds.features.Text(),
                    "subject": tfds.features.Text(),
                }
            ),
            metadata=tfds.core.MetadataDict(),
            disable_shuffling=True,  # record i is emoji i of its split
        )

    @property
    def _side(self) -> int:
        if not isinstance(self.builder_config, EmojiConfig):
            raise TypeError(f"got {self.builder_config!r}, wanted an EmojiConfig")
        return self.builder_config.pixels

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        del dl_manager  # nothing is downloaded
        path = find_font()
        font = ColorFont(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        metadata: Any = self.info.metadata
        metadata.update({"font": path.name, "font_sha256": digest})
        return {split: self._generate_examples(font, split) for split in SPLITS}

    def _generate_examples(
        self, font: ColorFont, split: Split
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        kept = [emoji for emoji in list_emoji(font) if emoji.split == split]
        for index, emoji in enumerate(kept):
            png = io.BytesIO()
            picture = font.draw(emoji.sequence, pixels=self._side)
            Image.fromarray(picture).save(png, format="PNG")
            yield (
                index,
                {
                    "image": png.getvalue(),
                    "caption": emoji.caption,
                    "subject": emoji.subject,
                },
            )
