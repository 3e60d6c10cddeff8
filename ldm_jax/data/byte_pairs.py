"""A tokenizer learned from a data set's own captions, kept in the run's folder.

Byte-level: every text has tokens, none is unknown. Learned and run by `tokenizers`.
"""

import os
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from ldm_jax.data.tokenizer import TOKENIZER_FILE, Tokenizer, finish
from ldm_jax.types import InputError

PAD, BEGIN, END = "[PAD]", "[BEGIN]", "[END]"
NUM_BYTES = 256
SMALLEST = NUM_BYTES + 3


def train_byte_pairs(captions: Iterable[str], *, vocab_size: int) -> str:
    """Learn which pairs of bytes to join from texts.

    Args:
      captions: The texts; their order has no influence.
      vocab_size: Most tokens to have, at least 259: bytes, begin, end and padding.
        Fewer are had where the texts have no more to join.

    Returns:
      The tokenizer, as the text of its file.

    Raises:
      InputError: If there are too few tokens to tell the bytes apart.

    Source:
      Sennrich et al., arXiv:1508.07909; Radford et al., GPT-2 (on bytes).
    """
    if vocab_size < SMALLEST:
        raise InputError(
            f"diffusion.condition.text.vocab_size: got {vocab_size}, wanted at least "
            f"{SMALLEST} for a tokenizer of bytes and their pairs"
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
    """Return the tokens of the empty prompt: the same of every tokenizer made here."""
    return (1, 2, *(0,) * (length - 2))  # the special tokens are the first three


def write_byte_pairs(text: str, folder: Path) -> None:
    """Write the file of a tokenizer, whole or not at all.

    Raises:
      OSError: If it cannot be written.
    """
    folder.mkdir(exist_ok=True)
    part = folder / f"{TOKENIZER_FILE}.part"
    part.write_text(text, encoding="utf-8")
    os.replace(part, folder / TOKENIZER_FILE)


def load_byte_pairs(folder: Path, *, length: int) -> Tokenizer:
    """Load a tokenizer that was learned from captions.

    Args:
      folder: Holds its file.
      length: Tokens of every row, at least 2.

    Returns:
      The tokenizer; a text is `[BEGIN]`, its tokens, `[END]`, and `[PAD]` to the end.

    Raises:
      InputError: If the file is missing or is not what `train_byte_pairs` makes.
    """
    path = folder / TOKENIZER_FILE
    try:
        backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare ones
        raise InputError(
            f"{path}: not a tokenizer ({' '.join(str(error).split())[:120]}); try the "
            "folder of a run that was trained on captions"
        ) from None
    ids = backend.get_vocab()
    if missing := [token for token in (PAD, BEGIN, END) if token not in ids]:
        raise InputError(
            f"{path}: got no {', '.join(missing)}, wanted a tokenizer learned from "
            "captions; try the folder of a run that was trained on them"
        )
    return finish(backend, bos=BEGIN, eos=END, pad=PAD, length=length)
