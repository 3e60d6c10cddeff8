"""Tokenizers of text encoders: texts to rows of token ids.

The rules come from the files beside the weights and are run by the library
`tokenizers`; nothing is downloaded.
"""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import tokenizers
from jaxtyping import Int
from tokenizers.processors import BertProcessing

from ldm_jax.types import InputError

TOKENIZER_FILE = "tokenizer.json"
VOCABULARY_FILE = "vocab.json"
MERGES_FILE = "merges.txt"
WORDPIECE_FILE = "vocab.txt"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_FILE = "special_tokens_map.json"
ADDED_FILE = "added_tokens.json"

ONE_MODEL = "try the tokenizer files of one model, unchanged"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """Maps texts to rows of token ids of one length."""

    backend: tokenizers.Tokenizer
    """Splits, looks up, truncates and pads."""
    length: int
    """Tokens of every row, with the begin token, the end token and the padding."""
    vocab_size: int
    """Rows that the embedding table needs."""
    pad_id: int
    """Token that fills a row after its end token."""
    eos_id: int
    """Token that ends every text, also a truncated one."""

    def encode(self, texts: list[str]) -> Int[np.ndarray, "b n"]:
        """Tokenize texts into int32.

        Raises:
          InputError: If a text is not valid Unicode, such as half a surrogate pair.
        """
        # One by one: the backend's batches start threads, and then a fork warns.
        rows = [self.backend.encode(_checked_text(text)).ids for text in texts]
        return np.asarray(rows, np.int32).reshape(len(texts), self.length)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a tokenizer's files to a new folder.

    Raises:
      InputError: If the source holds no tokenizer.
      OSError: If a file cannot be copied.
    """
    names = (
        *(TOKENIZER_FILE, VOCABULARY_FILE, MERGES_FILE, WORDPIECE_FILE),
        *(CONFIG_FILE, SPECIAL_FILE, ADDED_FILE),
    )
    found = [name for name in names if (source / name).is_file()]
    enough = (TOKENIZER_FILE,), (VOCABULARY_FILE, MERGES_FILE), (WORDPIECE_FILE,)
    if not any(set(found).issuperset(needed) for needed in enough):
        raise no_tokenizer(source)
    target.mkdir()
    for name in found:
        shutil.copyfile(source / name, target / name)


def finish(
    backend: tokenizers.Tokenizer, *, bos: str, eos: str, pad: str, length: int
) -> Tokenizer:
    """Add the begin and end tokens, truncation and padding to a backend.

    Args:
      backend: A backend that knows the three tokens; it is changed.
      bos: Token that begins every text.
      eos: Token that ends every text, also a truncated one.
      pad: Token that fills a row.
      length: Tokens of every row, at least 2.

    Raises:
      InputError: If the length is too small.
    """
    if length < 2:
        raise InputError(
            f"tokenizer length: got {length}, wanted at least 2, for begin and end"
        )
    ids = backend.get_vocab()
    backend.post_processor = BertProcessing((eos, ids[eos]), (bos, ids[bos]))
    backend.enable_truncation(max_length=length)
    backend.enable_padding(length=length, pad_id=ids[pad], pad_token=pad)
    return Tokenizer(
        backend=backend,
        length=length,
        vocab_size=len(ids),
        pad_id=ids[pad],
        eos_id=ids[eos],
    )


def _checked_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"text: got {text!r}, wanted Unicode ({error.reason} at position "
            f"{error.start})"
        ) from None
    return text


def split_lines(text: str) -> list[str]:
    """Split at line feeds; `str.splitlines` also splits at characters of tokens."""
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


def no_tokenizer(directory: Path) -> InputError:
    """Return the error of a folder without a tokenizer."""
    return InputError(
        f"{directory}: no tokenizer there, wanted {VOCABULARY_FILE} and {MERGES_FILE}, "
        f"or {TOKENIZER_FILE}; try the model's tokenizer folder"
    )
