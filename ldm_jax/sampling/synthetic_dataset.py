"""The images of a request as a labelled data set: a folder, and TFDS' format.

    OUT/images/train/CLASS/000000.png    the images, each with its metadata
    OUT/images/train/captions.jsonl      their captions, for a model that reads text
    OUT/grid.png                         the first of them
    OUT/tfds/synthetic/1.0.0/            the same images again, record by record

Images are numbered consecutively, and record i is image i. The records are written
last, after every image, so that TFDS reads no unfinished data set.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ldm_jax.config import DataConfig
from ldm_jax.data.sources import find_class_names
from ldm_jax.data.tfds_builders import BUILDER
from ldm_jax.data.tfds_writer import (
    Contents,
    Record,
    data_set_folder,
    digest_of,
    write_data_set,
    written_digest,
)
from ldm_jax.files import write_text
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.parallel.multihost import from_first
from ldm_jax.sampling.conditions import ImageSpec
from ldm_jax.sampling.metadata import has_metadata
from ldm_jax.sampling.outputs import (
    Work,
    grid_paths,
    make_missing,
    open_work,
    write_grids,
)
from ldm_jax.sampling.request import SampleRequest
from ldm_jax.sampling.sampling_config import SamplingConfig
from ldm_jax.types import InputError

NAME = "synthetic"
"""Name of the data set for TFDS."""
IMAGES, SPLIT, DATA_SETS = "images", "train", "tfds"
CAPTIONS_FILE = "captions.jsonl"
DESCRIPTION = "Images that a latent diffusion model made; each PNG tells how."
OUR_NAME = re.compile(r"\d{6,}\.png")
UNSAFE = re.compile(r'[/\\:*?"<>|\x00-\x1f\x7f]')
"""Characters that some file system does not allow in a name."""
MAX_FOLDER_NAME = 80
"""Characters; file systems take 255 bytes."""


class Outcome(NamedTuple):
    """Files written for a request."""

    written: list[Path]
    """Images, grid and data set."""
    notes: tuple[str, ...] = ()
    """Sentences for the user."""


def write_dataset(settings: SamplingConfig, request: SampleRequest) -> Outcome:
    """Make the images of a request, then a data set of them.

    The same command resumes after an interruption; it changes nothing once finished. If
    several processes share the images, the first one writes the data set.

    Args:
      request: With `as_dataset`.

    Raises:
      InputError: As `outputs.write_images`; or if the folder holds a file that does not
        belong to the data set.
      RunError: If no checkpoint is intact, or the records cannot be written.
      OSError: If something cannot be written; images made before it stay.
    """
    work = open_work(settings, request)
    request, root = work.request, request.folder / IMAGES / SPLIT
    run = work.pipeline.run
    names = class_names_of(run.model, run.config.data, settings)
    records = records_of(work.specs, root, class_folders(names))
    paths = [record.png for record in records]
    captions = captions_text(records, root)
    also = {root / CAPTIONS_FILE} if captions else set()
    remove_unlisted(request, {*paths} | also)
    check_captions(request, root / CAPTIONS_FILE, captions)
    num_made = make_missing(work, paths)
    if request.process[0]:
        return Outcome([])
    if num_missing := sum(not path.exists() for path in paths):
        return Outcome(
            [request.folder / IMAGES, *write_grids(work, paths)],
            (
                f"{num_missing} images are still to be made by other processes; then "
                "the same command finishes the data set",
            ),
        )
    height, width = work.pipeline.inputs[:2]
    channels = run.model.image_shape[-1]
    contents = Contents(records, names, (height, width, channels))
    return finish(work, contents, captions, was_there=not num_made)


def finish(
    work: Work, contents: Contents, captions: str, *, was_there: bool
) -> Outcome:
    """Write captions, grid and records, unless they exist.

    Args:
      work: The request; its images exist.
      contents: The images, and their labels and captions.
      captions: The text of `captions.jsonl`, or "".
      was_there: Whether every image existed before.

    Raises:
      InputError: If a data set of other images exists, and may not be replaced.
    """
    request = work.request
    captions_path = request.folder / IMAGES / SPLIT / CAPTIONS_FILE
    beside = [*grid_paths(request), *([captions_path] if captions else [])]
    place = data_set_folder(request.folder / DATA_SETS, NAME)
    written = [request.folder / IMAGES, *grid_paths(request), place]
    there, wanted = written_digest(place), digest_of(contents)
    if there not in (None, wanted) and not request.overwrite:
        raise InputError(
            f"--as-dataset: {place} holds a data set that was made differently; try "
            "another --as-dataset, or --overwrite"
        )
    if was_there and there == wanted and all(path.exists() for path in beside):
        return Outcome(written, ("everything was there already; nothing was changed",))
    if captions:
        write_text(captions_path, captions)
    write_grids(work, [record.png for record in contents.records])
    if there != wanted:
        write_data_set(
            contents,
            request.folder / DATA_SETS,
            name=NAME,
            description=DESCRIPTION,
            digest=wanted,
        )
    return Outcome(written)


def class_names_of(
    model: LatentDiffusion, data: DataConfig, settings: SamplingConfig
) -> tuple[str, ...]:
    """Return the names of a model's classes, the same on every process.

    Returns:
      The names of its data set, if that is available and has as many; otherwise the
      classes' numbers. () if the model has no classes. A file that builds the data set
      is not imported: the config may be from somebody else.
    """
    if not model.condition.uses_classes:
        return ()
    found: tuple[str, ...] = ()
    built = data.source.startswith(BUILDER)
    if settings.workdir is not None and not built:  # weights alone name no data set
        found = find_class_names(data.source, directory=data.directory)
    # TFDS keeps the names as lines of a file.
    names = [" ".join(name.split()) for name in found]
    num = model.num_classes
    usable = all(names) and len(set(names)) == len(names) == num
    names = names if usable else list(map(str, range(num)))
    return tuple(from_first(names))


def class_folders(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return a folder for each class; the folders sort in the order of the classes.

    Readers of a folder of images number its classes in the order of their names. If
    that is another order, or some file system does not distinguish two names, each
    folder begins with its number: `0_zebra`, `1_ant`; a number alone is padded: `07`.
    """
    plain = tuple(_plain(name) for name in names)
    listed_apart = len({name.casefold() for name in plain}) == len(plain)
    if all(plain) and listed_apart and list(plain) == sorted(plain):
        return plain
    digits = len(str(len(names) - 1))
    return tuple(
        f"{i:0{digits}d}" + (f"_{name}" if name not in ("", str(i)) else "")
        for i, name in enumerate(plain)
    )


def _plain(name: str) -> str:
    """Make a name valid on every file system, and not hidden."""
    return UNSAFE.sub("_", name)[:MAX_FOLDER_NAME].strip().strip(".").strip()


def records_of(
    specs: list[ImageSpec], root: Path, folders: tuple[str, ...]
) -> list[Record]:
    """List the path, label and caption of each image.

    Args:
      specs: The images of the request, in order.
      root: Folder of all images.
      folders: Folders of the classes, below it; () if there are none.
    """
    records = []
    for i, spec in enumerate(specs):
        label = int(spec.condition_texts["label"]) if folders else None
        folder = root if label is None else root / folders[label]
        png = folder / f"{i:06d}.png"
        records.append(Record(png, label, spec.condition_texts.get("prompt")))
    return records


def captions_text(records: list[Record], root: Path) -> str:
    """Write captions as lines of JSON; "" if there are none."""
    lines = [
        json.dumps({"file": r.png.relative_to(root).as_posix(), "caption": r.caption})
        for r in records
        if r.caption is not None
    ]
    return "".join(f"{line}\n" for line in lines)


def remove_unlisted(request: SampleRequest, expected: set[Path]) -> None:
    """Remove, or refuse, files that do not belong to a data set.

    Args:
      request: With `overwrite`, files of another request are removed.
      expected: Files that belong to the data set; unfinished ones are ignored.

    Raises:
      InputError: If there is any other file.
    """
    top = request.folder / IMAGES
    unlisted = [path for path in _files(top) if path not in expected]
    foreign = [path for path in unlisted if not _is_ours(path)]
    if foreign:
        raise InputError(
            f"--as-dataset: {foreign[0]} does not belong to the data set, wanted a "
            "folder of its own; try another --as-dataset, or move the file"
        )
    if unlisted and not request.overwrite:
        raise InputError(
            f"--as-dataset: {top} holds {len(unlisted)} files of another request, "
            f"such as {unlisted[0]}; try another --as-dataset, or --overwrite"
        )
    for path in unlisted:
        path.unlink(missing_ok=True)  # another process may have removed it


def _is_ours(path: Path) -> bool:
    """Return whether a file was written for another data set."""
    if path.name == CAPTIONS_FILE:
        return True
    return OUR_NAME.fullmatch(path.name) is not None and has_metadata(path)


def _files(top: Path) -> Iterator[Path]:
    for folder, _, names in os.walk(top):
        for name in sorted(names):
            if not name.endswith(".part"):
                yield Path(folder, name)


def check_captions(request: SampleRequest, path: Path, captions: str) -> None:
    """Raise `InputError` if other captions exist, and may not be replaced."""
    if not path.exists() or request.overwrite:
        return
    if path.read_text(encoding="utf-8", errors="replace") != captions:
        raise InputError(
            f"--as-dataset: {path} was made differently; try another --as-dataset, or "
            "--overwrite"
        )
