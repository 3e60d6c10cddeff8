"""The images of a request as a labelled data set: a folder of them, and TFDS' form.

    OUT/images/train/CLASS/000000.png    the images, each with its recipe
    OUT/images/train/captions.jsonl      what they show, for a model of texts
    OUT/grid.png                         the first of them, to look at
    OUT/tfds/synthetic/1.0.0/            the same images again, record by record

The images are numbered through, and record i is image i. What TFDS reads is written
last, once every image is there: it seals the data set.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ldm_jax.config import Config
from ldm_jax.data.class_names import find_class_names
from ldm_jax.data.tfds_writer import (
    Contents,
    Record,
    data_set_folder,
    digest_of,
    write_data_set,
    written_digest,
)
from ldm_jax.files import write_text
from ldm_jax.images import read_png
from ldm_jax.parallel.multihost import gather_texts
from ldm_jax.sampling.conditions import ImageSpec
from ldm_jax.sampling.metadata import has_metadata
from ldm_jax.sampling.outputs import (
    Work,
    draw_missing,
    open_work,
    sheet_paths,
    write_sheets,
)
from ldm_jax.sampling.request import SampleRequest
from ldm_jax.sampling.sampling_config import SamplingConfig
from ldm_jax.types import InputError

NAME = "synthetic"
"""Of the data set, as TFDS is asked for it."""
IMAGES, SPLIT, DATA_SETS = "images", "train", "tfds"
CAPTIONS_FILE = "captions.jsonl"
DESCRIPTION = "Images that a latent diffusion model made; each PNG tells how."
OUR_NAME = re.compile(r"\d{6,}\.png")
UNSAFE = re.compile(r'[/\\:*?"<>|\x00-\x1f\x7f]')
"""What some file system does not take in a name."""
MAX_FOLDER_NAME = 80
"""Characters; file systems take 255 bytes."""


class Outcome(NamedTuple):
    """What became of a request."""

    written: list[Path]
    """What a person wants to look at: images, grid, data set."""
    notes: tuple[str, ...] = ()
    """What else there is to say."""


def write_dataset(request: SampleRequest) -> Outcome:
    """Make the images of a request, and a data set of them once all are there.

    An interrupted command, given again, makes the rest; a finished one changes nothing.
    Where several processes share the images, the first one writes the data set.

    Args:
      request: With `as_dataset`.

    Returns:
      What became of it.

    Raises:
      InputError: As `gallery.write_gallery`; or if there is anything in the folder that
        does not belong to the data set.
      RunError: If no checkpoint is intact, or the records cannot be written.
      OSError: If something cannot be written; images made before it stay.
    """
    work = open_work(request)
    request, root = work.request, request.out / IMAGES / SPLIT
    names = class_names_of(work.pipeline.run.config, work.pipeline.settings)
    records = records_of(work.specs, root, class_folders(names))
    paths = [record.png for record in records]
    captions = captions_text(records, root)
    also = {root / CAPTIONS_FILE} if captions else set()
    remove_unlisted(request, {*paths} | also)
    check_captions(request, root / CAPTIONS_FILE, captions)
    num_drawn = draw_missing(work, paths)
    if request.share_index:
        return Outcome([])
    if num_missing := sum(not path.exists() for path in paths):
        return Outcome(
            [request.out / IMAGES, *write_sheets(work, paths)],
            (
                f"{num_missing} images are still to come from other processes; then "
                "the same command finishes the data set",
            ),
        )
    height, width, channels = read_png(paths[0]).shape
    contents = Contents(records, names, (height, width, channels))
    return finish(work, contents, captions, was_there=not num_drawn)


def finish(
    work: Work, contents: Contents, captions: str, *, was_there: bool
) -> Outcome:
    """Write all that there is beside the images, unless it is there already.

    Args:
      work: The request; its images are there.
      contents: They, and what they show.
      captions: The text of `captions.jsonl`, or "".
      was_there: Whether they were before.

    Returns:
      What became of the request.

    Raises:
      InputError: If a data set of other images is there, and may not be replaced.
    """
    request = work.request
    captions_path = request.out / IMAGES / SPLIT / CAPTIONS_FILE
    beside = [*sheet_paths(request), *([captions_path] if captions else [])]
    place = data_set_folder(request.out / DATA_SETS, NAME)
    written = [request.out / IMAGES, *sheet_paths(request), place]
    there, wanted = written_digest(place), digest_of(contents)
    if there not in (None, wanted) and not request.overwrite:
        raise InputError(
            f"--as-dataset: {place} holds a data set that was made otherwise; try "
            "another --as-dataset, or --overwrite"
        )
    if was_there and there == wanted and all(path.exists() for path in beside):
        return Outcome(written, ("all of it was there already; nothing was changed",))
    if captions:
        write_text(captions_path, captions)
    write_sheets(work, [record.png for record in contents.records])
    if there != wanted:
        root = request.out / DATA_SETS
        write_data_set(contents, root, name=NAME, description=DESCRIPTION)
    return Outcome(written)


def class_names_of(config: Config, settings: SamplingConfig) -> tuple[str, ...]:
    """Say what a model's classes are called, on every process alike.

    Returns:
      The names that its data set gives them, if that is here and has as many; else
      their numbers. () if the model has none.
    """
    data = config.data
    if not config.diffusion.condition.uses_classes:
        return ()
    found: tuple[str, ...] = ()
    if settings.workdir is not None:  # weights from elsewhere name no data set
        found = find_class_names(data.source, directory=data.directory)
    # TFDS keeps the names as lines of a file.
    names = [" ".join(name.split()) for name in found]
    usable = all(names) and len(set(names)) == len(names) == data.num_classes
    names = names if usable else list(map(str, range(data.num_classes)))
    return tuple(json.loads(gather_texts(json.dumps(names))[0]))


def class_folders(names: tuple[str, ...]) -> tuple[str, ...]:
    """Name a folder for each class, such that they sort in the order of the classes.

    Whoever reads a folder of images counts its classes in the order of their names. So
    where that is another, or where two folders would be one to some file system, each
    begins with its number: `0_zebra`, `1_ant`; a number alone is filled up: `07`.

    Args:
      names: Of the classes.

    Returns:
      The folders; those of plain, sorted names are these.
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
    """Make a name one that every file system takes, and none hides."""
    return UNSAFE.sub("_", name)[:MAX_FOLDER_NAME].strip().strip(".").strip()


def records_of(
    specs: list[ImageSpec], root: Path, folders: tuple[str, ...]
) -> list[Record]:
    """Say where each image goes and what it shows.

    Args:
      specs: Of the request, in order.
      root: Where the images of all classes lie.
      folders: Of the classes, below it; () if there are none.
    """
    records = []
    for i, spec in enumerate(specs):
        label = int(spec.condition_texts["label"]) if folders else None
        folder = root if label is None else root / folders[label]
        png = folder / f"{i:06d}.png"
        records.append(Record(png, label, spec.condition_texts.get("prompt")))
    return records


def captions_text(records: list[Record], root: Path) -> str:
    """Write what images show as lines of JSON; "" if they have no captions."""
    lines = [
        json.dumps({"file": r.png.relative_to(root).as_posix(), "caption": r.caption})
        for r in records
        if r.caption is not None
    ]
    return "".join(f"{line}\n" for line in lines)


def remove_unlisted(request: SampleRequest, expected: set[Path]) -> None:
    """See that a folder of images holds nothing but what belongs to a data set.

    Args:
      request: With `overwrite`, what another one left there is removed.
      expected: What belongs to it; what an interrupted process left half does not
        count.

    Raises:
      InputError: If there is anything else.
    """
    top = request.out / IMAGES
    unlisted = [path for path in _files(top) if path not in expected]
    foreign = [path for path in unlisted if not _is_ours(path)]
    if foreign:
        raise InputError(
            f"--as-dataset: {foreign[0]} does not belong to the data set, wanted a "
            "folder of its own; try another --as-dataset, or take it away"
        )
    if unlisted and not request.overwrite:
        raise InputError(
            f"--as-dataset: {top} holds {len(unlisted)} files that were not asked "
            f"for, such as {unlisted[0]}; try another --as-dataset, or --overwrite"
        )
    for path in unlisted:
        path.unlink(missing_ok=True)  # another process may have been quicker


def _is_ours(path: Path) -> bool:
    """Say whether a file is one that another data set left."""
    if path.name == CAPTIONS_FILE:
        return True
    return OUR_NAME.fullmatch(path.name) is not None and has_metadata(path)


def _files(top: Path) -> Iterator[Path]:
    for folder, _, names in os.walk(top):
        for name in sorted(names):
            if not name.endswith(".part"):
                yield Path(folder, name)


def check_captions(request: SampleRequest, path: Path, captions: str) -> None:
    """Raise `InputError` if other captions are there, and may not be replaced."""
    if not path.exists() or request.overwrite:
        return
    if path.read_text(encoding="utf-8", errors="replace") != captions:
        raise InputError(
            f"--as-dataset: {path} was made otherwise; try another --as-dataset, or "
            "--overwrite"
        )
