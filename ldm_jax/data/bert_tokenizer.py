"""BERT's uncased tokenizer, which latent diffusion's own text encoder reads."""

from collections import Counter
from pathlib import Path

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from ldm_jax.data.tokenizer import (
    ONE_MODEL,
    WORDPIECE_FILE,
    Tokenizer,
    finish,
    split_lines,
)
from ldm_jax.files import read_text
from ldm_jax.types import InputError

BERT_SPECIAL = ("[UNK]", "[SEP]", "[PAD]", "[CLS]")
BERT_MASK = "[MASK]"


def load_bert_tokenizer(path: Path, *, length: int = 77) -> Tokenizer:
    """Load BERT's uncased WordPiece tokenizer.

    A row is `[CLS]`, the tokens of the text, `[SEP]`, and `[PAD]` to the end.

    Args:
      path: A `vocab.txt` with one token a line, or its folder.
      length: Tokens of every row, at least 2.

    Raises:
      InputError: If the file is missing or malformed.

    Source:
      Devlin et al., arXiv:1810.04805, sec. 3.
    """
    path = path / WORDPIECE_FILE if path.is_dir() else path
    tokens = split_lines(read_text(path, remedy=ONE_MODEL))
    if repeated := [token for token, count in Counter(tokens).items() if count > 1]:
        raise InputError(
            f"{path}: got {repeated[0]!r} more than once, wanted one token a line"
        )
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if missing := [token for token in BERT_SPECIAL if token not in vocabulary]:
        raise InputError(
            f"{path}: got no {', '.join(missing)}, wanted BERT's special tokens; try "
            "the vocab.txt of bert-base-uncased"
        )
    backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    mask = [BERT_MASK] if BERT_MASK in vocabulary else []
    backend.add_special_tokens([*BERT_SPECIAL, *mask])
    return finish(backend, bos="[CLS]", eos="[SEP]", pad="[PAD]", length=length)
