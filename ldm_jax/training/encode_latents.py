"""Make a cache of latents: encode every image once, on all devices of all hosts."""

import contextlib
import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from tqdm import tqdm

from ldm_jax.build import build_model, open_split
from ldm_jax.config import IMAGES_AT_ONCE, Config, DataConfig
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
    write_note,
)
from ldm_jax.data.sources import Source
from ldm_jax.files import file_sha256, locked, write_file
from ldm_jax.latent_diffusion import LatentDiffusion, autoencoder_bytes
from ldm_jax.parallel.make_layout import PmapLayout
from ldm_jax.parallel.memory import check_fits
from ldm_jax.parallel.multihost import (
    check_same,
    first_alone,
    from_first,
    gather_texts,
    is_first,
    together,
)
from ldm_jax.training.digest import tree_digest
from ldm_jax.training.latent_cache import (
    UNLESS_NAMED,
    differences,
    made_of,
    short,
    text_encoder_digest,
)
from ldm_jax.training.latent_encoders import (
    Encoders,
    encode_empty_prompt,
    encode_records,
    make_encode,
    prepare,
)
from ldm_jax.training.latent_shards import find_shards, make_shard
from ldm_jax.training.metrics import progress_bar
from ldm_jax.training.workdir import facts_of
from ldm_jax.types import InputError

MIN_SHARDS = 16
"""A killed command loses only the shards it was writing; as many hosts can share the
work."""
SHARD_BYTES = 256 * 2**20
OWN_FOLDER = "latents"


@runtime_checkable
class OpenEncoders(Protocol):
    """Loads the networks that encode examples."""

    def __call__(
        self,
        config: Config,
        model: LatentDiffusion,
        workdir: Path | None,
        *,
        states: bool,
    ) -> Encoders:
        """Load the first stage of a run and, if `states`, its frozen text encoder."""
        ...


class CacheOutcome(NamedTuple):
    """A finished cache."""

    note: CacheNote
    """The note in its folder."""
    num_made: int
    """Shards that all processes wrote now."""


def make_cache(
    config: Config,
    workdir: Path | None,
    out: Path,
    *,
    open_encoders: OpenEncoders,
    num_shards: int | None,
    batch_size: int,
    states: bool,
) -> CacheOutcome:
    """Encode the training split, except shards that exist and are intact.

    On several processes, each calls this with the same arguments and a shared folder.
    Process `i` makes every shard whose index is `i` modulo the number of processes.

    Args:
      config: Config of the run with the data and the first stage.
      workdir: Folder of that run; None to read the first stage that the config names.
      out: Folder of the cache; created if it does not exist.
      num_shards: Files of records; None keeps the number of an existing cache, or
        chooses by size.
      batch_size: Images that a device encodes at once.
      states: Whether to cache the text embeddings of a frozen text encoder.

    Raises:
      InputError: If there is no finished first stage, the data cannot be read, or the
        folder holds another cache.
      RunError: If a shard cannot be written.
      OSError: If another file cannot be written.
    """
    if "diffusion" in config.stages:  # checks that runs can read the cache
        data = dataclasses.replace(config.data, latents=str(out))
        config = dataclasses.replace(config, data=data)
    layout = PmapLayout()
    details = {"--shards": num_shards, "--batch": batch_size, "--no-states": not states}
    check_same({**facts_of(config, layout), **details})
    with together():
        model = build_model(config)
        check_fits(
            autoencoder_bytes(model, layout.platform) * batch_size,
            layout.devices[0],
            what=f"--batch: got {batch_size}, of which an array is",
            remedy="a smaller one",
        )
        encoders = open_encoders(config, model, workdir, states=states)
        source = open_split(config, "train")
        note = plan_cache(config, model, encoders, source, num_shards=num_shards)
    with contextlib.ExitStack() as held:
        first_alone(lambda: held.enter_context(_locked(out)))
        first_alone(lambda: _begin(model, encoders, out, note, num_shards=num_shards))
        with together():
            note = read_note(out)
        encode_batch = make_encode(model, encoders, layout)
        records = functools.partial(
            encode_records, config.data, source.examples, note, encode_batch
        )
        size = batch_size * len(layout.devices)
        return _fill(out, note, functools.partial(records, size=size), layout)


def keep_latents(
    config: Config, workdir: Path, *, open_encoders: OpenEncoders
) -> tuple[Config, CacheNote]:
    """Make the cache in a run's own folder, unless it is finished.

    Args:
      config: Config of a run whose first stage is finished.

    Returns:
      The config that reads the cache, and the note of the cache.

    Raises:
      InputError: If the data cannot be read.
      RunError: If a shard cannot be written.
      OSError: If another file cannot be written.
    """
    out = workdir / OWN_FOLDER
    data = dataclasses.replace(config.data, latents=str(out))
    config = dataclasses.replace(config, data=data)
    if not from_first(_is_whole(out)):
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
    """Return whether a folder holds a finished cache, judged by the file sizes."""
    try:
        check_files(out, read_note(out))
    except InputError:
        return False
    return True


def plan_cache(
    config: Config,
    model: LatentDiffusion,
    encoders: Encoders,
    source: Source,
    *,
    num_shards: int | None,
) -> CacheNote:
    """Make the note of an unfinished cache.

    Raises:
      InputError: If there are fewer examples than shards, or captions and no tokenizer.
    """
    total = len(source.examples)
    has_captions = _keeps_captions(source)
    fields = _fields(model, config.data, source, states=bool(encoders.conditioner))
    if num_shards is None:
        by_size = -(-total * sum(field.size for field in fields) // SHARD_BYTES)
        num_shards = min(max(by_size, MIN_SHARDS), total)
    if num_shards > total:
        raise InputError(f"--shards: got {num_shards}, wanted at most {total} examples")
    text_encoder = None
    if encoders.conditioner:
        text_encoder = text_encoder_digest(
            model, encoders.conditioner, has_captions=has_captions
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


def _keeps_captions(source: Source) -> bool:
    """Return whether records hold captions, in place of tokens made from them."""
    first = source.examples[0]
    has_own_tokens = "tokens" in first and not isinstance(
        source.examples, TokenizedExamples
    )
    return "caption" in first and not has_own_tokens


def _fields(
    model: LatentDiffusion, data: DataConfig, source: Source, *, states: bool
) -> tuple[Field, ...]:
    """List the arrays of a record: the encoded ones, then those of the examples."""
    example = source.examples[0]
    fields = [Field("moments", "<f4", model.moments_shape)]
    if states:
        vectors = model.condition.as_vectors()
        shape = (vectors.embedding_length, vectors.embedding_width)
        fields.append(Field("states", "<f4", shape))
    prepared = prepare({**example, "index": 0}, data)
    for name in ("label", "tokens", "embedding", "segmentation"):
        again = name == "tokens" and _keeps_captions(source)
        if name in example and not again:
            array = prepared[name]
            little = array.dtype.newbyteorder("<").str
            fields.append(Field(name, little, array.shape))
    return tuple(fields)


def _locked(out: Path) -> contextlib.AbstractContextManager[None]:
    """Create a folder and lock it against other processes."""
    if out.exists() and not out.is_dir():
        raise InputError(f"--out: {out} is a file, wanted a folder")
    busy = (
        f"--out: another process is writing to {out}; wait for it, or --pod if they "
        "are to write together"
    )
    return locked(out, busy=busy)


def _begin(
    model: LatentDiffusion,
    encoders: Encoders,
    out: Path,
    note: CacheNote,
    *,
    num_shards: int | None,
) -> None:
    """Write the note of an unfinished cache, or check the one that exists."""
    path = out / NULL_FILE
    if not (out / NOTE_FILE).exists():
        if encoders.conditioner:
            _write_null_state(path, encode_empty_prompt(model, encoders))
            note = dataclasses.replace(note, null_state=file_sha256(path))
        write_note(out, note)
        return
    theirs, ours = read_note(out), note
    if num_shards is None:
        ours = dataclasses.replace(ours, num_shards=theirs.num_shards)
    if details := differences(_facts(theirs), _facts(ours)):
        raise InputError(
            f"--out: {out} holds a cache of something else: {details}; try another "
            "folder"
        )
    if theirs.null_state is None:
        return
    if not path.is_file() or file_sha256(path) != theirs.null_state:
        logging.getLogger(__name__).warning("%s: damaged, and made anew", path)
        _write_null_state(path, encode_empty_prompt(model, encoders))


def _write_null_state(path: Path, embedding: np.ndarray) -> None:
    write_file(path, lambda file: np.save(file, embedding, allow_pickle=False))


def _facts(note: CacheNote) -> dict[str, Any]:
    """List what must be equal in two caches, by its name in messages."""
    return {
        **UNLESS_NAMED,
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
) -> CacheOutcome:
    """Make this process' missing shards; finish the note when all shards exist."""
    own = range(layout.process_index, note.num_shards, layout.process_count)
    with together():
        shards = find_shards(out, note, own)
    num_made = sum(map(int, gather_texts(str(len(own) - len(shards)))))
    if num_made and note.shards:  # a damaged shard: no longer finished
        note = dataclasses.replace(note, shards=())
        first_alone(lambda: write_note(out, note))
    with together():
        shards = make_shards(out, note, own, shards, records)
    details = gather_texts(json.dumps({k: v._asdict() for k, v in shards.items()}))
    everyone = {int(k): v for text in details for k, v in json.loads(text).items()}
    whole = tuple(Shard(**everyone[shard]) for shard in range(note.num_shards))
    finished = dataclasses.replace(note, shards=whole)
    if finished != note:
        first_alone(lambda: write_note(out, finished))
    return CacheOutcome(finished, num_made)


def make_shards(
    out: Path,
    note: CacheNote,
    own: Iterable[int],
    whole: dict[int, Shard],
    records: Callable[[int], Iterable[bytes]],
) -> dict[int, Shard]:
    """Make the missing shards of a process.

    Args:
      own: Indices of the shards of this process.
      whole: Those that exist and are intact.
      records: Encodes the examples of a shard.

    Returns:
      All of them, by index.

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
