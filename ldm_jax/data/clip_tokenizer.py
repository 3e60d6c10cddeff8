"""CLIP's tokenizer: byte-level BPE, read from the files beside the weights."""

from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers

from ldm_jax.data.tokenizer import (
    ADDED_FILE,
    CONFIG_FILE,
    MERGES_FILE,
    ONE_MODEL,
    SPECIAL_FILE,
    TOKENIZER_FILE,
    VOCABULARY_FILE,
    Tokenizer,
    finish,
    no_tokenizer,
    split_lines,
)
from ldm_jax.files import read_json, read_text
from ldm_jax.types import InputError

CLIP_PIECES = (
    r"<\|startoftext\|>|<\|endoftext\|>|'(?:s|t|re|ve|m|ll|d)"
    r"|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
)
"""Contractions, words, single digits, and runs of other characters but space."""
CLIP_END_OF_WORD = "</w>"
CLIP_SPECIAL = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}
ADDED_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def load_clip_tokenizer(directory: Path, *, length: int = 77) -> Tokenizer:
    """Load CLIP's byte-level BPE, as transformers' `CLIPTokenizer` reads it.

    The files state the padding token, which differs between models: the end token in
    Stable Diffusion 1; `!` in 2, which is then a separate token in every text.

    Args:
      directory: Holds `tokenizer.json`, or `vocab.json` and `merges.txt`; beside them
        `tokenizer_config.json` and `special_tokens_map.json` where they exist.
      length: Tokens of every row, at least 2.

    Raises:
      InputError: If a file is missing or malformed.

    Source:
      Radford et al., arXiv:2103.00020, sec. 2.4; Sennrich et al., arXiv:1508.07909.
    """
    vocabulary, merges, stated = _read_bpe(directory)
    special, added = _read_special(directory, stated, vocabulary)
    names = {name: token.content for name, token in special.items()}
    backend = _clip_backend(vocabulary, merges, names["unk_token"])
    # The order matters: of two tokens that differ only in flags, the later one stays.
    extra = [token for token in special.values() if token.content not in added]
    by_id = sorted(added.values(), key=lambda pair: pair[0])
    backend.add_tokens([*(token for _, token in by_id), *extra])
    for content, (stated_id, _) in added.items():
        if (got := backend.token_to_id(content)) != stated_id:
            raise InputError(
                f"{directory}: added token {content!r} is stated with id {stated_id}, "
                f"wanted {got}, the next one free; {ONE_MODEL}"
            )
    return finish(
        backend,
        bos=names["bos_token"],
        eos=names["eos_token"],
        pad=names["pad_token"],
        length=length,
    )


def _clip_backend(
    vocabulary: dict[str, int], merges: list[tuple[str, str]], unknown: str
) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=merges,
            unk_token=unknown,
            continuing_subword_prefix="",
            end_of_word_suffix=CLIP_END_OF_WORD,
        )
    )
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), spaces, normalizers.Lowercase()]
    )
    pieces = pre_tokenizers.Split(Regex(CLIP_PIECES), behavior="removed", invert=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pieces, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return backend


def _read_bpe(
    directory: Path,
) -> tuple[dict[str, int], list[tuple[str, str]], list[Any]]:
    """Read a vocabulary, its merges, and the added tokens of the same file."""
    path = merges_path = directory / TOKENIZER_FILE
    if path.is_file():
        tree = read_json(path, remedy=ONE_MODEL)
        model = tree.get("model")
        if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
            raise InputError(f"{path}: wanted a model of type BPE; {ONE_MODEL}")
        ids, merges = model.get("vocab"), model.get("merges")
        stated = tree.get("added_tokens", [])
        if not isinstance(stated, list):
            raise InputError(f"{path}: wanted a list of added tokens; {ONE_MODEL}")
    else:
        path, merges_path = directory / VOCABULARY_FILE, directory / MERGES_FILE
        if not (path.exists() or merges_path.exists()):
            raise no_tokenizer(directory)
        ids, stated = read_json(path, remedy=ONE_MODEL), []
        lines = split_lines(read_text(merges_path, remedy=ONE_MODEL))
        merges = [line for line in lines if not line.startswith("#version")]
    vocabulary = _checked_vocabulary(ids, path)
    return vocabulary, _checked_merges(merges, vocabulary, merges_path), stated


def _read_special(
    directory: Path, stated: list[Any], vocabulary: dict[str, int]
) -> tuple[dict[str, AddedToken], dict[str, tuple[int, AddedToken]]]:
    """Read the begin, end, unknown and padding tokens, and all tokens with stated ids.

    If `tokenizer_config.json` states ids, only it is read, as in transformers;
    otherwise `special_tokens_map.json` takes precedence.
    """
    config = _read_optional(directory / CONFIG_FILE)
    decoder = config.get("added_tokens_decoder")
    if decoder is None:
        config |= _read_optional(directory / SPECIAL_FILE)
        ids = _read_optional(directory / ADDED_FILE)
        stated = [*({"content": token, "id": i} for token, i in ids.items()), *stated]
    try:
        if decoder is not None:
            stated = [{**flags, "id": i} for i, flags in decoder.items()]
        special = {
            name: _added_token(config.get(name) or default, special=True)
            for name, default in CLIP_SPECIAL.items()
        }
        contents = {token.content for token in special.values()}
        added = {
            flags["content"]: (
                int(flags["id"]),
                _added_token(flags, special=flags["content"] in contents),
            )
            for flags in stated
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{directory}: cannot read its special tokens ({error!r}); {ONE_MODEL}"
        ) from error
    for name, token in special.items():
        if token.content not in vocabulary and token.content not in added:
            raise InputError(
                f"{directory}: got {token.content!r} as {name}, wanted a token of the "
                f"vocabulary; {ONE_MODEL}"
            )
    return special, added


def _added_token(value: Any, *, special: bool) -> AddedToken:
    """Make an added token from its text, or from its text and flags."""
    if isinstance(value, str):
        value = {"content": value}
    flags = {name: value[name] for name in ADDED_TOKEN_FLAGS if name in value}
    return AddedToken(value["content"], **{"special": special, **flags})


def _checked_vocabulary(ids: Any, path: Path) -> dict[str, int]:
    if not isinstance(ids, dict) or not ids:
        raise InputError(f"{path}: wanted an id for each token; {ONE_MODEL}")
    wanted = set(range(len(ids)))
    for token, i in ids.items():
        if type(i) is not int or i not in wanted:
            raise InputError(
                f"{path}: got {i!r} as the id of {token!r}, wanted every whole number "
                f"from 0 to {len(ids) - 1} once; {ONE_MODEL}"
            )
        wanted.remove(i)
    return ids


def _checked_merges(
    merges: Any, vocabulary: dict[str, int], path: Path
) -> list[tuple[str, str]]:
    if not isinstance(merges, list):
        raise InputError(f"{path}: got no merges; {ONE_MODEL}")
    pairs = []
    for i, merge in enumerate(merges):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or [type(x) for x in parts] != [str, str]:
            raise InputError(
                f"{path}: got {merge!r} as merge {i}, wanted two tokens and one space "
                "between"
            )
        left, right = parts
        unknown = [x for x in (left, right, left + right) if x not in vocabulary]
        if unknown:
            raise InputError(
                f"{path}: merge {i} names {unknown[0]!r}, which the vocabulary lacks; "
                f"{ONE_MODEL}"
            )
        pairs.append((left, right))
    return pairs


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path, remedy=ONE_MODEL) if path.exists() else {}
