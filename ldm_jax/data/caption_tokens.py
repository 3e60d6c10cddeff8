"""Captions as tokens, and the parts of a text that a tokenizer does not know."""

import json
from collections.abc import Mapping
from typing import Any

import tokenizers

from ldm_jax.data.sources import Examples, MappedExamples, caption_of
from ldm_jax.data.tokenizer import Tokenizer


class TokenizedExamples(MappedExamples):
    """Examples that have `tokens` beside their `caption`."""

    def __init__(self, examples: Examples, tokenizer: Tokenizer) -> None:
        """Wrap examples with captions."""

        def add_tokens(example: Mapping[str, Any], record: int) -> Mapping[str, Any]:
            caption = caption_of(example, f"example {record}")
            return {**example, "tokens": tokenizer.encode([caption])[0]}

        super().__init__(examples, add_tokens)


def count_truncated(captions: list[str], tokenizer: Tokenizer) -> int:
    """Count the captions with more tokens than a row holds."""
    backend = _untruncated(tokenizer)
    return sum(len(backend.encode(text).ids) > tokenizer.length for text in captions)


def unknown_parts(text: str, tokenizer: Tokenizer) -> list[str]:
    """Return the parts of a text that a tokenizer was not trained on, in order.

    These are unknown words; or, for byte pairs, bytes that no merge joins to another,
    as merges do with all bytes of the training texts.
    """
    backend = _untruncated(tokenizer)
    model = json.loads(backend.to_str())["model"]
    unknown = {model["vocab"].get(model.get("unk_token"))}
    if model["type"] == "BPE":
        joined = {part for pair in model["merges"] for part in pair}
        bytes_ = {token for token in model["vocab"] if len(token) == 1}
        unknown |= {model["vocab"][token] for token in bytes_ - joined}
    encoded = backend.encode(text)
    rows = zip(encoded.ids, encoded.offsets, strict=True)
    spans = dict.fromkeys(span for token, span in rows if token in unknown)
    return [text[start:stop] for start, stop in spans if stop > start]


def _untruncated(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.no_truncation()
    backend.no_padding()
    return backend
