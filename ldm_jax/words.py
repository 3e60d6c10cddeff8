"""The tokenizer that a run learns from its own captions and keeps in its folder."""

import logging
from pathlib import Path

from ldm_jax.config import Config
from ldm_jax.data.byte_pairs import load_byte_pairs, train_byte_pairs, write_byte_pairs
from ldm_jax.data.captions import count_cut
from ldm_jax.data.sources import read_captions
from ldm_jax.data.tokenizer import TOKENIZER_FILE
from ldm_jax.interop.model import with_tokenizer

FOLDER = "tokenizer"


def own_tokenizer(config: Config, workdir: Path) -> Path | None:
    """Return the folder of the tokenizer a run learns; None if it learns none."""
    if "diffusion" not in config.stages:
        return None
    return workdir / FOLDER if config.diffusion.condition.learns_tokenizer else None


def with_own_tokenizer(config: Config, workdir: Path) -> Config:
    """Return the config with the tokenizer that the run learned, if it learns one."""
    return with_tokenizer(config, own_tokenizer(config, workdir))


def keep_tokenizer(config: Config, workdir: Path) -> None:
    """Learn a run's tokenizer from the captions it trains on, if it has yet to.

    Says once how many captions are longer than the context.

    Args:
      config: Of the run.
      workdir: Its folder.

    Raises:
      InputError: If there are no captions, or the vocabulary is too small.
      OSError: If it cannot be written.
    """
    folder = own_tokenizer(config, workdir)
    if folder is None or (folder / TOKENIZER_FILE).exists():
        return
    data, text = config.data, config.diffusion.condition.text
    captions = read_captions(data.source, data.train_split, directory=data.directory)
    write_byte_pairs(train_byte_pairs(captions, vocab_size=text.vocab_size), folder)
    cut = count_cut(captions, load_byte_pairs(folder, length=text.length))
    if cut:
        logging.getLogger(__name__).warning(
            "%d of %d captions are longer than the %d tokens of the context, and are "
            "cut; try a larger --diffusion.condition.text.length",
            *(cut, len(captions), text.length),
        )
