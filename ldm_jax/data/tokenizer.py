"""From texts to the token ids that a text encoder was trained on.

The rules are read from the files that travel with the weights, and run by `tokenizers`;
nothing is downloaded.
"""

import dataclasses
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers
from tokenizers.processors import BertProcessing

from ldm_jax.types import InputError

TOKENIZER_FILE = "tokenizer.json"
VOCABULARY_FILE = "vocab.json"
MERGES_FILE = "merges.txt"
WORDPIECE_FILE = "vocab.txt"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_FILE = "special_tokens_map.json"
ADDED_FILE = "added_tokens.json"

# CLIP: contractions, words, single digits, runs of anything else but space.
CLIP_PIECES = (
    r"<\|startoftext\|>|<\|endoftext\|>|'(?:s|t|re|ve|m|ll|d)"
    r"|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
)
CLIP_END_OF_WORD = "</w>"
CLIP_SPECIAL = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}
BERT_SPECIAL = ("[UNK]", "[SEP]", "[PAD]", "[CLS]")
BERT_MASK = "[MASK]"
ADDED_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
ONE_MODEL = "try the tokenizer files of one model, unchanged"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """Texts in, rows of token ids out, all of one length."""

    backend: tokenizers.Tokenizer
    """Splits, looks up, truncates and pads."""
    length: int
    """Tokens of every row, the begin and end tokens and the padding included."""
    vocab_size: int
    """Rows that the embedding table needs."""
    pad_id: int
    """Fills a row after its end token."""
    eos_id: int
    """Ends every text, also a truncated one."""

    def encode(self, texts: list[str]) -> Int[np.ndarray, "b n"]:
        """Tokenize each text by itself, into int32.

        Raises:
          InputError: If a text holds what is no character, such as half of a pair.
        """
        # One by one: the backend's own batches start threads, and then a fork warns.
        rows = [self.backend.encode(_checked_text(text)).ids for text in texts]
        return np.asarray(rows, np.int32).reshape(len(texts), self.length)


def load_clip_tokenizer(directory: Path, *, length: int = 77) -> Tokenizer:
    """Load CLIP's byte-level BPE, as transformers' `CLIPTokenizer` reads it.

    The padding differs between models (Stable Diffusion 1: the end token; 2: `!`, which
    is then a token of its own wherever a text has it), so the files decide.

    Args:
      directory: Holds `tokenizer.json`, or `vocab.json` and `merges.txt`; beside them
        `tokenizer_config.json` and `special_tokens_map.json` where they exist.
      length: Tokens of every row, at least 2.

    Returns:
      The tokenizer.

    Raises:
      InputError: If a file is missing or is not what it should be.

    Source:
      Radford et al., arXiv:2103.00020, sec. 2.4; Sennrich et al., arXiv:1508.07909.
    """
    vocabulary, merges, stated = _read_bpe(directory)
    special, added = _read_special(directory, stated, vocabulary)
    names = {name: token.content for name, token in special.items()}
    backend = _clip_backend(vocabulary, merges, names["unk_token"])
    # The order counts: of two that differ only in their flags, the later one stays.
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


def load_bert_tokenizer(path: Path, *, length: int = 77) -> Tokenizer:
    """Load BERT's uncased WordPiece: what latent diffusion's own text encoder reads.

    Args:
      path: A `vocab.txt`, one token a line, or the folder that holds it.
      length: Tokens of every row, at least 2.

    Returns:
      The tokenizer; a text is `[CLS]`, its tokens, `[SEP]`, and `[PAD]` to the end.

    Raises:
      InputError: If the file is missing or is not what it should be.

    Source:
      Devlin et al., arXiv:1810.04805, sec. 3.
    """
    path = path / WORDPIECE_FILE if path.is_dir() else path
    tokens = _lines(_read_text(path))
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
        raise _no_tokenizer(source)
    target.mkdir()
    for name in found:
        shutil.copyfile(source / name, target / name)


def finish(
    backend: tokenizers.Tokenizer, *, bos: str, eos: str, pad: str, length: int
) -> Tokenizer:
    """Add the begin and end tokens, truncation and padding.

    Args:
      backend: Knows the three tokens; it is changed.
      bos: Begins every text.
      eos: Ends every text, also a truncated one.
      pad: Fills a row.
      length: Tokens of every row, at least 2.

    Returns:
      The tokenizer.

    Raises:
      InputError: If the length has no room for begin and end.
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
    """Read a vocabulary, its merges, and the tokens that the same file adds."""
    path = merges_path = directory / TOKENIZER_FILE
    if path.is_file():
        tree = _read_object(path)
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
            raise _no_tokenizer(directory)
        ids, stated = _read_object(path), []
        lines = _lines(_read_text(merges_path))
        merges = [line for line in lines if not line.startswith("#version")]
    vocabulary = _checked_vocabulary(ids, path)
    return vocabulary, _checked_merges(merges, vocabulary, merges_path), stated


def _read_special(
    directory: Path, stated: list[Any], vocabulary: dict[str, int]
) -> tuple[dict[str, AddedToken], dict[str, tuple[int, AddedToken]]]:
    """Read the begin, end, unknown and padding tokens, and all that have stated ids.

    Where `tokenizer_config.json` states ids, it alone counts, as in transformers;
    otherwise `special_tokens_map.json` goes before it.
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
    """Make a token that is looked up whole: from its text, or its text and flags."""
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


def _checked_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"text: got {text!r}, wanted Unicode ({error.reason} at position "
            f"{error.start})"
        ) from None
    return text


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); {ONE_MODEL}"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 ({error}); {ONE_MODEL}") from error


def _read_object(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not JSON ({error}); {ONE_MODEL}") from error
    if not isinstance(tree, dict):
        raise InputError(f"{path}: got a {type(tree).__name__}, wanted a JSON object")
    return tree


def _read_optional(path: Path) -> dict[str, Any]:
    return _read_object(path) if path.exists() else {}


def _lines(text: str) -> list[str]:
    # Not `splitlines`: it also cuts at characters that a token may hold.
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


def _no_tokenizer(directory: Path) -> InputError:
    return InputError(
        f"{directory}: no tokenizer there, wanted {VOCABULARY_FILE} and {MERGES_FILE}, "
        f"or {TOKENIZER_FILE}; try the model's tokenizer folder"
    )
