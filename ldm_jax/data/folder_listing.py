"""Images, splits and classes of a folder, by the names of its files.

If a folder has sub-folders named as splits (`train`, and `test` or `val`), these are
its splits. Otherwise a twentieth of its images is held out as `test` and the rest is
`train`: a hash of each image's name decides, so that an image stays in its split when
others are added or removed. `all` is both.

Inside a split, or of a folder without splits, sub-folders are classes, sorted by name.
"""

import collections
import errno
import hashlib
import logging
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ldm_jax.data.image_files import SUFFIXES, Stamp
from ldm_jax.types import InputError

CAPTION_SUFFIXES = (".txt", ".jsonl")
TRAIN, TEST, ALL = "train", "test", "all"
SPLIT_FOLDERS = frozenset({TRAIN, TEST, "val", "valid", "validation"})
HELD_OUT_PART = 20
"""One image in this many is held out of a folder without splits."""
NUM_NAMED = 3
"""Files that a message names."""
MAX_PLACES = 16
"""Places in which a folder is listed: links in a circle would give it any number."""

BOUND = "-?[0-9]{0,18}%?"
SPLIT = re.compile(rf"(?P<name>[^\[\]]+)(\[(?P<start>{BOUND}):(?P<stop>{BOUND})\])?")


class Listing(NamedTuple):
    """The files of a folder."""

    root: Path
    """The folder."""
    stamps: dict[str, Stamp]
    """Size and time of every file, by its path from the root, with slashes."""
    images: tuple[str, ...]
    """Paths of the images of all splits, sorted."""
    by_split: dict[str, tuple[str, ...]]
    """Paths of the images of each split, sorted."""
    has_splits: bool
    """Whether the splits are sub-folders."""

    def class_of(self, name: str) -> str | None:
        """Return the class of an image; None if it lies in no class folder."""
        *folders, _ = name.split("/")[1 if self.has_splits else 0 :]
        return folders[0] if folders else None

    @property
    def class_names(self) -> tuple[str, ...]:
        """Return the classes of the training images, sorted."""
        names = self.by_split[TRAIN] if self.has_splits else self.images
        classes = {self.class_of(name) for name in names}
        return tuple(sorted(name for name in classes if name is not None))


def list_folder(root: Path) -> Listing:
    """List a folder; hidden files are skipped, links are followed.

    Raises:
      InputError: If it is no folder, holds no images, or links lead to one of its
        folders again and again.
      OSError: If a sub-folder cannot be listed.
    """
    if not root.is_dir():
        what = "is a file" if root.exists() else "is not there"
        raise InputError(f"data.source: {root} {what}, wanted a folder of images")
    stamps = dict(sorted(_walk(root)))
    images = tuple(name for name in stamps if name.lower().endswith(SUFFIXES))
    if not images:
        others = f"{len(stamps)} other files ({some(list(stamps))})" if stamps else ""
        raise InputError(
            f"data.source: {root} holds no images but {others or 'nothing'}, wanted "
            f"files that end in {', '.join(SUFFIXES)}"
        )
    tops = {name.partition("/")[0] for name in images if "/" in name}
    # `train` beside `bus` is a class; beside `test` it is a split.
    splits = tops & SPLIT_FOLDERS
    has_splits = TRAIN in splits and (tops == splits or len(splits) > 1)
    if has_splits:
        images = tuple(name for name in images if "/" in name)
        return Listing(root, stamps, images, _by_folder(images, tops), True)
    return Listing(root, stamps, images, _held_out(images), False)


def digest_of(listing: Listing) -> str:
    """Return a digest of the names and sizes of images and caption files."""
    files = [
        (name, stamp.size)
        for name, stamp in sorted(listing.stamps.items())
        if name.lower().endswith((*SUFFIXES, *CAPTION_SUFFIXES))
    ]
    return hashlib.sha256(repr(files).encode()).hexdigest()


def select(listing: Listing, split: str) -> tuple[str, ...]:
    """Return the images of a split, or of a slice of it, sorted.

    A slice cuts the images in the order of a hash of their names, so that it has images
    of all classes.

    Args:
      split: In TFDS' notation: `train`, `train[:90%]`, `train[-100:]`; or `all`.

    Raises:
      InputError: If there is no such split, or it is empty.
    """
    found = SPLIT.fullmatch(split)
    name = found["name"] if found else split
    known = [*listing.by_split, *({ALL} - listing.by_split.keys())]
    if found is None or name not in known:
        instead = _instead(listing, name)
        raise InputError(
            f"data: {listing.root} has no split {split!r}, wanted one of "
            f"{', '.join(known)}, or a slice such as train[:90%]{instead}"
        )
    everything = tuple(x for names in listing.by_split.values() for x in names)
    images = listing.by_split.get(name, everything)
    if found["start"] is not None:
        start = _index(found["start"], len(images), default=0)
        stop = _index(found["stop"], len(images), default=len(images))
        images = tuple(sorted(images, key=_hash)[start:stop])
    if not images:
        raise InputError(
            f"data: {split!r} of {listing.root} holds none of its "
            f"{len(listing.images)} images; try --data.train-split all "
            "--data.test-split all, or more images"
        )
    return tuple(sorted(images))


def some(names: list[str] | tuple[str, ...]) -> str:
    """Join the first few names, and count the rest."""
    first = ", ".join(names[:NUM_NAMED])
    more = len(names) - NUM_NAMED
    return f"{first} and {more:,} more" if more > 0 else first


def _walk(root: Path) -> Iterator[tuple[str, Stamp]]:
    """Yield every file below a folder.

    A link to a folder above it is not followed, nor one to a folder that was found in
    `MAX_PLACES` places that are nearer to the root, or as near and before it by name.
    """
    first = _identity(os.stat(root))
    num_places = collections.Counter([first])
    folders: collections.deque[tuple[Path, str, tuple[tuple[int, int], ...]]]
    folders = collections.deque([(root, "", (first,))])
    left_out: list[str] = []
    while folders:
        folder, inside, above = folders.popleft()
        with os.scandir(folder) as entries:
            ordered = sorted(entries, key=lambda entry: entry.name)
        for entry in ordered:
            if entry.name.startswith((".", "__MACOSX")):
                continue
            name, found = f"{inside}{entry.name}", _stat(entry)
            if found is not None and stat.S_ISREG(found.st_mode):
                yield name, Stamp(found.st_size, found.st_mtime_ns)
            if found is None or not stat.S_ISDIR(found.st_mode):
                continue
            identity = _identity(found)
            if identity in above:
                continue
            if num_places[identity] == MAX_PLACES:
                left_out.append(name)
                continue
            num_places[identity] += 1
            folders.append((Path(entry.path), f"{name}/", (*above, identity)))
    if left_out:
        logging.getLogger(__name__).warning(
            "data.source: %s: a folder is listed in at most %d places; links to it "
            "were not followed: %s",
            root,
            MAX_PLACES,
            some(left_out),
        )


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _stat(entry: os.DirEntry[str]) -> os.stat_result | None:
    """Describe what an entry is or links to; None for a link to nothing."""
    try:
        return entry.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno != errno.ELOOP:  # a link to itself
            raise
        return None


def _by_folder(images: tuple[str, ...], tops: set[str]) -> dict[str, tuple[str, ...]]:
    return {
        top: tuple(name for name in images if name.startswith(f"{top}/"))
        for top in sorted(tops)
    }


def _held_out(images: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Hold out images with a small hash: at least one, unless there is only one."""
    limit = 2**256 // HELD_OUT_PART
    held_out = {name for name in images if _hash(name) < limit}
    if not held_out or len(held_out) == len(images):
        held_out = {min(images, key=_hash)} if len(images) > 1 else set()
    return {
        TRAIN: tuple(name for name in images if name not in held_out),
        TEST: tuple(name for name in images if name in held_out),
    }


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest(), "big")


def _index(text: str, total: int, *, default: int) -> int:
    """Read a bound of a slice: a number or a percentage, from the end if negative."""
    if not text.strip("-%"):
        return default
    if not text.endswith("%"):
        return int(text)
    index = round(int(text[:-1]) * total / 100)
    return index + total if text.startswith("-") else index


def _instead(listing: Listing, name: str) -> str:
    """Suggest a split to hold out if there is none named `test`."""
    if not listing.has_splits or name != TEST:
        return ""
    others = [split for split in listing.by_split if split != TRAIN]
    if others:
        return f"; try --data.test-split {others[0]}"
    return "; try --data.train-split 'train[5%:]' --data.test-split 'train[:5%]'"
