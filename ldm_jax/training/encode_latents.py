"""A cache of latents, made: every image encoded once, by all devices of all hosts."""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from tqdm import tqdm

from ldm_jax.build import build_model, open_split
from ldm_jax.config import IMAGES_AT_ONCE, Config
from ldm_jax.data.caption_tokens import TokenizedExamples
from ldm_jax.data.latent_cache import (
    NOTE_FILE,
    NULL_FILE,
    CacheNote,
    Field,
    Shard,
    check_files,
    read_note,
    shard_range,
    to_json,
)
from ldm_jax.data.sources import Source
from ldm_jax.files import write_json
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.parallel.make_layout import PmapLayout
from ldm_jax.parallel.multihost import (
    check_same,
    first_alone,
    gather_texts,
    is_first,
    together,
)
from ldm_jax.training.digest import tree_digest
from ldm_jax.training.latent_cache import (
    differences,
    made_of,
    short,
    text_encoder_digest,
)
from ldm_jax.training.latent_encoders import (
    Encoders,
    encode_records,
    make_encode,
    null_state_of,
    prepare,
)
from ldm_jax.training.latent_shards import find_shards, make_shard
from ldm_jax.training.metrics import progress_bar
from ldm_jax.training.workdir import facts_of
from ldm_jax.types import InputError

MIN_SHARDS = 16
"""A killed command loses the shards it was writing, and as many hosts can share."""
SHARD_BYTES = 256 * 2**20
LOCK_FILE = ".lock"
OWN_FOLDER = "latents"


@runtime_checkable
class OpenEncoders(Protocol):
    """Loads what encodes examples."""

    def __call__(
        self,
        config: Config,
        model: LatentDiffusion,
        workdir: Path | None,
        *,
        states: bool,
    ) -> Encoders:
        """Load the first stage of a run, and its frozen text encoder if `states`."""
        ...


class Outcome(NamedTuple):
    """How the making of a cache ended."""

    note: CacheNote
    """What it says of itself."""
    num_made: int
    """Shards that were made now, by all processes."""


def make_cache(
    config: Config,
    workdir: Path | None,
    out: Path,
    *,
    open_encoders: OpenEncoders,
    num_shards: int | None,
    batch_size: int,
    states: bool,
) -> Outcome:
    """Encode the training split, or what is left of it.

    On several processes, each calls this with the same arguments and a folder that all
    of them see; shard s is made by process s modulo their number. A shard that is
    there and whole is kept.

    Args:
      config: Of the run whose data and first stage are meant.
      workdir: Its folder; None to take what the config names.
      out: Folder of the cache; made if it is not there.
      open_encoders: Loads the first stage, and a frozen text encoder if there is one.
      num_shards: Files of records; None for what is there, or by the size.
      batch_size: Images that a device encodes at once.
      states: Whether to keep what a frozen text encoder says.

    Returns:
      How it ended.

    Raises:
      InputError: If there is no finished first stage, the data cannot be read, or the
        folder holds another cache.
      RunError: If a shard cannot be written.
      OSError: If anything else cannot.
    """
    if "diffusion" in config.stages:  # as the runs that are to read it are checked
        data = dataclasses.replace(config.data, latents=str(out))
        config = dataclasses.replace(config, data=data)
    layout = PmapLayout()
    details = {"--shards": num_shards, "--batch": batch_size, "--no-states": not states}
    check_same({**facts_of(config, layout), **details})
    with together():
        model = build_model(config)
        encoders = open_encoders(config, model, workdir, states=states)
        source = open_split(config, "train")
        note = plan_cache(config, encoders, source, num_shards=num_shards)
    with contextlib.ExitStack() as held:
        first_alone(lambda: held.enter_context(_held(out)))
        first_alone(lambda: _begin(config, model, encoders, out, note, num_shards))
        with together():
            note = read_note(out)
        encode_batch = make_encode(model, encoders, layout)
        records = functools.partial(
            encode_records, config, source.examples, note, encode_batch
        )
        size = batch_size * len(layout.devices)
        return _fill(out, note, functools.partial(records, size=size), layout)


def keep_latents(
    config: Config, workdir: Path, *, open_encoders: OpenEncoders
) -> tuple[Config, CacheNote]:
    """Make the cache that a run keeps in its own folder, or take it if it stands.

    Args:
      config: Of the run, whose stage 1 is finished.
      open_encoders: Loads the first stage, and a frozen text encoder if there is one.

    Returns:
      The config that reads the cache, and what the cache says of itself.

    Raises:
      InputError: If the data cannot be read.
      RunError: If the cache cannot be written.
      OSError: If anything else cannot.
    """
    out = workdir / OWN_FOLDER
    data = dataclasses.replace(config.data, latents=str(out))
    config = dataclasses.replace(config, data=data)
    if gather_texts(str(_is_whole(out)))[0] != str(True):
        make_cache(
            config,
            workdir,
            out,
            open_encoders=open_encoders,
            num_shards=None,
            batch_size=IMAGES_AT_ONCE,
            states=True,
        )
    with together():
        return config, read_note(out)


def _is_whole(out: Path) -> bool:
    """Say whether a folder holds a finished cache, by the sizes of its files."""
    try:
        check_files(out, read_note(out))
    except InputError:
        return False
    return True


def plan_cache(
    config: Config, encoders: Encoders, source: Source, *, num_shards: int | None
) -> CacheNote:
    """Say what a cache will hold, before anything is encoded.

    Raises:
      InputError: If there are fewer examples than shards, or captions and no tokenizer.
    """
    total = len(source.examples)
    has_captions = _words_are_captions(source)
    fields = _fields(config, source, states=bool(encoders.conditioner))
    if num_shards is None:
        by_size = -(-total * sum(field.size for field in fields) // SHARD_BYTES)
        num_shards = min(max(by_size, MIN_SHARDS), total)
    if num_shards > total:
        raise InputError(f"--shards: got {num_shards}, wanted at most {total} examples")
    text_encoder = None
    if encoders.conditioner:
        text_encoder = text_encoder_digest(
            config, encoders.conditioner, has_captions=has_captions
        )
    return CacheNote(
        made_of=made_of(config),
        first_stage=tree_digest(encoders.autoencoder),
        text_encoder=text_encoder,
        null_state=None,
        num_examples=total,
        num_classes=source.num_classes,
        fields=fields,
        has_captions=has_captions,
        num_shards=num_shards,
    )


def _words_are_captions(source: Source) -> bool:
    """Say whether captions are kept: a tokenizer makes the tokens, if there are any."""
    first = source.examples[0]
    has_own_tokens = "tokens" in first and not isinstance(
        source.examples, TokenizedExamples
    )
    return "caption" in first and not has_own_tokens


def _fields(config: Config, source: Source, *, states: bool) -> tuple[Field, ...]:
    """List the arrays of a record: what is encoded, and what the examples have."""
    example = source.examples[0]
    fields = [Field("moments", "<f4", config.moments_shape)]
    if states:
        vectors = config.diffusion.condition.as_vectors()
        shape = (vectors.embedding_length, vectors.embedding_width)
        fields.append(Field("states", "<f4", shape))
    prepared = prepare({**example, "index": 0}, config)
    for name in ("label", "tokens", "embedding", "segmentation"):
        again = name == "tokens" and _words_are_captions(source)
        if name in example and not again:
            array = prepared[name]
            little = array.dtype.newbyteorder("<").str
            fields.append(Field(name, little, array.shape))
    return tuple(fields)


@contextlib.contextmanager
def _held(out: Path) -> Iterator[None]:
    """Make a folder, and hold it against another command of these processes' kind."""
    if out.exists() and not out.is_dir():
        raise InputError(f"--out: {out} is a file, wanted a folder")
    out.mkdir(parents=True, exist_ok=True)
    with (out / LOCK_FILE).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"--out: another process is writing to {out}; wait for it, or --pod if "
                "they are to write together"
            ) from None
        yield


def _begin(
    config: Config,
    model: LatentDiffusion,
    encoders: Encoders,
    out: Path,
    note: CacheNote,
    num_shards: int | None,
) -> None:
    """Write the note of an unfinished cache, or check the one that is there."""
    if not (out / NOTE_FILE).exists():
        if encoders.conditioner:
            state = null_state_of(config, model, encoders)
            file = io.BytesIO()
            np.save(file, state, allow_pickle=False)
            (out / NULL_FILE).write_bytes(file.getvalue())
            digest = hashlib.sha256(file.getvalue()).hexdigest()
            note = dataclasses.replace(note, null_state=digest)
        write_json(out / NOTE_FILE, to_json(note))
        return
    theirs, ours = read_note(out), note
    if num_shards is None:
        ours = dataclasses.replace(ours, num_shards=theirs.num_shards)
    if details := differences(_facts(theirs), _facts(ours)):
        raise InputError(
            f"--out: {out} holds a cache of something else: {details}; try another "
            "folder"
        )


def _facts(note: CacheNote) -> dict[str, Any]:
    """List what makes two caches the same, in words for people."""
    return {
        **note.made_of,
        "first stage": short(note.first_stage),
        "text encoder": short(note.text_encoder),
        "examples": note.num_examples,
        "classes": note.num_classes,
        "arrays": [field.name for field in note.fields],
        "captions": note.has_captions,
        "shards": note.num_shards,
        "bytes a record": note.record_size,
    }


def _fill(
    out: Path,
    note: CacheNote,
    records: Callable[[int], Iterable[bytes]],
    layout: PmapLayout,
) -> Outcome:
    """Make this process' shards that are not whole, and finish when all stand."""
    own = range(layout.process_index, note.num_shards, layout.process_count)
    with together():
        shards = find_shards(out, note, own)
    num_made = sum(map(int, gather_texts(str(len(own) - len(shards)))))
    if num_made and note.shards:  # a shard was damaged: not finished any more
        note = dataclasses.replace(note, shards=())
        first_alone(lambda: write_json(out / NOTE_FILE, to_json(note)))
    with together():
        shards = make_shards(out, note, own, shards, records)
    details = gather_texts(json.dumps({k: v._asdict() for k, v in shards.items()}))
    everyone = {int(k): v for text in details for k, v in json.loads(text).items()}
    whole = tuple(Shard(**everyone[shard]) for shard in range(note.num_shards))
    finished = dataclasses.replace(note, shards=whole)
    if finished != note:
        first_alone(lambda: write_json(out / NOTE_FILE, to_json(finished)))
    return Outcome(finished, num_made)


def make_shards(
    out: Path,
    note: CacheNote,
    own: Iterable[int],
    whole: dict[int, Shard],
    records: Callable[[int], Iterable[bytes]],
) -> dict[int, Shard]:
    """Make the shards of a process that are not whole.

    Args:
      out: Folder of the cache.
      own: The shards of this process.
      whole: What is known of those that are whole.
      records: Encodes the examples of a shard.

    Returns:
      What is known of each.

    Raises:
      InputError: If an example cannot be read.
      RunError: If a shard cannot be written.
    """
    sizes = {shard: len(shard_range(shard, note)) for shard in own}
    found = dict(whole)
    with progress_bar(
        "latents",
        num_steps=sum(sizes.values()),
        done=sum(sizes[shard] for shard in whole),
        visible=is_first() and len(whole) < len(sizes),
    ) as bar:
        for shard in sorted(sizes.keys() - whole.keys()):
            counted = _counted(records(shard), bar)
            found[shard] = make_shard(out, shard, note, counted)
    return found


def _counted(records: Iterable[bytes], bar: tqdm) -> Iterator[bytes]:
    for record in records:
        yield record
        bar.update()
