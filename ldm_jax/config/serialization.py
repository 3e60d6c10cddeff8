"""Configs as strict JSON, their digests and their differences."""

import dataclasses
import functools
import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar

from ldm_jax.config.run import Config
from ldm_jax.files import (
    ANEW,
    DIGESTS_FILE,
    parse_json,
    printable,
    read_json,
    read_record,
)
from ldm_jax.types import InputError

T = TypeVar("T")

CONFIG_FILE = "config.json"

HOW_FIELDS = frozenset(
    {"scores", "data.latents", "data.max_broken_files"}
    | {
        f"parallel.{name}"
        for name in (
            *("layout", "accumulate", "steps_per_dispatch", "cpu_devices"),
            *("peer_timeout", "stall_timeout"),
        )
    }
)
"""Fields that may change when a run resumes: they do not change its result."""

MAY_CHANGE = "max_skipped_steps"
"""Field that may change when a run resumes: it changes no finite step."""

CHANGEABLE = frozenset(
    {"checkpoint", "log", "sampling", "data.source", "data.directory"}
    | {"autoencoder.steps", "diffusion.steps", "diffusion.condition_dropout"}
    | {
        f"{part}.optim.{name}"
        for part in ("autoencoder", "autoencoder.adversary", "diffusion")
        for name in (
            *("lr", "warmup_steps", "decay_steps", "b1", "b2", "weight_decay"),
            *("clip_norm", "ema_decay"),
        )
    }
)
"""Fields that an explicit change may give another value: the state of a run keeps its
shapes and its meaning."""
CHANGEABLE_IN_WORDS = (
    "steps, condition_dropout or a number of optim of a stage, the place of the data, "
    "or a field of checkpoint, log or sampling"
)

LATER_FIELDS = frozenset(
    {
        "max_skipped_steps",
        "precision",
        "parallel",
        "parallel.cpu_devices",
        "parallel.reduction",
        "parallel.shards",
        "data.crop",
        "data.flip",
        "diffusion.condition.pooled",
        "diffusion.condition.text.positions",
        "diffusion.condition.text.embedding_std",
        "diffusion.optim.algorithm",
        "autoencoder.optim.algorithm",
        "autoencoder.adversary.optim.algorithm",
        "diffusion.optim.muon_embeddings",
        "autoencoder.optim.muon_embeddings",
        "autoencoder.adversary.optim.muon_embeddings",
    }
    | HOW_FIELDS
) | frozenset(
    f"diffusion.{name}"
    for name in (
        "coordinates",
        "loss_weight",
        "loss_weight_gamma",
        "offset_noise",
        "timestep_shift",
        "zero_terminal_snr",
        "sigma_data",
        "sigma_min",
        "sigma_max",
        "log_sigma_mean",
        "log_sigma_std",
        "average_lengths",
        "average_snapshots",
    )
)
"""Fields that older files lack. Their defaults reproduce the behaviour before they were
added; a digest omits them while they have these values."""


WRITTEN_IF_SET = frozenset({"precision", "parallel.reduction", "parallel.shards"})
"""Fields that are not written with their default: earlier versions read such a file."""


def to_json(config: Config) -> str:
    """Convert a config to strict JSON, which `from_json` reads back equal."""
    tree, default = dataclasses.asdict(config), flatten(Config())
    for path in WRITTEN_IF_SET:
        part, name = _part_with(path, tree)
        if part[name] == default[path]:
            del part[name]
    return json.dumps(tree, indent=2, allow_nan=False) + "\n"


def _part_with(path: str, tree: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Return the part of a config that holds a field, and its name there."""
    *parents, name = path.split(".")
    return functools.reduce(dict.__getitem__, parents, tree), name


def from_json(text: str) -> Config:
    """Read a config that `to_json` wrote; `LATER_FIELDS` may be missing.

    Raises:
      InputError: If the text is not JSON, a field is missing or unknown, or a value
        has the wrong type or is out of range.
    """
    tree = parse_json(text, what="config", remedy="try another copy")
    return _from_tree(Config, tree, "")


def _from_tree(cls: type[T], tree: Any, path: str) -> T:
    fields = {field.name: field for field in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    where = path.rstrip(".") or "config"
    if not isinstance(tree, dict):
        raise InputError(f"{where}: got {printable(repr(tree))}, wanted an object")
    later = {name for name in fields if path + name in LATER_FIELDS}
    if wrong := sorted((tree.keys() ^ fields.keys()) - (later - tree.keys())):
        names = printable(", ".join(wrong))
        raise InputError(
            f"{where}: fields missing or unknown: {names}; it was written by another "
            "version of ldm_jax"
        )
    values = {
        name: _from_tree(field.type, tree[name], f"{path}{name}.")
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type)
        else tree[name]
        for name, field in fields.items()
        if name in tree
    }
    return cls(**values)


def digest(config: Config, *, of_state: bool = False) -> str:
    """Return the sha256 of a config, the same in every version of the package.

    Args:
      of_state: Leave out `MAY_CHANGE` too: the state of a run depends on the rest.
    """
    tree, default = dataclasses.asdict(config), flatten(Config())
    for path in LATER_FIELDS:
        if not HOW_FIELDS.isdisjoint(path.split(".")[:-1]):
            continue  # deleted with its parent
        leaf, name = _part_with(path, tree)
        left_out = path in HOW_FIELDS or (of_state and path == MAY_CHANGE)
        if left_out or leaf[name] == default.get(path):
            del leaf[name]
    if not tree["parallel"]:
        del tree["parallel"]
    text = json.dumps(tree, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def flatten(config: Any) -> dict[str, Any]:
    """Return every leaf of a config by its dotted name."""
    leaves: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            inner = flatten(value)
            leaves |= {f"{field.name}.{name}": leaf for name, leaf in inner.items()}
        else:
            leaves[field.name] = value
    return leaves


def differences(before: Config, after: Config) -> dict[str, list[Any]]:
    """Return both values of every field in which two configs differ.

    `HOW_FIELDS` are not compared.
    """
    old, new = flatten(before), flatten(after)
    return {
        name: [old[name], new[name]]
        for name in old
        if old[name] != new[name] and not is_among(name, HOW_FIELDS)
    }


def is_among(name: str, fields: frozenset[str]) -> bool:
    """Return whether a field is one of some fields, or in one of them."""
    return any(name == field or name.startswith(f"{field}.") for field in fields)


def read_config(workdir: Path, *, changing: bool = False) -> Config:
    """Read the config of a run.

    Args:
      changing: Accept the config before the last change too, which is there if the
        change was interrupted.

    Raises:
      InputError: If the folder is not a run.
    """
    path = workdir / CONFIG_FILE
    if not path.is_file():
        raise InputError(
            f"--workdir: {workdir} is not a run (no {CONFIG_FILE}); try the folder "
            "that was given to ldm train"
        )
    tree = read_json(path, remedy=ANEW)
    try:
        config = _from_tree(Config, tree, "")
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    record, named = read_record(workdir), digest(config, of_state=True)
    if record is not None and named not in record["configs"][-2 if changing else -1 :]:
        raise InputError(
            f"{path}: got another config than {DIGESTS_FILE} names, wanted that of the "
            f"run; {ANEW}"
        )
    return config
