"""What a run takes from a cache of latents, once the cache is proved to be its own."""

import dataclasses
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from ldm_jax import config as config_lib
from ldm_jax.build import check_example, null_tokens, open_tokenizer
from ldm_jax.config import OWN_LATENTS, Config
from ldm_jax.config.run import with_states
from ldm_jax.data.caption_tokens import TokenizedExamples
from ldm_jax.data.latent_cache import (
    MAKER,
    CacheNote,
    LatentExamples,
    check_files,
    prepare_latents,
    read_note,
    read_null_state,
)
from ldm_jax.data.pipeline import BatchIterator, make_iterator
from ldm_jax.data.sources import Examples, folder_digest
from ldm_jax.parallel.make_layout import Layout
from ldm_jax.training.autoencoder_stage import SCALE_FILE
from ldm_jax.training.digest import tree_digest
from ldm_jax.types import InputError, PyTree

NUMBERS_DEPEND_ON = (
    "data.source",
    "data.train_split",
    "data.image_size",
    "data.image_channels",
    "autoencoder.regularizer",
    "autoencoder.num_groups",
    "autoencoder.dtype",
)
"""Fields that a cache's numbers depend on, beside the first stage's parameters."""

FILES = "images and captions"
"""What the files of a folder are called where two caches are compared."""

MAX_BYTES_IN_MEMORY = 256 * 2**20
"""Caches of fewer bytes of arrays are read once and kept, with the tokens of their
captions: a batch of 32 takes 1.4 ms that took 5.0, beside a step of 190."""

READING_THREADS = 8
"""Of a cache on disk, which may be far away: they wait, and do not compute."""


class Cache(NamedTuple):
    """A cache of latents, opened for a run."""

    examples: Examples
    """The training split."""
    null_state: Float[np.ndarray, "n d"] | None
    """What the frozen text encoder says of the empty prompt; None if the run does not
    read text states."""
    num_threads: int
    """That read batches."""


def made_of(config: Config) -> dict[str, Any]:
    """Collect what a cache's numbers depend on: fields of a config, files of a folder.

    Raises:
      InputError: If the folder is not there.
    """
    flat = config_lib.flatten(config)
    facts = {name: flat[name] for name in NUMBERS_DEPEND_ON}
    if (folder := folder_digest(config.data.source)) is not None:
        facts[FILES] = short(folder)
    return facts


def text_encoder_digest(
    config: Config, conditioner: PyTree, *, has_captions: bool
) -> str:
    """Digest all that a frozen text encoder's output depends on, but the text.

    Args:
      config: With the encoder's settings, and the folder of the tokenizer.
      has_captions: Whether the data has captions, which a tokenizer reads.

    Raises:
      InputError: If the tokenizer's files cannot be read.
    """
    condition = config.diffusion.condition
    reads = has_captions and condition.tokenizer is not None
    facts = {
        "parameters": tree_digest(conditioner),
        "settings": dataclasses.asdict(condition.clip),
        "dtype": config.diffusion.dtype,
        "null_tokens": null_tokens(config),
        "tokenizer": open_tokenizer(condition).backend.to_str() if reads else "",
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def check_cache(
    config: Config, workdir: Path, *, first_stage: PyTree, conditioner: PyTree
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
    found = {**note.made_of}
    wanted = made_of(config)
    if FILES not in found:  # an early version did not note them
        wanted.pop(FILES, None)
    if config.diffusion.condition.uses_classes:
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
    _check_states(config, conditioner, note)
    _check_words(config, note)
    if first_stage is not None:
        check_first_stage(config, first_stage, note)
    elif not (workdir / "autoencoder" / SCALE_FILE).exists():
        raise InputError(
            f"data.latents: got {folder}, but the first stage of {workdir} is not "
            "trained yet, and latents are of a trained one; try --first-stage RUN, or "
            "leave --data.latents out until stage 2 begins"
        )
    return note


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """Name what differs between two tables of facts, with both values."""
    return ", ".join(
        f"{name} ({found.get(name)!r} there, {wanted.get(name)!r} here)"
        for name in wanted
        if found.get(name) != wanted.get(name)
    )


def check_first_stage(config: Config, params: PyTree, note: CacheNote) -> None:
    """Raise `InputError` if a cache was not made by this first stage.

    Args:
      params: The first stage's averaged parameters.
    """
    ours = tree_digest(params)
    if note.first_stage != ours:
        raise InputError(
            f"data.latents: {config.data.latents} was made by another first stage "
            f"({short(note.first_stage)} there, {short(ours)} here); make a cache of "
            f"this one with {MAKER}"
        )


def short(digest: str | None) -> str:
    """Return the beginning of a digest, as people compare it."""
    return "none" if digest is None else digest[:12]


def _reads_states(config: Config, note: CacheNote) -> bool:
    return config.diffusion.condition.freezes_text and note.text_encoder is not None


def _check_states(config: Config, conditioner: PyTree, note: CacheNote) -> None:
    if not _reads_states(config, note):
        return
    ours = text_encoder_digest(config, conditioner, has_captions=note.has_captions)
    if note.text_encoder != ours:
        raise InputError(
            f"data.latents: the text states of {config.data.latents} are of another "
            f"text encoder or tokenizer ({short(note.text_encoder)} there, "
            f"{short(ours)} here); make another cache with {MAKER}, where --no-states "
            "leaves them out"
        )


def _check_words(config: Config, note: CacheNote) -> None:
    has_tokens = note.has_captions or "tokens" in {field.name for field in note.fields}
    reads = config.diffusion.condition.uses_tokens and not _reads_states(config, note)
    if reads and not has_tokens:
        raise InputError(
            f"data.latents: {config.data.latents} holds no captions, which this model "
            f"reads; make another cache, with this config, by {MAKER}"
        )


def open_cache(config: Config, params: PyTree, note: CacheNote | None) -> Cache | None:
    """Open a cache that `check_cache` found good, for training.

    Args:
      config: Of the run, with its own tokenizer if it learned one.
      params: The first stage's averaged parameters.
      note: Of the cache, if the run asks for one.

    Returns:
      The cache; a small one is read once and kept. None if there is no note.

    Raises:
      InputError: If it is of another first stage, damaged, or has not what the model is
        conditioned on.
    """
    if note is None:
        return None
    check_first_stage(config, params, note)
    folder, condition = Path(str(config.data.latents)), config.diffusion.condition
    states = _reads_states(config, note)
    examples: Examples = LatentExamples(folder, note, states=states)
    num_threads = READING_THREADS
    if condition.uses_tokens and not states and note.has_captions:
        examples = TokenizedExamples(examples, open_tokenizer(condition))
    if note.num_examples * note.record_size < MAX_BYTES_IN_MEMORY:
        num_threads = 1
        with ThreadPoolExecutor(READING_THREADS) as pool:
            examples = list(pool.map(examples.__getitem__, range(len(examples))))
    check_example(with_states(config) if states else config, examples[0])
    null_state = read_null_state(folder, note) if states else None
    return Cache(examples, null_state, num_threads)


def open_latents(
    config: Config, cache: Cache, *, batch_size: int, layout: Layout
) -> BatchIterator:
    """Open this process' part of the endless training stream, as latents.

    The order is that of the images, and so is what is drawn for each example.
    """
    return make_iterator(
        cache.examples,
        prepare_latents,
        batch_size=batch_size,
        seed=config.seed,
        process_index=layout.process_index,
        process_count=layout.process_count,
        num_threads=cache.num_threads,
    )
