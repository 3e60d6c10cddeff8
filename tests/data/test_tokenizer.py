import json
import pickle
import random
import warnings

import numpy as np
import pytest
from tokenizers.pre_tokenizers import ByteLevel

from ldm_jax.data.bert_tokenizer import load_bert_tokenizer
from ldm_jax.data.clip_tokenizer import load_clip_tokenizer
from ldm_jax.data.tokenizer import copy_tokenizer
from ldm_jax.types import InputError

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
MERGES = ["h e", "l o</w>", "he l", "hel lo</w>", "a t</w>", "c at</w>", "' s</w>"]
# As in CLIP: a token for every byte, `!` first, then each byte at the end of a word.
PRINTABLE_FIRST = sorted(ByteLevel.alphabet(), key=lambda x: (ord(x) >= 256, ord(x)))
VOCABULARY = [
    *PRINTABLE_FIRST,
    *(byte + "</w>" for byte in PRINTABLE_FIRST),
    *(merge.replace(" ", "") for merge in MERGES),
    *(BOS, EOS),
]
BOS_ID, EOS_ID = 519, 520


def flags(content, *, normalized=True, **more):
    off = dict.fromkeys(("lstrip", "rstrip", "single_word"), False)
    return {"content": content, "normalized": normalized, **off, **more}


# Files beside the vocabulary, as published with the weights.
SPECIAL = {"bos_token": flags(BOS), "eos_token": flags(EOS), "unk_token": flags(EOS)}
CONFIG = {name: {"__type": "AddedToken", **x} for name, x in SPECIAL.items()}
CONFIG |= {"pad_token": EOS, "do_lower_case": True, "model_max_length": 77}
STATED = {
    str(BOS_ID): flags(BOS, special=True),
    str(EOS_ID): flags(EOS, special=True),
}
NAMES = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS}
FOLDERS = {
    "bare": {},
    "sd1": {
        "tokenizer_config.json": CONFIG,
        "special_tokens_map.json": {**SPECIAL, "pad_token": EOS},
    },
    "sd2": {
        "tokenizer_config.json": CONFIG,
        "special_tokens_map.json": {**SPECIAL, "pad_token": "!"},
    },
    "stated": {
        "tokenizer_config.json": {
            **NAMES,
            "pad_token": "!",
            "added_tokens_decoder": {
                "0": flags("!", normalized=False, special=True),
                **STATED,
            },
        },
        # Ignored: `added_tokens_decoder` states the ids.
        "special_tokens_map.json": {"pad_token": EOS},
    },
    "added": {
        "tokenizer_config.json": CONFIG,
        "added_tokens.json": {"<cat-toy>": EOS_ID + 1, "sks": EOS_ID + 2},
    },
}


def write(directory, files):
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (directory / name).write_text(text, encoding="utf-8")
    return directory


def ids(tokens):
    return {token: i for i, token in enumerate(tokens)}


def write_clip(directory, kind="bare", **files):
    merges = "#version: 0.2\n" + "\n".join(MERGES) + "\n"
    basis = {"vocab.json": ids(VOCABULARY), "merges.txt": merges, **FOLDERS[kind]}
    return write(directory, basis | files)


def write_tokenizer_json(directory, **model):
    bpe = {"type": "BPE", "vocab": ids(VOCABULARY), "merges": MERGES, **model}
    added = [
        {"id": BOS_ID, **flags(BOS, normalized=False, special=True)},
        {"id": EOS_ID, **flags(EOS, normalized=False, special=True)},
    ]
    return write(directory, {"tokenizer.json": {"model": bpe, "added_tokens": added}})


def texts():
    """Return difficult texts and seeded mixtures of them."""
    pieces = [
        *("hello", "Hello", "HELLO", "cat", "CAT's", "it's", "we'LL", "'re", "don't"),
        *("!", "!!", "?!", ".", ",", "...", "-", "_", "<|>", "a/b", "#1", "(x)", "''"),
        *("0", "2026", "1,000", "½", "٣", " ", "  ", "\t", "\n", "\r\n", "\u00a0"),
        *("\u3000", "\u2028", "\x85", "\u200b", "\x00", "\x07", "é", "e\u0301", "ß"),
        *("İ", "ǅ", "Σς", "ﬁ", "Å", "中文", "日本語", "한글", "\u1112\u1161", "हिन्दी"),
        *(
            "😀",
            "👩‍👩‍👧",
            "🏳️‍🌈",
            "\ufeff",
            "\ufffd",
            "\uff41\uff42",
            "a\u0300\u0323",
            "™",
            "€",
        ),
        *(BOS, EOS, BOS.upper(), EOS.upper(), "<cat-toy>", "sks", "[SEP]", "[mask]"),
    ]
    rng = random.Random(0)
    mixed = ["".join(rng.choices(pieces, k=rng.randrange(1, 25))) for _ in range(300)]
    return ["", " ", "hello " * 500, "a" * 2000, *pieces, *mixed]


@pytest.fixture(scope="module")
def transformers():
    with warnings.catch_warnings():
        # Its import raises deprecation warnings.
        warnings.simplefilter("ignore")
        return pytest.importorskip(
            "transformers", reason="compares with the original: the extra `parity`"
        )


@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.parametrize("length", [77, 5, 2])
def test_clip_tokens_equal_those_of_transformers(transformers, tmp_path, kind, length):
    theirs = transformers.CLIPTokenizer.from_pretrained(write_clip(tmp_path, kind))
    ours = load_clip_tokenizer(tmp_path, length=length)
    wanted = theirs(
        texts(), padding="max_length", truncation=True, max_length=length
    ).input_ids
    assert ours.encode(texts()).tolist() == wanted
    assert (ours.pad_id, ours.eos_id) == (theirs.pad_token_id, theirs.eos_token_id)
    assert ours.vocab_size == len(theirs)


@pytest.mark.parametrize("kind", FOLDERS)
def test_clip_tokenizer_saved_by_transformers_gives_the_same_tokens(
    transformers, tmp_path, kind
):
    theirs = transformers.CLIPTokenizer.from_pretrained(write_clip(tmp_path, kind))
    theirs.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "vocab.json").exists()
    saved = load_clip_tokenizer(tmp_path / "saved")
    wanted = theirs(texts(), padding="max_length", truncation=True, max_length=77)
    assert saved.encode(texts()).tolist() == wanted.input_ids


# Recorded from transformers; the test runs without it.
def test_clip_tokens_equal_recorded_ones(tmp_path):
    tokenizer = load_clip_tokenizer(write_clip(tmp_path, "sd1"), length=8)
    rows = tokenizer.encode(["Hello cat's!", "", "é 12", "cat " * 9])
    assert rows.dtype == np.int32
    assert rows.tolist() == [
        [519, 515, 517, 518, 256, 520, 520, 520],
        [519, 520, 520, 520, 520, 520, 520, 520],
        [519, 127, 358, 272, 273, 520, 520, 520],
        [519, 517, 517, 517, 517, 517, 517, 520],
    ]


def test_clip_padding_is_the_pad_token_of_the_files(tmp_path):
    tokenizer = load_clip_tokenizer(write_clip(tmp_path, "sd2"), length=6)
    assert tokenizer.pad_id == 0
    assert tokenizer.eos_id == EOS_ID
    assert tokenizer.encode(["cat!", "hello"]).tolist() == [
        [519, 517, 0, 520, 0, 0],
        [519, 515, 520, 0, 0, 0],
    ]


def test_clip_tokens_ignore_spaces_and_case(tmp_path):
    tokenizer = load_clip_tokenizer(write_clip(tmp_path))
    rows = tokenizer.encode(["hello cat", "  HELLO \n\t Cat ", "hello\u00a0cat"])
    assert (rows == rows[0]).all()


def test_long_text_is_cut_and_keeps_its_end_token(tmp_path):
    tokenizer = load_clip_tokenizer(write_clip(tmp_path))
    rows = tokenizer.encode(["cat " * 75, "cat " * 76, "cat " * 10_000])
    assert rows.shape == (3, 77)
    assert (rows[:, 0] == BOS_ID).all()
    assert (rows[:, -1] == EOS_ID).all()
    assert (rows == rows[0]).all()


def test_encoding_no_texts_gives_no_rows(tmp_path):
    assert load_clip_tokenizer(write_clip(tmp_path)).encode([]).shape == (0, 77)


def test_a_tokenizer_survives_pickling(tmp_path):
    tokenizer = load_clip_tokenizer(write_clip(tmp_path, "sd2"))
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.encode(texts()).tolist() == tokenizer.encode(texts()).tolist()


@pytest.mark.parametrize("pairs", [False, True], ids=["strings", "pairs"])
def test_tokenizer_json_gives_the_tokens_of_vocab_and_merges(tmp_path, pairs):
    (tmp_path / "two").mkdir()
    two = load_clip_tokenizer(write_clip(tmp_path / "two"))
    merges = [merge.split(" ") for merge in MERGES] if pairs else MERGES
    one = load_clip_tokenizer(write_tokenizer_json(tmp_path, merges=merges))
    assert one.encode(texts()).tolist() == two.encode(texts()).tolist()


BAD_ID = {**ids(VOCABULARY), "!": 7}
BAD_CLIP = {
    "no vocab.json": ({"vocab.json": None}, "vocab.json: cannot be read"),
    "no merges.txt": ({"merges.txt": None}, "merges.txt: cannot be read"),
    "neither": ({"vocab.json": None, "merges.txt": None}, "no tokenizer there, wanted"),
    "cut JSON": ({"vocab.json": '{"a": 0,'}, "vocab.json: not JSON"),
    "a list": ({"vocab.json": ["a"]}, "got a JSON list, wanted an object"),
    "empty": ({"vocab.json": {}}, "wanted an id for each token"),
    "repeated id": ({"vocab.json": BAD_ID}, "got 7 as the id of .*, wanted every"),
    "id as text": ({"vocab.json": {"a": "0"}}, "got '0' as the id of 'a'"),
    "id true": ({"vocab.json": {"a": 0, "b": True}}, "got True as the id of 'b'"),
    "gap": ({"vocab.json": {"a": 0, "b": 2}}, "got 2 as the id of 'b', wanted every"),
    "unknown part": ({"merges.txt": "h e\nzz e"}, "merge 1 names 'zz', which the voc"),
    "unknown sum": ({"merges.txt": "x y"}, "merge 0 names 'xy', which the vocabulary"),
    "three parts": ({"merges.txt": "h e l"}, "got 'h e l' as merge 0, wanted two"),
    "blank merge": ({"merges.txt": "h e\n\nhe l"}, "got '' as merge 1, wanted two"),
    "no specials": (
        {"vocab.json": ids(VOCABULARY[:-2])},
        "got '<|startoftext|>' as bos_token, wanted a token of the vocabulary",
    ),
    "unknown pad": (
        {"special_tokens_map.json": {"pad_token": "<pad>"}},
        "got '<pad>' as pad_token, wanted a token of the vocabulary",
    ),
    "bad special": (
        {"special_tokens_map.json": {"pad_token": {"text": "!"}}},
        "cannot read its special tokens",
    ),
    "bad decoder": (
        {"tokenizer_config.json": {"added_tokens_decoder": ["!"]}},
        "cannot read its special tokens",
    ),
    "id of an added token": (
        {"added_tokens.json": {"sks": "next"}},
        "cannot read its special tokens",
    ),
    "wrong added id": (
        {"added_tokens.json": {"sks": 9}},
        "added token 'sks' is stated with id 9, wanted 521",
    ),
}


@pytest.mark.parametrize("case", BAD_CLIP)
def test_bad_clip_files_are_refused_in_one_line(tmp_path, case):
    files, message = BAD_CLIP[case]
    write_clip(tmp_path, "sd1", **{k: v for k, v in files.items() if v is not None})
    for name in (k for k, v in files.items() if v is None):
        (tmp_path / name).unlink()
    with pytest.raises(InputError) as error:
        load_clip_tokenizer(tmp_path)
    text = str(error.value)
    assert "\n" not in text
    assert text.startswith(str(tmp_path))
    assert_found(message, text)


def assert_found(message, text):
    """Assert that `text` holds the parts of `message` between `.*`, in order."""
    at = 0
    for part in message.split(".*"):
        assert part in text[at:], text
        at = text.index(part, at)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"type": "WordPiece"}, "wanted a model of type BPE"),
        ({"vocab": None}, "wanted an id for each token"),
        ({"merges": None}, "got no merges"),
        ({"merges": [["h"]]}, "got ['h'] as merge 0, wanted two tokens"),
        ({"merges": [["h", 2]]}, "got ['h', 2] as merge 0, wanted two tokens"),
        ({"merges": [7]}, "got 7 as merge 0, wanted two tokens"),
    ],
)
def test_bad_tokenizer_json_is_refused_in_one_line(tmp_path, model, message):
    with pytest.raises(InputError) as error:
        load_clip_tokenizer(write_tokenizer_json(tmp_path, **model))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_added_tokens_that_are_not_a_list_are_refused(tmp_path):
    bpe = {"type": "BPE", "vocab": ids(VOCABULARY), "merges": MERGES}
    write(tmp_path, {"tokenizer.json": {"model": bpe, "added_tokens": None}})
    with pytest.raises(InputError, match="wanted a list of added tokens"):
        load_clip_tokenizer(tmp_path)


def test_merges_that_are_not_utf8_are_refused(tmp_path):
    (write_clip(tmp_path) / "merges.txt").write_bytes(b"h e\n\xff\xfe")
    with pytest.raises(InputError, match=r"merges\.txt: got a file that is not UTF-8"):
        load_clip_tokenizer(tmp_path)


@pytest.mark.parametrize("length", [1, 0, -1])
def test_context_length_below_two_is_refused(tmp_path, length):
    with pytest.raises(InputError, match="wanted at least 2"):
        load_clip_tokenizer(write_clip(tmp_path), length=length)


def test_text_with_a_lone_surrogate_is_refused(tmp_path):
    # Python decodes a command line that is not UTF-8 to this.
    tokenizer = load_clip_tokenizer(write_clip(tmp_path))
    with pytest.raises(InputError, match=r"got 'caf\\udce9', wanted Unicode"):
        tokenizer.encode(["fine", "caf\udce9"])


WORDPIECE = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "!", ",", "'", "a", "s", "cafe"),
    *("hello", "cat", "##s", "##at", "c", "中", "1", "##2", "of", "un", "##able", "é"),
]


def write_bert(directory, tokens=WORDPIECE):
    return write(directory, {"vocab.txt": "".join(f"{token}\n" for token in tokens)})


@pytest.mark.parametrize("length", [77, 6, 2])
def test_bert_tokens_equal_those_of_transformers(transformers, tmp_path, length):
    theirs = transformers.BertTokenizer.from_pretrained(write_bert(tmp_path))
    ours = load_bert_tokenizer(tmp_path, length=length)
    wanted = theirs(
        texts(), padding="max_length", truncation=True, max_length=length
    ).input_ids
    assert ours.encode(texts()).tolist() == wanted
    assert (ours.pad_id, ours.eos_id) == (theirs.pad_token_id, theirs.sep_token_id)
    assert ours.vocab_size == len(theirs) == len(WORDPIECE)


# Recorded from transformers; the test runs without it.
def test_bert_tokens_equal_recorded_ones(tmp_path):
    tokenizer = load_bert_tokenizer(write_bert(tmp_path) / "vocab.txt", length=8)
    rows = tokenizer.encode(["Hello, CATS!", "", "Café dog", "unable " * 9])
    assert rows.dtype == np.int32
    assert rows.tolist() == [
        [2, 11, 6, 12, 13, 5, 3, 0],
        [2, 3, 0, 0, 0, 0, 0, 0],
        [2, 10, 1, 3, 0, 0, 0, 0],
        [2, 20, 21, 20, 21, 20, 21, 3],
    ]


def test_bert_vocabulary_may_be_a_folder_or_have_windows_line_ends(tmp_path):
    unix = load_bert_tokenizer(write_bert(tmp_path))
    (tmp_path / "windows.txt").write_bytes("\r\n".join(WORDPIECE).encode())
    windows = load_bert_tokenizer(tmp_path / "windows.txt")
    assert windows.encode(texts()).tolist() == unix.encode(texts()).tolist()


def test_bert_vocabulary_is_split_at_newlines_only(tmp_path):
    tokens = [*WORDPIECE, "\u2028", "\x85", "dog"]
    tokenizer = load_bert_tokenizer(write_bert(tmp_path, tokens), length=3)
    assert tokenizer.encode(["dog"])[0, 1] == len(tokens) - 1


def test_bert_vocabulary_without_a_mask_token_is_accepted(tmp_path):
    tokens = [token for token in WORDPIECE if token != "[MASK]"]
    tokenizer = load_bert_tokenizer(write_bert(tmp_path, tokens))
    assert tokenizer.vocab_size == len(tokens)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([*WORDPIECE, "cat"], "got 'cat' more than once, wanted one token a line"),
        (WORDPIECE[3:], "got no [UNK], [PAD], [CLS], wanted BERT's special tokens"),
        ([], "got no [UNK], [SEP], [PAD], [CLS]"),
    ],
)
def test_bad_wordpiece_file_is_refused_in_one_line(tmp_path, tokens, message):
    with pytest.raises(InputError) as error:
        load_bert_tokenizer(write_bert(tmp_path, tokens))
    assert str(error.value).startswith(f"{tmp_path / 'vocab.txt'}: {message}")
    assert "\n" not in str(error.value)


def test_missing_wordpiece_file_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere.txt"):
        with pytest.raises(InputError, match=r"\.txt: cannot be read \(No such file"):
            load_bert_tokenizer(path)


def test_copy_tokenizer_copies_the_tokenizer_files_only(tmp_path):
    write_clip(tmp_path, "sd1", **{"model.safetensors": "", "added_tokens.json": {}})
    copy_tokenizer(tmp_path, tmp_path / "copy")
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {
        *("vocab.json", "merges.txt", "tokenizer_config.json"),
        *("special_tokens_map.json", "added_tokens.json"),
    }
    ours, copied = (load_clip_tokenizer(x) for x in (tmp_path, tmp_path / "copy"))
    assert copied.encode(texts()).tolist() == ours.encode(texts()).tolist()


@pytest.mark.parametrize("present", [(), ("vocab.json",), ("tokenizer_config.json",)])
def test_copy_tokenizer_refuses_a_folder_without_a_tokenizer(tmp_path, present):
    write(tmp_path, dict.fromkeys(present, "{}"))
    with pytest.raises(InputError, match="no tokenizer there"):
        copy_tokenizer(tmp_path, tmp_path / "copy")
