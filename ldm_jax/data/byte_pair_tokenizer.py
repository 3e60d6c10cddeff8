"""A byte-level BPE tokenizer, trained on the captions of a data set.

Every text has tokens; none is unknown.
"""

from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from ldm_jax.data.tokenizer import ONE_MODEL, TOKENIZER_FILE, Tokenizer, finish
from ldm_jax.files import read_text, write_text
from ldm_jax.types import InputError

PAD, BEGIN, END = "[PAD]", "[BEGIN]", "[END]"
NUM_BYTES = 256
MIN_VOCAB_SIZE = NUM_BYTES + 3
"""Bytes, begin, end and padding."""


def train_byte_pairs(captions: Iterable[str], *, vocab_size: int) -> str:
    """Train a tokenizer and return the text of its file.

    Args:
      captions: Training texts; their order does not matter.
      vocab_size: Largest number of tokens, at least `MIN_VOCAB_SIZE`; texts with few
        repeated pairs give fewer.

    Raises:
      InputError: If `vocab_size` is too small.

    Source:
      Sennrich et al., arXiv:1508.07909; Radford et al., GPT-2 (on bytes).
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise InputError(
            f"diffusion.condition.text.vocab_size: got {vocab_size}, wanted at least "
            f"{MIN_VOCAB_SIZE} for a tokenizer of bytes and their pairs"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[PAD, BEGIN, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(sorted(captions), trainer)
    return backend.to_str(pretty=True)


def empty_prompt(length: int) -> tuple[int, ...]:
    """Return the tokens of the empty prompt, the same for every trained tokenizer."""
    return (1, 2, *(0,) * (length - 2))  # the special tokens are the first three


def write_byte_pairs(text: str, folder: Path, *, run: Path | None = None) -> None:
    """Write the file of a tokenizer atomically.

    Args:
      run: Folder of the run that it belongs to, if any.

    Raises:
      OSError: If it cannot be written.
    """
    folder.mkdir(exist_ok=True)
    write_text(folder / TOKENIZER_FILE, text, run=run)


def load_byte_pairs(folder: Path, *, length: int) -> Tokenizer:
    """Load a tokenizer that was trained on captions.

    A row is `[BEGIN]`, the tokens of the text, `[END]`, and `[PAD]` to the end.

    Args:
      folder: Folder of its file.
      length: Tokens of every row, at least 2.

    Raises:
      InputError: If the file is missing or not one of `train_byte_pairs`.
    """
    path = folder / TOKENIZER_FILE
    try:
        backend = tokenizers.Tokenizer.from_str(read_text(path, remedy=ONE_MODEL))
    except Exception as error:  # the library raises nothing narrower
        raise InputError(
            f"{path}: not a tokenizer ({' '.join(str(error).split())[:120]}); try the "
            "folder of a run that was trained on captions"
        ) from None
    ids = backend.get_vocab()
    if missing := [token for token in (PAD, BEGIN, END) if token not in ids]:
        raise InputError(
            f"{path}: got no {', '.join(missing)}, wanted a tokenizer trained on "
            "captions; try the folder of a run that was trained on them"
        )
    return finish(backend, bos=BEGIN, eos=END, pad=PAD, length=length)
