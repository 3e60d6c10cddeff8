"""A tokenizer that is trained on captions: from the data set to the prompt."""

import dataclasses
import json
import logging
import os
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds

from examples.scenes.scenes_dataset_builder import Builder
from ldm_jax.build import build_model, null_tokens, open_split, open_tokenizer
from ldm_jax.config import ConditionConfig, DataConfig, TextConfig, digest, to_json
from ldm_jax.config.run import without_tokenizer
from ldm_jax.data import sources
from ldm_jax.data.byte_pair_tokenizer import (
    MIN_VOCAB_SIZE,
    load_byte_pairs,
    train_byte_pairs,
    write_byte_pairs,
)
from ldm_jax.data.caption_tokens import count_truncated, unknown_parts
from ldm_jax.data.sources import caption_of, open_source, read_captions
from ldm_jax.files import read_record, write_record
from ldm_jax.pretrained.load_run import load_run
from ldm_jax.rng import root_key
from ldm_jax.run import train
from ldm_jax.sampling.conditions import warn_of_prompts
from ldm_jax.training.checkpoint import Checkpoint, CheckpointStore
from ldm_jax.training.loop import CHECKPOINTS
from ldm_jax.training.train_tokenizer import (
    NOTE,
    keep_tokenizer,
    own_tokenizer,
    tokenizer_notes,
    with_own_tokenizer,
)
from ldm_jax.training.workdir import state_check
from ldm_jax.types import InputError
from tests.support.commands import sample_here
from tests.support.tiny import get_config

LENGTH = 16
CAPTIONS = [
    f"{article} {size} {colour} {shape} at the {place}"
    for article in ("a", "the")
    for size in ("small", "large")
    for colour in ("red", "blue", "green")
    for shape in ("circle", "square")
    for place in ("top", "left")
]


def texts(tokenizer, rows):
    return [tokenizer.backend.decode(list(row)).strip() for row in rows]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_byte_pairs(train_byte_pairs(CAPTIONS, vocab_size=400), folder)
    return load_byte_pairs(folder, length=LENGTH)


def test_train_byte_pairs_ignores_the_order_of_captions():
    one = train_byte_pairs(CAPTIONS, vocab_size=320)
    assert train_byte_pairs(reversed(CAPTIONS), vocab_size=320) == one


def test_words_of_captions_are_tokens_and_decode_back(tokenizer):
    rows = tokenizer.encode(CAPTIONS)
    assert rows.shape == (len(CAPTIONS), LENGTH) and rows.dtype == np.int32
    assert texts(tokenizer, rows) == CAPTIONS
    # Begin, six words and end: each word is one token.
    assert ((rows != tokenizer.pad_id).sum(axis=1) == 9).all()


@pytest.mark.parametrize("text", ["A RED circle", "ein roter Kreis", "赤い円 🔴", "\t"])
def test_no_text_has_unknown_tokens(tokenizer, text):
    (row,) = tokenizer.encode([text])
    assert row.max() < tokenizer.vocab_size
    assert len(set(row)) > 2


def test_upper_and_lower_case_give_equal_tokens(tokenizer):
    upper, lower = tokenizer.encode(["A RED Circle", "a red circle"])
    assert np.array_equal(upper, lower)


def test_a_caption_longer_than_the_context_is_counted_and_truncated(tokenizer):
    long = " ".join(["circle"] * 40)
    assert count_truncated([*CAPTIONS, long], tokenizer) == 1
    (row,) = tokenizer.encode([long])
    assert len(row) == LENGTH and row[-1] == tokenizer.eos_id


def test_parts_of_a_prompt_that_no_caption_has_are_reported(
    tokenizer, caplog, monkeypatch
):
    assert unknown_parts("a small red circle", tokenizer) == []
    assert unknown_parts("A SMALL red ж circle7", tokenizer) == ["ж", "7"]
    config = get_config()
    text = dataclasses.replace(config.diffusion.condition, context="text")
    diffusion = dataclasses.replace(
        config.diffusion, condition=text, transformer_depth=1
    )
    config = dataclasses.replace(config, diffusion=diffusion)
    monkeypatch.setattr(
        "ldm_jax.sampling.conditions._tokenizer", lambda condition: tokenizer
    )
    warn_of_prompts(build_model(config), ("a red circle", "a ж", "red " * LENGTH))
    messages = [record.getMessage() for record in caplog.records]
    assert messages[0] == "--prompt: 'a ж' has what the model's texts never had: ж"
    assert messages[1].endswith(
        f"is longer than the {LENGTH} tokens the model reads, and is cut"
    )
    assert len(messages) == 2


def test_a_vocabulary_below_the_minimum_is_refused():
    with pytest.raises(InputError, match=r"vocab_size: got 258, wanted at least 259"):
        train_byte_pairs(CAPTIONS, vocab_size=MIN_VOCAB_SIZE - 1)


def test_load_byte_pairs_refuses_other_files(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer.json: not a tokenizer"):
        load_byte_pairs(tmp_path, length=LENGTH)


def test_a_caption_that_is_not_utf8_is_refused():
    with pytest.raises(InputError, match=r"x, example 3: its caption is not UTF-8"):
        caption_of({"caption": b"\xff\xfe"}, "x, example 3")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tfds:digitz", r"got tfds:digitz, .*\); try digits$"),
        ("tfds:oxford_flower102", r"; try oxford_flowers102$"),
        ("tfds:mnist", r"not prepared .*; try: tfds build mnist --data_dir"),
    ],
)
def test_a_missing_data_set_is_refused_with_a_suggestion(tmp_path, name, message):
    with pytest.raises(InputError, match=message):
        open_source(name, "train", directory=str(tmp_path))


class Prepared:
    """A stand-in for a TFDS builder of a prepared data set."""

    def __init__(self, label=None, reads=True):
        label = {} if label is None else {"label": label}
        image = tfds.features.Image(shape=(8, 8, 3))
        features = tfds.features.FeaturesDict({"image": image, **label})
        self.info = SimpleNamespace(
            features=features, dataset_size=1, splits={"train": 2}
        )
        self.data_dir, self._reads = "folder", reads

    def as_data_source(self, split):
        if not self._reads:
            raise NotImplementedError("random access")
        if split != "train":
            raise ValueError(split)
        blank = np.zeros((8, 8, 3), np.uint8)
        return [{"image": blank, "label": b"Ada"}, {"image": blank, "label": b"Bo"}]


def opened(monkeypatch, builder, split="train"):
    monkeypatch.setattr(sources, "open_builder", lambda name, where: builder)
    return open_source("tfds:faces", split, directory="folder")


def test_a_label_without_classes_is_ignored(monkeypatch):
    source = opened(monkeypatch, Prepared(tfds.features.Text()))
    assert source.class_names == () and set(source.examples[1]) == {"image"}
    classes = tfds.features.ClassLabel(names=["a", "b"])
    source = opened(monkeypatch, Prepared(classes))
    assert source.class_names == ("a", "b") and "label" in source.examples[0]


def test_a_data_set_without_random_access_is_refused_with_a_command(monkeypatch):
    with pytest.raises(InputError, match=r"one by one; try .* --file_format array_rec"):
        opened(monkeypatch, Prepared(reads=False))


def test_a_misspelt_split_is_refused_with_the_nearest(monkeypatch):
    with pytest.raises(InputError, match=r"no split 'trian', wanted .*; try train$"):
        opened(monkeypatch, Prepared(), split="trian")


@pytest.fixture
def config(tmp_path, monkeypatch):
    """The tiny config as text to image, on a few scenes."""
    few = {"num_train": 24, "num_test": 10, "num_held_out": 4}
    for name, number in few.items():
        monkeypatch.setattr(Builder.builder_configs["one"], name, number)
    tiny = get_config()
    text = TextConfig(
        vocab_size=300, length=LENGTH, width=16, depth=1, num_heads=2, head_width=8
    )
    return dataclasses.replace(
        tiny,
        data=DataConfig(
            source="builder:examples/scenes/scenes_dataset_builder.py/one",
            directory=str(tmp_path / "data"),
            image_size=8,
            image_channels=3,
            num_classes=64,
            num_train_examples=24,
        ),
        diffusion=dataclasses.replace(
            tiny.diffusion,
            transformer_depth=1,
            condition=ConditionConfig(context="text", text=text, tokenizer="captions"),
        ),
    )


def test_a_run_learns_its_tokenizer_from_the_captions_it_trains_on(
    config, tmp_path, caplog
):
    with caplog.at_level(logging.WARNING):
        keep_tokenizer(config, tmp_path)
    data = config.data
    captions = read_captions(data.source, "train", directory=data.directory)
    assert len(captions) == 24
    kept = (tmp_path / "tokenizer/tokenizer.json").read_text()
    assert kept == train_byte_pairs(captions, vocab_size=300)
    opened = with_own_tokenizer(config, tmp_path)
    tokenizer = open_tokenizer(opened.diffusion.condition)
    cut = count_truncated(captions, tokenizer)
    assert 0 < cut < 24
    assert [text.partition(" are longer")[0] for text in caplog.messages] == [
        f"{cut} of 24 captions"
    ]
    examples = open_split(opened, "train").examples
    rows = [examples[i]["tokens"] for i in range(24)]
    assert np.array_equal(rows, tokenizer.encode(captions))
    assert null_tokens(config.diffusion.condition) == tuple(tokenizer.encode([""])[0])
    # A resumed run keeps its tokenizer.
    (tmp_path / "tokenizer/tokenizer.json").write_text(kept + "\n")
    keep_tokenizer(config, tmp_path)
    assert (tmp_path / "tokenizer/tokenizer.json").read_text() == kept + "\n"


def test_a_tokenizer_is_compared_with_the_record_of_its_run(config, tmp_path):
    record = {"configs": [], "data": None, "files": {}, "stages": {}}
    write_record(tmp_path, record)
    keep_tokenizer(config, tmp_path)
    with_own_tokenizer(config, tmp_path)
    path = tmp_path / "tokenizer/tokenizer.json"
    path.write_text(path.read_text() + "\n")
    for use in (keep_tokenizer, with_own_tokenizer):
        with pytest.raises(InputError, match=r"tokenizer\.json: got a file of the dig"):
            use(config, tmp_path)


def test_a_lost_tokenizer_is_restored_from_a_checkpoint(config, tmp_path):
    keep_tokenizer(config, tmp_path)
    path = tmp_path / "tokenizer/tokenizer.json"
    learned = train_byte_pairs(CAPTIONS, vocab_size=300)
    path.write_text(learned)  # of other captions than those of the data
    notes = tokenizer_notes(config, tmp_path)
    (tmp_path / "diffusion").mkdir()
    store = CheckpointStore(tmp_path / "diffusion" / CHECKPOINTS, keep=2)
    for step in (3, 12):
        store.save(step, {"w": np.ones(2)}, notes)
        store.wait()
    store.close()
    damaged = tmp_path / "diffusion" / CHECKPOINTS / "12" / "notes" / "metadata"
    damaged.write_text(damaged.read_text().replace("red", "rad"))
    path.unlink()
    keep_tokenizer(config, tmp_path)
    assert path.read_text() == learned


def test_every_checkpoint_holds_the_tokenizer_that_the_run_learned(
    config, tmp_path, monkeypatch
):
    def run_stage(stage, *, notes, **kwargs):
        kept.append(notes)
        raise KeyboardInterrupt  # before anything is trained

    kept = []
    monkeypatch.setattr("ldm_jax.run.run_stage", run_stage)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "run")
    text = (tmp_path / "run/tokenizer/tokenizer.json").read_text()
    assert [notes[NOTE] for notes in kept] == [text]
    assert kept[0]["config"]["diffusion"]["condition"]["tokenizer"] == "captions"


@pytest.mark.parametrize("has_record", [True, False])
def test_a_checkpoint_of_a_run_that_learned_its_tokenizer_is_compared_with_it(
    has_record, config, tmp_path
):
    (tmp_path / "config.json").write_text(to_json(config))
    names = {"configs": [digest(config, of_state=True)], "data": None}
    record = {**names, "files": {}, "stages": {}}
    if has_record:
        write_record(tmp_path, record)
    keep_tokenizer(config, tmp_path)
    notes = {"config": json.loads(to_json(config)), **tokenizer_notes(config, tmp_path)}
    if has_record:
        notes["record"] = read_record(tmp_path)
    state = SimpleNamespace(step=np.int32(4))
    key = jax.random.key_data(root_key(config.seed))
    tree = {"state": state, "root_key": key, "extra": {}}
    check = state_check(tmp_path, "diffusion")
    assert check(Checkpoint(4, tree, notes, "")) == ""
    others = {NOTE: notes[NOTE] + " "}
    reason = check(Checkpoint(4, tree, notes | others, ""))
    assert reason.startswith("it was trained with another tokenizer than ")


def test_the_first_stage_alone_reads_no_tokens(config, tmp_path):
    alone = dataclasses.replace(config, stages=("autoencoder",))
    assert own_tokenizer(alone, tmp_path) is None
    assert "tokens" not in open_split(without_tokenizer(alone), "train").examples[0]


def test_a_text_model_refuses_data_without_captions(config):
    digits = dataclasses.replace(
        config.data, source="tfds:digits", directory=None, num_train_examples=1500
    )
    with pytest.raises(InputError, match=r"tfds:digits has no 'tokens' but image"):
        open_split(dataclasses.replace(config, data=digits), "train")


@pytest.mark.skipif("LDM_JAX_SLOW" not in os.environ, reason="trains both stages")
def test_a_run_trained_on_captions_draws_samples_of_a_prompt(config, tmp_path):
    final = train(config, tmp_path / "run").final
    assert load_run(tmp_path / "run").digest == final["digest"]
    prompts = ("--prompt", "a red circle", "--seeds", "0-1", "--steps", "2")
    sample_here(
        *("--workdir", tmp_path / "run", "--out", tmp_path / "samples", *prompts)
    )
    assert len(list((tmp_path / "samples").glob("0*.png"))) == 2
