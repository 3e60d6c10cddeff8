"""Open a cache of latents for a run, after a check that it belongs to the run."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from ldm_jax import config as config_lib
from ldm_jax.build import check_example, open_tokenizer
from ldm_jax.config import OWN_LATENTS, ConditionConfig, Config
from ldm_jax.data.caption_tokens import TokenizedExamples
from ldm_jax.data.latent_cache import (
    AGAIN,
    MAKER,
    NOTE_FILE,
    CacheNote,
    LatentExamples,
    check_files,
    prepare_latents,
    read_note,
    read_null_state,
    shard_name,
)
from ldm_jax.data.pipeline import BatchIterator, make_iterator
from ldm_jax.data.sources import Examples, folder_digest
from ldm_jax.files import file_sha256, json_digest
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.parallel.make_layout import Layout
from ldm_jax.training.digest import tree_digest
from ldm_jax.training.workdir import SCALE_FILE
from ldm_jax.types import USUAL_PRECISION, InputError, PyTree

NUMBERS_DEPEND_ON = (
    "data.source",
    "data.train_split",
    "data.image_size",
    "data.image_channels",
    "autoencoder.regularizer",
    "autoencoder.num_groups",
    "autoencoder.dtype",
)
"""Config fields that the arrays of a cache depend on, besides the parameters."""

UNLESS_NAMED = {"precision": USUAL_PRECISION}
"""Further ones, which a cache names where its value is another than this."""

FILES = "images and captions"
"""Key of the digest of a folder's files where two caches are compared."""

MAX_BYTES_IN_MEMORY = 256 * 2**20
"""Smaller caches are read once into memory, with the tokens of their captions: reading
a batch of 32 took 1.4 ms instead of 5.0, where a step took 190."""

READING_THREADS = 8
"""Threads that read a cache on disk; a remote disk makes them wait."""


class Cache(NamedTuple):
    """A cache of latents, open for training."""

    examples: Examples
    """The training split."""
    null_embedding: Float[np.ndarray, "n d"] | None
    """Text embedding of the empty prompt; None if the run reads no text embeddings."""
    num_threads: int
    """Threads that read batches."""


def made_of(config: Config) -> dict[str, Any]:
    """Return what the arrays of a cache depend on: config fields, digest of a folder.

    Raises:
      InputError: If the folder does not exist.
    """
    flat = config_lib.flatten(config)
    facts = {name: flat[name] for name in NUMBERS_DEPEND_ON}
    facts |= {k: flat[k] for k, usual in UNLESS_NAMED.items() if flat[k] != usual}
    if (folder := folder_digest(config.data.source)) is not None:
        facts[FILES] = short(folder)
    return facts


def text_encoder_digest(
    model: LatentDiffusion, conditioner: PyTree, *, has_captions: bool
) -> str:
    """Digest everything that a text embedding depends on besides the text.

    Args:
      conditioner: Parameters of the frozen text encoder.
      has_captions: Whether the data has captions, which a tokenizer reads.

    Raises:
      InputError: If the tokenizer's files cannot be read.
    """
    condition = model.condition
    reads = has_captions and condition.tokenizer is not None
    facts = {
        "parameters": tree_digest(conditioner),
        "settings": dataclasses.asdict(condition.clip),
        "dtype": jnp.dtype(model.unet.dtype).name,
        "null_tokens": model.null_tokens,
        "tokenizer": open_tokenizer(condition).backend.to_str() if reads else "",
    }
    return json_digest(facts)


def check_cache(
    config: Config,
    model: LatentDiffusion,
    workdir: Path,
    *,
    first_stage: PyTree,
    conditioner: PyTree,
) -> CacheNote | None:
    """Check that a run's cache is finished and made of its data and networks.

    Args:
      workdir: Folder of the run; may not exist yet.
      first_stage: Parameters of a pretrained first stage; None if the run trains it.
      conditioner: Parameters of a frozen conditioner, or {}.

    Returns:
      The note of the cache; None if the run reads none, or makes it itself.

    Raises:
      InputError: If a check fails, or the run has yet to train the first stage.
    """
    if config.data.latents in (None, OWN_LATENTS):
        return None
    folder, data = Path(config.data.latents), config.data
    note = read_note(folder)
    check_files(folder, note)
    found = UNLESS_NAMED | note.made_of
    wanted = UNLESS_NAMED | made_of(config)
    if FILES not in found:  # caches of early versions
        wanted.pop(FILES, None)
    if model.condition.uses_classes:
        found["data.num_classes"] = note.num_classes
        wanted["data.num_classes"] = data.num_classes
    if data.num_train_examples:
        found["data.num_train_examples"] = note.num_examples
        wanted["data.num_train_examples"] = data.num_train_examples
    if details := differences(found, wanted):
        raise InputError(
            f"data.latents: {folder} was made of something else: {details}; try the "
            f"same values, or make another cache with {MAKER}"
        )
    _check_text(model, conditioner, folder, note)
    if first_stage is not None:
        check_first_stage(first_stage, folder, note)
    elif not (workdir / "autoencoder" / SCALE_FILE).exists():
        raise InputError(
            f"data.latents: got {folder}, but the first stage of {workdir} is not "
            "trained yet, and latents are of a trained one; try --first-stage RUN, or "
            "leave --data.latents out until stage 2 begins"
        )
    return note


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """List the entries that differ between two tables, with both values."""
    return ", ".join(
        f"{name} ({found.get(name)!r} there, {wanted.get(name)!r} here)"
        for name in wanted
        if found.get(name) != wanted.get(name)
    )


def check_first_stage(params: PyTree, folder: Path, note: CacheNote) -> None:
    """Raise `InputError` if a cache was made by another first stage.

    Args:
      params: Averaged parameters of the run's first stage.
    """
    ours = tree_digest(params)
    if note.first_stage != ours:
        raise InputError(
            f"data.latents: {folder} was made by another first stage "
            f"({short(note.first_stage)} there, {short(ours)} here); make a cache of "
            f"this one with {MAKER}"
        )


def short(digest: str | None) -> str:
    """Return the first characters of a digest, for messages."""
    return "none" if digest is None else digest[:12]


def _reads_embeddings(condition: ConditionConfig, note: CacheNote) -> bool:
    return condition.freezes_text and note.text_encoder is not None


def _check_text(
    model: LatentDiffusion, conditioner: PyTree, folder: Path, note: CacheNote
) -> None:
    if _reads_embeddings(model.condition, note):
        ours = text_encoder_digest(model, conditioner, has_captions=note.has_captions)
        if note.text_encoder != ours:
            raise InputError(
                f"data.latents: the text embeddings of {folder} are of another text "
                f"encoder or tokenizer ({short(note.text_encoder)} there, "
                f"{short(ours)} here); make another cache with {MAKER}, where "
                "--no-states leaves them out"
            )
        return
    has_tokens = note.has_captions or "tokens" in {field.name for field in note.fields}
    if model.condition.uses_tokens and not has_tokens:
        raise InputError(
            f"data.latents: {folder} holds no captions, which this model reads; make "
            f"another cache, with this config, by {MAKER}"
        )


def open_cache(config: Config, params: PyTree, note: CacheNote | None) -> Cache | None:
    """Open a checked cache for training; a small one is read into memory.

    Args:
      config: With the run's own tokenizer, if it trained one.
      params: Averaged parameters of the first stage.
      note: From `check_cache`; None opens nothing.

    Raises:
      InputError: If the cache was made by another first stage, is damaged, or lacks a
        condition of the model.
    """
    if note is None:
        return None
    folder, condition = Path(str(config.data.latents)), config.diffusion.condition
    check_first_stage(params, folder, note)
    embeddings = _reads_embeddings(condition, note)
    examples: Examples = LatentExamples(folder, note, states=embeddings)
    num_threads = READING_THREADS
    if condition.uses_tokens and not embeddings and note.has_captions:
        examples = TokenizedExamples(examples, open_tokenizer(condition))
    if note.num_examples * note.record_size < MAX_BYTES_IN_MEMORY:
        num_threads = 1
        _check_shards(folder, note)
        with ThreadPoolExecutor(READING_THREADS) as pool:
            examples = list(pool.map(examples.__getitem__, range(len(examples))))
    read = condition.as_vectors() if embeddings else condition
    check_example(read, examples[0], source=config.data.source)
    null_embedding = read_null_state(folder, note) if embeddings else None
    return Cache(examples, null_embedding, num_threads)


def _check_shards(folder: Path, note: CacheNote) -> None:
    """Raise `InputError` if a shard is not what was written."""
    for number, shard in enumerate(note.shards):
        path = folder / shard_name(number, note.num_shards)
        if file_sha256(path) != shard.sha256:
            raise InputError(
                f"data.latents: {path} is damaged (not the file that {NOTE_FILE} lists)"
                f"; {AGAIN} to make it anew"
            )


def open_latents(
    cache: Cache, *, seed: int, batch_size: int, layout: Layout
) -> BatchIterator:
    """Open this process' part of the endless training stream, as latents.

    Its order and every random draw are those of training from images.
    """
    return make_iterator(
        cache.examples,
        prepare_latents,
        batch_size=batch_size,
        seed=seed,
        process_index=layout.process_index,
        process_count=layout.process_count,
        num_threads=cache.num_threads,
    )
