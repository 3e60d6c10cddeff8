"""The tokenizer that a run trains on its captions and keeps in its folder."""

import logging
from pathlib import Path

from ldm_jax.build import open_tokenizer
from ldm_jax.config import Config
from ldm_jax.config.run import with_tokenizer
from ldm_jax.data.byte_pair_tokenizer import (
    load_byte_pairs,
    train_byte_pairs,
    write_byte_pairs,
)
from ldm_jax.data.caption_tokens import count_truncated
from ldm_jax.data.sources import has_captions, read_captions
from ldm_jax.data.tokenizer import TOKENIZER_FILE, Tokenizer
from ldm_jax.files import check_file
from ldm_jax.training.checkpoint import CHECKPOINTS, newest_notes
from ldm_jax.training.metrics import METRICS_FILE

FOLDER = "tokenizer"
NOTE = "tokenizer"
MAX_COUNTED = 10_000
"""Captions that are checked for their length where training reads none first."""


def own_tokenizer(config: Config, workdir: Path) -> Path | None:
    """Return the folder of the tokenizer that a run trains; None if it trains none."""
    if "diffusion" not in config.stages:
        return None
    return workdir / FOLDER if config.diffusion.condition.learns_tokenizer else None


def with_own_tokenizer(config: Config, workdir: Path) -> Config:
    """Return a config with the tokenizer that the run trained, if it trains one.

    Raises:
      InputError: If its file is not what the run wrote.
    """
    folder = own_tokenizer(config, workdir)
    if folder is not None:
        check_file(workdir, folder / TOKENIZER_FILE)
    return with_tokenizer(config, folder)


def keep_tokenizer(config: Config, workdir: Path) -> None:
    """Train a run's tokenizer on the captions of its data, unless it has one.

    A lost tokenizer is restored from the run's checkpoints: trained again on changed
    captions, it would give its tokens other meanings.

    At the start of a run it warns how many captions are longer than the context,
    whatever the tokenizer.

    Raises:
      InputError: If there are no captions, the vocabulary is too small, or the
        tokenizer is not what the run wrote.
      OSError: If it cannot be written.
    """
    folder = own_tokenizer(config, workdir)
    if folder is None:
        if not (workdir / METRICS_FILE).exists():
            _warn_of_pretrained(config)
        return
    if (folder / TOKENIZER_FILE).exists():
        check_file(workdir, folder / TOKENIZER_FILE)
        return
    if (kept := _in_checkpoints(workdir / "diffusion" / CHECKPOINTS)) is not None:
        write_byte_pairs(kept, folder, run=workdir)
        return
    data, text = config.data, config.diffusion.condition.text
    captions = read_captions(data.source, data.train_split, directory=data.directory)
    learned = train_byte_pairs(captions, vocab_size=text.vocab_size)
    write_byte_pairs(learned, folder, run=workdir)
    tokenizer = load_byte_pairs(folder, length=text.length)
    _warn_of_cut(captions, tokenizer, "try a larger --diffusion.condition.text.length")


def tokenizer_notes(config: Config, workdir: Path) -> dict[str, str]:
    """Return the notes of a checkpoint: the tokenizer that the run trained, if any."""
    folder = own_tokenizer(config, workdir)
    if folder is None:
        return {}
    return {NOTE: (folder / TOKENIZER_FILE).read_text(encoding="utf-8")}


def _in_checkpoints(directory: Path) -> str | None:
    """Return the tokenizer in the newest checkpoint with intact notes."""
    return next((n[NOTE] for n in newest_notes(directory) if NOTE in n), None)


def _warn_of_pretrained(config: Config) -> None:
    """Warn of captions that a pretrained tokenizer truncates."""
    condition, data = config.diffusion.condition, config.data
    reads_text = "diffusion" in config.stages and condition.uses_tokens
    if not reads_text or condition.tokenizer is None:
        return
    if has_captions(data.source, directory=data.directory):
        captions = read_captions(
            data.source, data.train_split, directory=data.directory, limit=MAX_COUNTED
        )
        _warn_of_cut(captions, open_tokenizer(condition), "try shorter ones")


def _warn_of_cut(captions: list[str], tokenizer: Tokenizer, remedy: str) -> None:
    if cut := count_truncated(captions, tokenizer):
        logging.getLogger(__name__).warning(
            "%d of %d captions are longer than the %d tokens of the context, and are "
            "cut; %s",
            *(cut, len(captions), tokenizer.length, remedy),
        )
