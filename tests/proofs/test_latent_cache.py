"""Training on cached latents equals training on images; other caches are refused."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.scenes.scenes_dataset_builder import Builder
from ldm_jax import config as config_lib
from ldm_jax import run
from ldm_jax.build import build_model, open_iterator, open_split
from ldm_jax.cli.cache_latents import parse
from ldm_jax.config import ConditionConfig
from ldm_jax.data.latent_cache import (
    CacheNote,
    LatentExamples,
    pack,
    read_note,
    shard_name,
    shard_range,
    to_json,
    unpack,
    write_note,
)
from ldm_jax.data.pipeline import LatentBatch, to_batch
from ldm_jax.files import write_record
from ldm_jax.parallel.make_layout import PmapLayout
from ldm_jax.parallel.reduce import reduce_over_axis
from ldm_jax.pretrained.frozen import (
    PretrainedWeights,
    load_frozen,
    open_encoders,
    save_frozen,
)
from ldm_jax.rng import root_key
from ldm_jax.training import encode_latents as making
from ldm_jax.training import latent_cache as reading
from ldm_jax.training.diffusion_stage import diffusion_stage
from ldm_jax.training.diffusion_step import FrozenParams
from ldm_jax.training.dry_run import batch_shapes, describe
from ldm_jax.training.encode_latents import make_cache, make_shards, plan_cache
from ldm_jax.training.latent_encoders import Encoded, Encoders, encode_records
from ldm_jax.training.latent_shards import find_shards
from ldm_jax.types import InputError, RunError
from tests.data.test_tokenizer import write_clip
from tests.support import tiny
from tests.support.models import config_of, model_of

NUM, BATCH, STEPS = 24, 8, 5
SMALL = {"channel_multipliers": (1,), "attention_downsampling": (1,)}
SCENES = "builder:examples/scenes/scenes_dataset_builder.py/one"
MOMENTS = {"label": 8, "none": 3, "clip": 8}


class Prepared:
    """A run folder with a first stage, and a cache of its latents."""

    def __init__(self, kind: str, folder: Path, **data) -> None:
        self.kind, self.workdir, self.out = kind, folder / "run", folder / "latents"
        config = config_of(kind, **SMALL, batch_size=BATCH, condition_dropout=0.5)
        source = {"train_split": f"train[:{NUM}]", "num_train_examples": NUM, **data}
        self.config = dataclasses.replace(
            config,
            first_stage="elsewhere",
            data=dataclasses.replace(config.data, **source),
        )
        if kind == "clip":
            self.config = self.of_condition(tokenizer=str(write_clip(folder, "sd1")))
        self.model = build_model(self.config)
        self.weights = model_of(self.config)
        self.workdir.mkdir()
        text = config_lib.to_json(self.config)
        (self.workdir / "config.json").write_text(text)
        first_stage = (self.weights.autoencoder, jnp.float32(0.5))
        trained = self.config.diffusion.condition.trained
        kept = {} if trained else self.weights.conditioner
        save_frozen(PretrainedWeights(None, first_stage, kept), self.workdir)

    def make(self, **options):
        options = {"num_shards": 5, "batch_size": 2, "states": True, **options}
        return make_cache(
            self.config, self.workdir, self.out, open_encoders=open_encoders, **options
        )

    def of_condition(self, **fields):
        second = self.config.diffusion
        condition = dataclasses.replace(second.condition, **fields)
        second = dataclasses.replace(second, condition=condition)
        return dataclasses.replace(self.config, diffusion=second)

    def reading(self, config=None, **data):
        """Return the config of a run that reads the cache."""
        config = config or self.config
        data = {"latents": str(self.out), **data}
        data = dataclasses.replace(config.data, **data)
        return dataclasses.replace(config, data=data)

    def frozen_weights(self):
        return load_frozen(self.config, self.model, self.workdir)

    def train(self, config):
        """Train a few steps; return the batches' indices and labels, and the losses."""
        frozen_weights, layout = self.frozen_weights(), PmapLayout(jax.devices()[:1])
        note = checked(config, frozen_weights, self.workdir)
        cache = reading.open_cache(config, frozen_weights.first_stage[0], note)
        opened = functools.partial(open_iterator, config)
        if cache is not None:
            opened = functools.partial(reading.open_latents, cache, seed=config.seed)
        stage = diffusion_stage(
            config,
            self.model,
            FrozenParams(*frozen_weights.first_stage, frozen_weights.conditioner),
            self.workdir,
            null_embedding=None if cache is None else cache.null_embedding,
        )
        step = jax.jit(functools.partial(stage.step, reduce=reduce_over_axis))
        state = jax.eval_shape(stage.init)
        params = state.params._replace(unet=self.weights.unet)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state)
        state = zeros._replace(params=params, ema=params)
        examples_seen, losses = [], []
        iterator = opened(batch_size=BATCH, layout=layout)
        for _ in range(STEPS):
            batch = to_batch(next(iterator))
            assert isinstance(batch, LatentBatch) == (cache is not None)
            state, metrics = step(state, stage.frozen, batch, root_key(0))
            examples_seen.append((batch.example_index.tolist(), batch.label.tolist()))
            losses.append((float(metrics.loss), float(metrics.gradient_norm)))
        iterator.close()
        return stage, examples_seen, np.asarray(losses)


@pytest.fixture(scope="module", params=["label", "none", "clip"])
def prepared(request, tmp_path_factory):
    """Caches of a KL model, a VQ model, and a model with a frozen text encoder."""
    folder, data = tmp_path_factory.mktemp(request.param), {}
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "clip":
            for name, number in (("train", NUM), ("test", 10), ("held_out", 4)):
                patch.setattr(Builder.builder_configs["one"], f"num_{name}", number)
            data = {"source": SCENES, "directory": str(folder / "data")}
            data |= {"num_classes": 64, "train_split": "train"}
        made = Prepared(request.param, folder, **data)
        assert made.make().num_made == 5
        yield made


def test_losses_on_latents_equal_losses_on_images(prepared):
    kind = prepared.kind
    _, examples_seen, losses = prepared.train(prepared.config)
    stage, again, found = prepared.train(prepared.reading())
    assert again == examples_seen  # the same examples, hence the same noise
    assert found == pytest.approx(losses, rel=1e-5)
    assert len({loss for loss, _ in losses}) == STEPS
    assert stage.frozen.autoencoder == {}
    assert read_note(prepared.out).fields[0].shape[-1] == MOMENTS[kind]
    if kind == "clip":
        assert stage.frozen.conditioner == {}
        assert stage.frozen.null_embedding.shape == (77, 16)
        check_tokens(prepared)


def check_tokens(prepared):
    """Check that an encoder in training reads the captions of the same cache."""
    config = prepared.reading(prepared.of_condition(trained=True))
    note = checked(config, prepared.frozen_weights(), prepared.workdir)
    cache = reading.open_cache(config, prepared.weights.autoencoder, note)
    assert cache.null_embedding is None and "embedding" not in cache.examples[0]
    source = open_split(prepared.config, "train").examples
    for i in range(NUM):
        assert np.array_equal(cache.examples[i]["tokens"], source[i]["tokens"])


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    made = Prepared("label", tmp_path_factory.mktemp("cached"))
    made.make(num_shards=2)
    return made


def test_make_cache_writes_only_a_damaged_shard_again(cached):
    files = {path: path.read_bytes() for path in cached.out.iterdir()}
    (cached.out / shard_name(1, 2)).write_bytes(b"torn")
    with pytest.raises(InputError, match=r"has 4 bytes, wanted \d+ bytes; give the"):
        checked(cached.reading(), cached.frozen_weights(), cached.workdir)
    assert cached.make(num_shards=None).num_made == 1
    assert cached.make(num_shards=2).num_made == 0
    assert {path: path.read_bytes() for path in cached.out.iterdir()} == files


def test_a_run_with_its_own_cache_equals_a_run_given_that_cache(tmp_path, monkeypatch):
    """A resumed run writes a missing shard again and keeps the others."""
    one = PmapLayout(jax.devices()[:1])
    for room, name in ((run, "make_layout"), (making, "PmapLayout")):
        monkeypatch.setattr(room, name, lambda *_: one)
    config = tiny.get_config()
    data = {"train_split": f"train[:{NUM}]", "num_train_examples": NUM}
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, **data, latents="own"),
        autoencoder=dataclasses.replace(config.autoencoder, steps=1),
        diffusion=dataclasses.replace(config.diffusion, steps=2),
        log=dataclasses.replace(config.log, images_every=1000),
    )
    own, given = tmp_path / "own", tmp_path / "given"
    final = run.train(config, own).final
    latents = own / "latents"
    reader = dataclasses.replace(
        config,
        first_stage=str(own),
        data=dataclasses.replace(config.data, latents=str(latents)),
    )
    digest = run.train(reader, given).final["digest_by_stage"]["diffusion"]
    assert digest == final["digest_by_stage"]["diffusion"]

    lost, *kept = sorted(latents.glob("*.array_record"))
    before = lost.read_bytes(), [path.stat().st_mtime_ns for path in kept]
    lost.unlink()
    kept_config, note = making.keep_latents(config, own, open_encoders=open_encoders)
    assert kept_config.data.latents == str(latents) and note == read_note(latents)
    assert before == (lost.read_bytes(), [path.stat().st_mtime_ns for path in kept])


def test_a_dry_run_on_latents_reports_the_same_as_one_on_images():
    config, layout = config_of("clip", **SMALL), PmapLayout(jax.devices()[:1])
    data = dataclasses.replace(config.data, latents="not there")
    cached = dataclasses.replace(config, data=data, first_stage="elsewhere")
    config = dataclasses.replace(config, first_stage="elsewhere")
    assert describe(config, layout) == describe(cached, layout)
    shapes = functools.partial(batch_shapes, build_model(cached), cached.data)
    batch = shapes("diffusion", 4)
    assert batch.moments.shape == (4, 8, 8, 8) and batch.tokens is None
    assert batch.embedding.shape == (4, 77, 16)
    assert shapes("autoencoder", 4).image.shape == (4, 16, 16, 3)


def checked(config, frozen_weights, workdir):
    first_stage = frozen_weights.first_stage
    return reading.check_cache(
        config,
        build_model(config),
        workdir,
        first_stage=first_stage and first_stage[0],
        conditioner=frozen_weights.conditioner,
    )


def refused(cached, config, *, frozen_weights=None, workdir=None):
    with pytest.raises(InputError) as caught:
        frozen_weights = frozen_weights or cached.frozen_weights()
        checked(config, frozen_weights, workdir or cached.workdir)
    message = str(caught.value)
    assert message.startswith("data.latents:") and "\n" not in message
    return message


def test_a_cache_of_another_first_stage_is_refused_with_both_digests(cached):
    params = jax.tree.map(lambda leaf: leaf * 1.0001, cached.weights.autoencoder)
    frozen_weights = PretrainedWeights(None, (params, jnp.float32(0.5)), {})
    line = refused(cached, cached.reading(), frozen_weights=frozen_weights)
    assert "was made by another first stage" in line
    assert read_note(cached.out).first_stage[:12] in line
    with pytest.raises(InputError, match="another first stage"):
        reading.open_cache(cached.reading(), params, read_note(cached.out))


def test_a_cache_without_captions_is_refused_for_a_text_model(cached):
    config = cached.reading()
    condition = ConditionConfig(context="text")
    text = {"condition": condition, "transformer_depth": 1}
    diffusion = dataclasses.replace(config.diffusion, **text)
    line = refused(cached, dataclasses.replace(config, diffusion=diffusion))
    assert "holds no captions, which this model reads" in line


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"image_size": 32}, "data.image_size (16 there, 32 here)"),
        ({"train_split": "train"}, "data.train_split ('train[:24]' there, 'train'"),
        ({"source": "tfds:mnist"}, "data.source ('tfds:digits' there, 'tfds:mnist'"),
        ({"num_train_examples": 25}, "data.num_train_examples (24 there, 25 here)"),
        ({"num_classes": 9}, "data.num_classes (10 there, 9 here)"),
    ],
)
def test_a_cache_of_other_data_is_refused_by_field(cached, fields, words):
    assert words in refused(cached, cached.reading(**fields))


def test_a_cache_computed_in_another_precision_is_refused(cached):
    half = dataclasses.replace(cached.config.autoencoder, dtype="bfloat16")
    config = dataclasses.replace(cached.config, autoencoder=half)
    line = refused(cached, cached.reading(config))
    assert "autoencoder.dtype ('float32' there, 'bfloat16' here)" in line


def test_missing_unfinished_and_damaged_caches_are_refused(cached, tmp_path):
    config = cached.reading(latents=str(tmp_path))
    assert "is no cache of latents (no cache.json)" in refused(cached, config)
    note = dataclasses.replace(read_note(cached.out), shards=())
    write_note(tmp_path, note)
    assert "is not finished; give the same command of" in refused(cached, config)
    (tmp_path / "cache.json").write_text(json.dumps({**to_json(note), "format": 3}))
    assert "has the format 3, wanted one of" in refused(cached, config)
    (tmp_path / "cache.json").write_text("{")
    assert "cache.json: not JSON" in refused(cached, config)


def test_latents_are_refused_before_the_first_stage_is_trained(cached, tmp_path):
    line = refused(
        cached,
        cached.reading(),
        frozen_weights=PretrainedWeights(None, None, {}),
        workdir=tmp_path,
    )
    assert "is not trained yet" in line and "try --first-stage" in line


def test_a_flipped_bit_of_a_shard_is_detected_on_reading(cached, tmp_path, monkeypatch):
    for path in cached.out.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    shard = tmp_path / shard_name(1, 2)
    data = bytearray(shard.read_bytes())
    data[5000] ^= 1  # among the records, which begin near the start of the file
    shard.write_bytes(data)
    config, params = cached.reading(latents=str(tmp_path)), cached.weights.autoencoder
    note = checked(config, cached.frozen_weights(), cached.workdir)
    with pytest.raises(InputError, match=r"damaged \(.*; give the same command"):
        reading.open_cache(config, params, note)
    # A large cache is checked during training, by the reading thread.
    monkeypatch.setattr(reading, "MAX_BYTES_IN_MEMORY", 0)
    cache = reading.open_cache(config, params, note)
    layout = PmapLayout(jax.devices()[:1])
    iterator = reading.open_latents(cache, seed=0, batch_size=NUM, layout=layout)
    with pytest.raises(InputError, match=r"example \d+ is damaged"):
        next(iterator)
    iterator.close()


def test_two_shards_of_one_size_that_changed_places_are_noticed(cached, tmp_path):
    out = shutil.copytree(cached.out, tmp_path / "latents")
    note = read_note(out)
    paths = [out / shard_name(i, note.num_shards) for i in range(2)]
    contents = [path.read_bytes() for path in paths]
    size = max(map(len, contents))
    for path, content in zip(paths, reversed(contents), strict=True):
        path.write_bytes(content.ljust(size, b"\0"))
    shards = (note.shards[0]._replace(size=size), note.shards[1]._replace(size=size))
    note = dataclasses.replace(note, shards=(*shards, *note.shards[2:]))
    with pytest.raises(InputError, match=r"is damaged \(not the file"):
        reading.open_cache(
            cached.reading(latents=str(out)), cached.weights.autoencoder, note
        )


@pytest.mark.parametrize(
    "values", [{"num_classes": 3}, {"format": 1}, {"sha256": "0" * 64}]
)
def test_every_value_of_the_note_counts(cached, tmp_path, values):
    tree = json.loads((cached.out / "cache.json").read_text())
    (tmp_path / "cache.json").write_text(json.dumps({**tree, **values}))
    with pytest.raises(InputError, match=r"cache\.json is damaged"):
        read_note(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"\xff", b"[" * 10**5, b'{"format": ' + b"1" * 5000 + b"}"]
)
def test_a_damaged_note_is_one_line(tmp_path, content):
    (tmp_path / "cache.json").write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_note(tmp_path)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"data.latents: {tmp_path / 'cache.json'}: ")
    assert line.endswith("; make the cache anew in another folder")


def test_a_cache_of_an_older_version_has_no_digest_of_its_note(cached, tmp_path):
    tree = json.loads((cached.out / "cache.json").read_text())
    del tree["sha256"]
    (tmp_path / "cache.json").write_text(json.dumps({**tree, "format": 1}))
    assert read_note(tmp_path) == read_note(cached.out)


def test_a_copy_of_weights_is_compared_with_the_record_of_its_run(cached, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    record = {"configs": [], "data": None, "files": {}, "stages": {}}
    write_record(run, record)
    save_frozen(cached.frozen_weights(), run)
    load_frozen(cached.config, cached.model, run)
    path = run / "taken.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"taken\.safetensors: got a file of the dig"):
        load_frozen(cached.config, cached.model, run)


def test_text_embeddings_of_another_encoder_or_tokenizer_are_refused(tmp_path):
    made = Prepared("clip", tmp_path)
    digest = reading.text_encoder_digest(
        made.model, made.weights.conditioner, has_captions=True
    )
    other = jax.tree.map(lambda leaf: -leaf, made.weights.conditioner)
    (tmp_path / "other").mkdir()
    folder = write_clip(tmp_path / "other", "sd2")
    cases = [(made.config, other), (made.of_condition(tokenizer=str(folder)), None)]
    for config, conditioner in cases:
        conditioner = conditioner or made.weights.conditioner
        note = note_of(made, text_encoder=digest, has_captions=True)
        with pytest.raises(InputError, match="another text encoder or tokenizer"):
            reading._check_text(build_model(config), conditioner, made.out, note)


# Writing shards, and resuming after an interruption.


def note_of(made, **fields) -> CacheNote:
    source = open_split(
        dataclasses.replace(made.config, stages=("autoencoder",), first_stage=None),
        "train",
    )
    encoders = Encoders(made.weights.autoencoder, {})
    note = plan_cache(made.config, made.model, encoders, source, num_shards=5)
    return dataclasses.replace(note, **fields)


def records_of(made, note, *, stops_at=None):
    """Return a function from a shard to records, encoded as means of the images."""
    examples = open_split(made.config, "train").examples
    shape = note.fields[0].shape

    def encode(given):
        means = given.image.mean((1, 2, 3), dtype=np.float32)
        return Encoded(
            np.broadcast_to(means[:, None, None, None], (len(means), *shape)), None
        )

    def records(shard):
        if shard == stops_at:
            raise KeyboardInterrupt
        return encode_records(made.config.data, examples, note, encode, shard, size=4)

    return records


def test_complete_shards_of_an_interrupted_command_are_kept(cached, tmp_path):
    note = note_of(cached)
    with pytest.raises(KeyboardInterrupt):
        make_shards(tmp_path, note, range(5), {}, records_of(cached, note, stops_at=3))
    (tmp_path / "latents-00003-of-00005.array_record.part").write_bytes(b"half")
    found = find_shards(tmp_path, note, range(5))
    assert list(found) == [0, 1, 2]
    other = dataclasses.replace(note, first_stage="of another")
    assert not find_shards(tmp_path, other, range(5))
    made = []

    def records(shard):
        made.append(shard)
        return records_of(cached, note)(shard)

    whole = make_shards(tmp_path, note, range(5), found, records)
    assert made == [3, 4] and len(whole) == 5
    note = dataclasses.replace(note, shards=tuple(whole[i] for i in range(5)))
    examples = LatentExamples(tmp_path, note, states=False)
    source = open_split(cached.config, "train").examples
    labels = [int(examples[i]["label"]) for i in range(NUM)]
    assert labels == [int(source[i]["label"]) for i in range(NUM)]
    assert not list(tmp_path.glob("*.part"))


def test_two_processes_write_the_shards_that_one_writes(cached, tmp_path):
    note, folders = note_of(cached), [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    one = make_shards(folders[0], note, range(5), {}, records_of(cached, note))
    two: dict = {}
    for process in (1, 0):
        own = range(process, 5, 2)
        two |= make_shards(folders[1], note, own, {}, records_of(cached, note))
    assert two == one
    assert [i for shard in range(5) for i in shard_range(shard, note)] == list(
        range(NUM)
    )


def test_a_record_reads_back_bit_for_bit_with_its_caption(cached):
    note = dataclasses.replace(read_note(cached.out), has_captions=True)
    moments = np.random.RandomState(0).normal(size=note.fields[0].shape)
    example = {"moments": moments.astype(np.float32), "label": 3, "caption": "ein Ü"}
    record = pack(example, note, where="example 0")
    found = unpack(record, note)
    assert np.array_equal(found["moments"], example["moments"])
    assert (int(found["label"]), found["caption"].decode()) == (3, "ein Ü")
    with pytest.raises(ValueError, match="a record of 9 bytes"):
        unpack(record[:9], note)
    wrong = {**example, "moments": moments[:2]}
    with pytest.raises(InputError, match=r"'moments' of example 7 has the shape"):
        pack(wrong, note, where="example 7")


def test_a_shard_that_cannot_be_written_is_a_run_error(cached, tmp_path):
    with pytest.raises(RunError, match=r"cannot be written \(.*; make room there"):
        make_shards(
            tmp_path / "not there",
            note_of(cached),
            range(1),
            {},
            records_of(cached, note_of(cached)),
        )


# Refused flags and configs.


def test_another_or_too_large_number_of_shards_is_refused(cached):
    with pytest.raises(InputError, match=r"--out: .* shards \(2 there, 3 here\)"):
        cached.make(num_shards=3)
    with pytest.raises(InputError, match=r"--shards: got 25, wanted at most 24"):
        cached.make(num_shards=25)


@pytest.mark.parametrize(
    ("kind", "data", "message"),
    [
        ("low_resolution", {}, "concat low_resolution, wanted none"),
        ("masked_image", {}, "concat masked_image, wanted none"),
        ("label", {"crop": "random"}, "with data.crop random, wanted none"),
        ("label", {"flip": True}, "with data.flip True, wanted none"),
    ],
)
def test_latents_are_refused_with_image_conditions_or_augmentation(kind, data, message):
    config = config_of(kind)
    data = dataclasses.replace(config.data, latents="somewhere", **data)
    with pytest.raises(InputError, match=message):
        dataclasses.replace(config, data=data)


def test_latents_are_refused_for_the_first_stage_alone():
    config = dataclasses.replace(config_of("label"), stages=("autoencoder",))
    data = dataclasses.replace(config.data, latents="somewhere")
    with pytest.raises(InputError, match=r"stage 1 alone.*trains on images"):
        dataclasses.replace(config, data=data)


def test_the_config_digest_ignores_the_latents(cached):
    ours, theirs = cached.config, cached.reading()
    assert config_lib.digest(ours) == config_lib.digest(theirs)
    assert config_lib.differences(ours, theirs) == {}
    assert config_lib.from_json(config_lib.to_json(theirs)) == theirs


TINY = ("--config", "tests/support/tiny.py")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--out", "x"), "--workdir: wanted it"),
        (("--workdir", "x", *TINY, "--out", "y"), "--workdir: wanted it"),
        (("--workdir", "x"), "--out: not given"),
        (("--workdir", "x", "--out", "y"), "x is not a run"),
        ((*TINY, "--out", "y"), "--first-stage: not given"),
        ((*TINY, "--out", "y", "--sharts", "3"), "did you mean --shards"),
        ((*TINY, "--out", "y", "--shards", "0"), "--shards: got 0, wanted at least 1"),
        (
            ("--workdir", "x", "--seed", "3", "--out", "y"),
            "--seed: got it beside --workdir",
        ),
        ((*TINY, "--out", "gs://bucket/x"), "--out: got gs:/bucket/x, wanted a folder"),
    ],
)
def test_bad_flags_of_cache_latents_are_refused(args, message):
    with pytest.raises(InputError) as caught:
        parse(list(args))
    assert message in str(caught.value)


def test_config_flags_and_launch_flags_are_read():
    flags, out, config = parse(
        [*TINY, "--first-stage", "there", "--out", "y", "--seed", "5", "--pod"]
    )
    assert (config.first_stage, config.seed, str(out)) == ("there", 5, "y")
    assert flags.launch.joins and flags.states and flags.shards is None
