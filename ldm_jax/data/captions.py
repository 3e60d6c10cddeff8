"""Captions as tokens, example by example."""

from collections.abc import Mapping
from typing import Any

import tokenizers

from ldm_jax.data.sources import Examples, caption_of
from ldm_jax.data.tokenizer import Tokenizer


class Tokenized:
    """Examples whose `caption` has become `tokens` too."""

    def __init__(self, examples: Examples, tokenizer: Tokenizer) -> None:
        """Wrap examples that have a `caption` each."""
        self._examples = examples
        self._tokenizer = tokenizer

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self._examples)

    def __getitem__(self, record: int, /) -> Mapping[str, Any]:
        """Return one example, with its tokens."""
        example = self._examples[record]
        caption = caption_of(example, f"example {record}")
        return {**example, "tokens": self._tokenizer.encode([caption])[0]}


def count_cut(captions: list[str], tokenizer: Tokenizer) -> int:
    """Count the captions that are longer than the context, and so are cut."""
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.no_truncation()
    backend.no_padding()
    return sum(len(backend.encode(text).ids) > tokenizer.length for text in captions)
