"""The folder of a run: check its config, and lock it against other processes."""

import contextlib
import dataclasses
import functools
import json
import logging
import math
from collections.abc import Collection, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ldm_jax import config as config_lib
from ldm_jax.config import CONFIG_FILE, Config, digest, read_config
from ldm_jax.config.serialization import (
    CHANGEABLE,
    CHANGEABLE_IN_WORDS,
    MAY_CHANGE,
    is_among,
)
from ldm_jax.data.sources import folder_digest
from ldm_jax.data.tokenizer import TOKENIZER_FILE
from ldm_jax.files import (
    ANEW,
    DIGESTS_FILE,
    check_file,
    locked,
    printable,
    read_changes,
    read_json,
    read_record,
    read_text,
    write_record,
    write_text,
)
from ldm_jax.parallel.layout import Layout
from ldm_jax.parallel.multihost import first_alone
from ldm_jax.rng import root_key
from ldm_jax.training.checkpoint import (
    CHECKPOINTS,
    Check,
    Checkpoint,
    newest_notes,
)
from ldm_jax.training.digest import run_digest
from ldm_jax.training.ema import FOLDER as AVERAGES
from ldm_jax.training.train_tokenizer import NOTE, own_tokenizer
from ldm_jax.types import InputError, RunError

FINAL_FILE = "final.json"
"""Result of a finished run."""
SCALE_FILE = "latent_scale.json"
"""Latent scale of a finished first stage, in its folder."""


def facts_of(
    config: Config, layout: Layout, changes: Collection[str] = ()
) -> dict[str, Any]:
    """Return what must be equal on all processes of a run."""
    return {
        "--change": " ".join(sorted(changes)),
        **config_lib.flatten(config),
        "ldm_jax": version("ldm_jax"),
        "jax": version("jax"),
        "jaxlib": version("jaxlib"),
        "flax": version("flax"),
        "optax": version("optax"),
        "devices": f"{len(layout.devices)} {layout.devices[0].device_kind}",
    }


class Change(NamedTuple):
    """A change of a run's config."""

    fields: dict[str, list[Any]]
    """The old and the new value of each field."""
    steps: dict[str, int]
    """The step of each stage at which it is made."""


def check_workdir(
    config: Config, workdir: Path, changes: Collection[str] = ()
) -> dict[str, list[Any]]:
    """Check that a folder is new or belongs to this config.

    Args:
      changes: Fields whose values may be others than in the folder's config.

    Returns:
      The old and the new value of each field that is to be changed.

    Raises:
      InputError: If it was made with another config, may not be changed so, or is a
        file.
    """
    record, named = read_record(workdir), digest(config, of_state=True)
    # Without a loss of power in the middle of a change, config.json says the same.
    is_same = record is not None and record["configs"][-1:] == [named]
    fields: dict[str, list[Any]] = {}
    if (workdir / CONFIG_FILE).exists():
        theirs = read_config(workdir, changing=is_same)
        theirs = dataclasses.replace(
            theirs, **{MAY_CHANGE: getattr(config, MAY_CHANGE)}
        )
        fields = {} if is_same else config_lib.differences(theirs, config)
        if not fields.keys() <= set(changes):
            raise _other_config(workdir, fields, changes)
    elif changes and not is_same:
        raise InputError(
            f"--change: {workdir} is not a run yet, wanted the folder of one"
        )
    elif workdir.exists() and not workdir.is_dir():
        raise InputError(f"--workdir: {workdir} is a file, wanted a folder")
    if record is not None and not is_same and not fields:
        raise InputError(
            f"--workdir: {workdir} was made with a different config, of which "
            f"{DIGESTS_FILE} has the digest alone; try another --workdir or the same "
            "values"
        )
    if fields:
        _check_change(fields, workdir, record)
    return fields


def _other_config(
    workdir: Path, fields: dict[str, list[Any]], changes: Collection[str]
) -> InputError:
    """Say in which fields the config of a folder is another one, and what to try."""
    others = {name: fields[name] for name in fields if name not in changes}
    told = ", ".join(f"{k} ({a!r} there, {b!r} here)" for k, (a, b) in others.items())
    hint = ""
    if all(is_among(name, CHANGEABLE) for name in others):
        flags = " ".join(f"{name}={new}" for name, (_, new) in others.items())
        hint = f", or --change {flags} to go on with what is new"
    return InputError(
        f"--workdir: {workdir} was made with a different config: {told}; try another "
        f"--workdir or the same values{hint}"
    )


def _check_change(
    fields: dict[str, list[Any]], workdir: Path, record: dict[str, Any] | None
) -> None:
    """Raise `InputError` if a run may not be changed so."""
    if fixed := [name for name in fields if not is_among(name, CHANGEABLE)]:
        raise InputError(
            f"--change: got {fixed[0]}, wanted {CHANGEABLE_IN_WORDS}; it makes another "
            "run: try another --workdir"
        )
    if record is None:
        raise InputError(
            f"--change: {workdir} is a run of a version that kept no {DIGESTS_FILE}, "
            "wanted one of this version; try another --workdir, with --first-stage"
        )
    if "data.source" in fields and record["data"] is None:
        raise InputError(
            "--change: got data.source, whose data cannot be compared, wanted one of "
            "a folder (folder:PATH); try data.directory"
        )
    first = [name for name in fields if name.startswith("autoencoder.")]
    if first and any(workdir.glob(f"diffusion/{CHECKPOINTS}/[0-9]*")):
        raise InputError(
            f"--change: got {first[0]}, but the diffusion stage has learned on the "
            "latents of the autoencoder as it is; try another --workdir"
        )


@contextlib.contextmanager
def open_workdir(
    config: Config, workdir: Path, change: Change | None = None
) -> Iterator[None]:
    """Create and lock the folder of a run, and write or check its config.

    Args:
      change: How the folder's config is to be changed; None for not at all.

    Raises:
      InputError: If it was made with another config, holds something else, or
        another process is training in it.
      OSError: If it cannot be written.
    """
    busy = (
        f"--workdir: another process is training in {workdir}; wait for it, try "
        "another --workdir, or --pod if they are to train together"
    )
    changes = () if change is None else change.fields.keys()
    with contextlib.ExitStack() as held:
        first_alone(lambda: check_workdir(config, workdir, changes))
        first_alone(lambda: held.enter_context(locked(workdir, busy=busy)))
        named = digest(config, of_state=True)
        first_alone(lambda: begin_record(workdir, named, source=config.data.source))
        if change is not None:
            first_alone(lambda: _record_change(workdir, named, change))
        text = config_lib.to_json(config)
        first_alone(lambda: _write_config(workdir, text, config_digest=named))
        yield


def _record_change(workdir: Path, config_digest: str, change: Change) -> None:
    """Write a change into the record of a run, and remove what is to be made anew."""
    record = read_record(workdir) or {}
    stages, gone = dict(record["stages"]), [FINAL_FILE]
    for name, (_, new) in change.fields.items():
        stage, _, field = name.partition(".")
        reached = change.steps.get(stage, 0)
        if field == "steps" and new < reached:
            raise InputError(
                f"--change: got {name}={new}, wanted at least the {reached} steps that "
                "are trained"
            )
        stages.pop(stage, None)
        gone += [f"autoencoder/{SCALE_FILE}"] * (stage == "autoencoder")
    for name in gone:
        (workdir / name).unlink(missing_ok=True)
    record |= {
        "configs": [*record["configs"], config_digest],
        "files": {k: v for k, v in record["files"].items() if k not in gone},
        "stages": stages,
        "changes": [*record.get("changes", []), change._asdict()],
    }
    write_record(workdir, record)


def _write_config(workdir: Path, text: str, *, config_digest: str) -> None:
    """Write the config of a run that has none, or that of before a change."""
    path = workdir / CONFIG_FILE
    if path.exists():
        theirs = read_config(workdir, changing=True)
        if digest(theirs, of_state=True) == config_digest:
            return
    write_text(path, text)


def begin_record(workdir: Path, config_digest: str, *, source: str) -> None:
    """Write the record of a new run; an older run without one goes on without.

    Raises:
      InputError: If the data of a run changed since it began.
      OSError: If it cannot be written.
    """
    record = read_record(workdir)
    if record is not None:
        if record["data"] != folder_digest(source):
            raise InputError(
                f"data.source: {source} holds other files than when the run in "
                f"{workdir} began; try another --workdir, or putting them back"
            )
        return
    has_state = any(workdir.glob(f"*/{CHECKPOINTS}/*"))
    if has_state or (workdir / CONFIG_FILE).exists():
        return
    names = {"configs": [config_digest], "data": folder_digest(source)}
    write_record(workdir, {**names, "files": {}, "stages": {}})


def restore_record(workdir: Path) -> None:
    """Write a lost record anew, from the copy in the newest checkpoint.

    Raises:
      OSError: If it cannot be written.
    """
    if read_record(workdir) is not None:
        return
    for stage in ("diffusion", "autoencoder"):
        for notes in newest_notes(workdir / stage / CHECKPOINTS):
            if "record" in notes:
                write_record(workdir, notes["record"])
                return


def check_stage(workdir: Path, name: str, got: str) -> None:
    """Compare the last checkpoint of a stage with what its run ended with.

    Raises:
      InputError: If `digests.json` or `final.json` is damaged.
      RunError: If it has another digest.
    """
    record = read_record(workdir)
    if record is not None:
        wanted = record["stages"].get(name, got)
    else:
        final = read_final(workdir)
        wanted = (final or {}).get("digest_by_stage", {}).get(name, got)
    if wanted != got:
        raise RunError(
            f"{workdir / name}: got the digest {got[:12]} of the last step, wanted "
            f"{wanted[:12]}, with which the stage ended first; try the processor and "
            "the versions of then, or another --workdir"
        )


def record_stage(workdir: Path, name: str, got: str) -> None:
    """Write the digest of a finished stage into the record of its run.

    Raises:
      RunError: If the stage ended before, with another digest.
    """
    check_stage(workdir, name, got)
    record = read_record(workdir)
    if record is not None and name not in record["stages"]:
        stages = {**record["stages"], name: got}
        write_record(workdir, {**record, "stages": stages})


def read_final(workdir: Path) -> dict[str, Any] | None:
    """Read `final.json`; None if the run is not finished.

    Raises:
      InputError: If it is damaged, lost, or not what the run wrote.
    """
    path, record = workdir / FINAL_FILE, read_record(workdir)
    if not path.exists():
        if record is not None and FINAL_FILE in record["files"]:
            raise InputError(
                f"{path}: missing, and the run is finished; give the same ldm train "
                "command again: it is made anew"
            )
        return None
    check_file(workdir, path)
    final = read_json(path, remedy=ANEW)
    digests = final.get("digest_by_stage", {})
    seconds = final.get("seconds_by_stage", {})
    changes = final.get("changes", [])
    good = all(isinstance(one, dict) for one in (digests, seconds))
    good = good and isinstance(final.get("digest"), str)
    good = good and all(isinstance(one, str) for one in digests.values())
    good = good and all(type(one) in (int, float) for one in seconds.values())
    if not good or (
        digests and run_digest(digests, changes=changes) != final["digest"]
    ):
        raise InputError(
            f"{path}: got a digest that is not that of its stages, or none; {ANEW}"
        )
    return final


def read_scale(workdir: Path) -> float | None:
    """Read the latent scale of a run; None if it is not measured yet.

    Raises:
      InputError: If the file is damaged, or not what the run wrote.
    """
    path = workdir / "autoencoder" / SCALE_FILE
    if not path.exists():
        return None
    check_file(workdir, path)
    scale = read_json(path, remedy=ANEW).get("latent_scale")
    if not isinstance(scale, float) or not 0.0 < scale < math.inf:
        raise InputError(
            f"{path}: latent_scale: got {printable(repr(scale))}, wanted a number "
            f"above 0; {ANEW}"
        )
    return scale


def check_files(workdir: Path) -> bool:
    """Compare all files of a run with its record.

    Returns:
      Whether all are there; averages may be moved away.

    Raises:
      InputError: If one is not what the run wrote.
    """
    record, whole = read_record(workdir), True
    for name in [] if record is None else record["files"]:
        check_file(workdir, workdir / name)
        whole = whole and (_is_output(name) or (workdir / name).exists())
    return whole


def is_finished(workdir: Path, name: str, *, num_steps: int) -> bool:
    """Return whether a stage was trained to its end, whatever is left of it."""
    record, folder = read_record(workdir), workdir / name
    signs = [workdir / FINAL_FILE, folder / CHECKPOINTS / str(num_steps)]
    if name == "autoencoder":
        signs += [folder / SCALE_FILE, *workdir.glob(f"diffusion/{CHECKPOINTS}/[0-9]*")]
    return any(sign.exists() for sign in signs) or (
        record is not None and name in record["stages"]
    )


def state_check(workdir: Path, stage: str) -> Check:
    """Make the check that a checkpoint is of this run, of its step and of its files.

    Runs of versions that kept no record are checked by step, seed and config.
    """

    def check(found: Checkpoint) -> str:
        config = read_config(workdir)
        step, key = found.tree["state"].step, found.tree["root_key"]
        if int(step) != found.step:
            return f"its state is of step {int(step)}"
        if not np.array_equal(key, jax.random.key_data(root_key(config.seed))):
            return "it is of a run of another seed"
        if reason := _other_inputs(found, workdir, own_tokenizer(config, workdir)):
            return reason
        record, ours = read_record(workdir), digest(config, of_state=True)
        try:
            if reason := _other_changes(found, record or {}, stage):
                return reason
            known = [ours] if record is None else [ours, *record["configs"]]
            theirs = found.notes.get("config")
            if theirs is not None and _digest_of(theirs) not in known:
                return "it is of a run of another config"
            return _other_record(found.notes.get("record"), record, workdir)
        except (KeyError, TypeError, AttributeError):
            return "its notes are not those of a run"

    return check


def _other_inputs(found: Checkpoint, workdir: Path, tokenizer: Path | None) -> str:
    """Say which file of a run differs from what is in its checkpoint itself."""
    scale, theirs = read_scale(workdir), found.tree["extra"].get("latent_scale")
    if scale is not None and theirs is not None and np.float32(scale) != theirs:
        return (
            f"it was trained with the latent scale {float(theirs)}, not the {scale} of "
            f"autoencoder/{SCALE_FILE}: delete that file"
        )
    if tokenizer is not None and (learned := found.notes.get(NOTE)) is not None:
        path = tokenizer / TOKENIZER_FILE
        if path.exists() and read_text(path, remedy=ANEW) != learned:
            return f"it was trained with another tokenizer than {path}"
    return ""


def _digest_of(tree: dict[str, Any]) -> str:
    try:
        return digest(config_lib.from_json(json.dumps(tree)), of_state=True)
    except InputError:
        return ""


def _other_changes(found: Checkpoint, ours: dict[str, Any], stage: str) -> str:
    """Say in which change of a run its checkpoint has no part, or too much of one."""
    theirs = (found.notes.get("record") or {}).get("changes", [])
    known = ours.get("changes", [])
    if theirs != known[: len(theirs)]:
        return f"it was made after a change that {DIGESTS_FILE} does not name"
    for change in known[len(theirs) : len(theirs) + 1]:
        if found.step > (at := change["steps"].get(stage, 0)):
            return f"it was made without the change of {_named(change)} at step {at}"
    return ""


def _named(change: dict[str, Any]) -> str:
    return ", ".join(change["fields"])


def check_changed(workdir: Path, stage: str, step: int) -> None:
    """Raise `RunError` if a stage cannot go on from a step, since it is too early."""
    other = "autoencoder." if stage == "diffusion" else "diffusion."
    for change in read_changes(workdir):
        if all(name.startswith(other) for name in change["fields"]):
            continue
        if step < (at := change["steps"].get(stage, 0)):
            raise RunError(
                f"{workdir / stage / CHECKPOINTS}: got the checkpoint of step {step}, "
                f"wanted that of step {at}, at which {_named(change)} was changed, or "
                "a later one; try a copy of the run, or another --workdir"
            )


def _other_record(
    theirs: dict[str, Any] | None, ours: dict[str, Any] | None, workdir: Path
) -> str:
    """Say in what the record beside a checkpoint differs from that of its run."""
    if theirs is None and ours is None:
        _warn_of_no_record(workdir)
        return ""
    if theirs is None:
        return f"it is of a run without {DIGESTS_FILE}"
    if ours is None:
        return (
            f"{DIGESTS_FILE} of its run is missing; give the same ldm train command "
            "again: the checkpoint holds a copy"
        )
    if theirs["data"] != ours["data"]:
        return "it is of a run of other data"
    for kind in ("stages", "files"):
        for name, made_with in theirs[kind].items():
            if not _is_output(name) and ours[kind].get(name) != made_with:
                return f"it was made with another {name}"
    return ""


def _is_output(name: str) -> bool:
    """Return whether no state of a run depends on a file."""
    return name == FINAL_FILE or name.startswith(f"diffusion/{AVERAGES}/")


@functools.lru_cache(maxsize=64)
def _warn_of_no_record(workdir: Path) -> None:
    logging.getLogger(__name__).warning(
        "%s: a run of a version that kept no %s: its latent scale, tokenizer, averages "
        "and copied weights are read without a check",
        *(workdir, DIGESTS_FILE),
    )
