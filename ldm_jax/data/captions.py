"""Captions as tokens, example by example."""

import json
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
    backend = _uncut(tokenizer)
    return sum(len(backend.encode(text).ids) > tokenizer.length for text in captions)


def strange_parts(text: str, tokenizer: Tokenizer) -> list[str]:
    """Return the parts of a text that a tokenizer has never met, in their order.

    Args:
      text: A prompt.

    Returns:
      What is an unknown word to it; or, for pairs of bytes, characters of bytes that
      it never joined to another, as it does with all that its texts had.
    """
    backend = _uncut(tokenizer)
    model = json.loads(backend.to_str())["model"]
    unmet = {model["vocab"].get(model.get("unk_token"))}
    if model["type"] == "BPE":
        joined = {part for pair in model["merges"] for part in pair}
        bytes_ = {token for token in model["vocab"] if len(token) == 1}
        unmet |= {model["vocab"][token] for token in bytes_ - joined}
    encoded = backend.encode(text)
    rows = zip(encoded.ids, encoded.offsets, strict=True)
    spans = dict.fromkeys(span for token, span in rows if token in unmet)
    return [text[start:stop] for start, stop in spans if stop > start]


def _uncut(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.no_truncation()
    backend.no_padding()
    return backend
