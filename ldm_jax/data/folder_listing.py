"""What a folder of images holds, by names alone: images, splits and classes.

A folder is laid out in one of two ways. With sub-folders named as splits (`train`, and
`test` or `val`), these are its splits. Without, its images are one pool, of which a
twentieth is held out as `test` and the others are `train`: which, is a hash of each
image's name, so that an image stays on its side when others come or go. `all` is both.

Inside a split or the pool, sub-folders are classes, in the order of their names.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ldm_jax.data.image_files import SUFFIXES, Stamp
from ldm_jax.types import InputError

CAPTION_SUFFIXES = (".txt", ".jsonl")
TRAIN, TEST, ALL = "train", "test", "all"
SPLIT_FOLDERS = frozenset({TRAIN, TEST, "val", "valid", "validation"})
HELD_OUT_PART = 20
"""One image in so many is held out of a folder that has no splits."""
NAMED = 3
"""How many of many a message names."""

SPLIT = re.compile(r"(?P<name>[^\[\]]+)(\[(?P<start>-?\d*%?):(?P<stop>-?\d*%?)\])?")


class Listing(NamedTuple):
    """The files of a folder."""

    root: Path
    """The folder."""
    stamps: dict[str, Stamp]
    """Of every file, by its path from the root, with slashes."""
    images: tuple[str, ...]
    """Those of images in a split, sorted."""
    by_split: dict[str, tuple[str, ...]]
    """The images of each split, sorted."""
    has_splits: bool
    """Whether the splits are sub-folders."""

    def class_of(self, name: str) -> str | None:
        """Return the class that an image lies in; None if it lies in none."""
        *folders, _ = name.split("/")[1 if self.has_splits else 0 :]
        return folders[0] if folders else None

    @property
    def class_names(self) -> tuple[str, ...]:
        """Return the classes there are images of, sorted; those to train on."""
        names = self.by_split[TRAIN] if self.has_splits else self.images
        classes = {self.class_of(name) for name in names}
        return tuple(sorted(name for name in classes if name is not None))


def list_folder(root: Path) -> Listing:
    """List a folder; hidden files and folders are passed over, links are followed.

    Args:
      root: The folder.

    Returns:
      What it holds.

    Raises:
      InputError: If it is no folder, or holds no images.
      OSError: If a part of it cannot be listed.
    """
    if not root.is_dir():
        what = "is a file" if root.exists() else "is not there"
        raise InputError(f"data.source: {root} {what}, wanted a folder of images")
    stamps = dict(sorted(_walk(root, "", ())))
    images = tuple(name for name in stamps if name.lower().endswith(SUFFIXES))
    if not images:
        others = f"{len(stamps)} other files ({some(list(stamps))})" if stamps else ""
        raise InputError(
            f"data.source: {root} holds no images but {others or 'nothing'}, wanted "
            f"files that end in {', '.join(SUFFIXES)}"
        )
    tops = {name.partition("/")[0] for name in images if "/" in name}
    # A class may be called `train`, beside `bus`; beside `test` it is a split.
    splits = tops & SPLIT_FOLDERS
    has_splits = TRAIN in splits and (tops == splits or len(splits) > 1)
    if has_splits:
        images = tuple(name for name in images if "/" in name)
        return Listing(root, stamps, images, _by_folder(images, tops), True)
    return Listing(root, stamps, images, _held_out(images), False)


def digest_of(listing: Listing) -> str:
    """Tell two states of a folder apart by names and sizes of images and captions."""
    files = [
        (name, stamp.size)
        for name, stamp in sorted(listing.stamps.items())
        if name.lower().endswith((*SUFFIXES, *CAPTION_SUFFIXES))
    ]
    return hashlib.sha256(repr(files).encode()).hexdigest()


def select(listing: Listing, split: str) -> tuple[str, ...]:
    """Choose the images of a split, or of a slice of it.

    Slices cut a shuffled order, a hash of the names, so that each has all classes.

    Args:
      listing: The folder.
      split: As in TFDS: `train`, `train[:90%]`, `train[-100:]`; or `all`.

    Returns:
      Their names, sorted.

    Raises:
      InputError: If there is no such split, or it holds nothing.
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
    everyone = tuple(x for names in listing.by_split.values() for x in names)
    images = listing.by_split.get(name, everyone)
    if found["start"] is not None:
        start = _place(found["start"], len(images), default=0)
        stop = _place(found["stop"], len(images), default=len(images))
        images = tuple(sorted(images, key=_hash)[start:stop])
    if not images:
        raise InputError(
            f"data: {split!r} of {listing.root} holds none of its "
            f"{len(listing.images)} images; try --data.train-split all "
            "--data.test-split all, or more images"
        )
    return tuple(sorted(images))


def some(names: list[str] | tuple[str, ...]) -> str:
    """Name the first few of many."""
    first = ", ".join(names[:NAMED])
    more = len(names) - NAMED
    return f"{first} and {more:,} more" if more > 0 else first


def _walk(
    root: Path, inside: str, above: tuple[tuple[int, int], ...]
) -> Iterator[tuple[str, Stamp]]:
    """Yield every file below a folder; a link back to a folder above ends there."""
    here = os.stat(root)
    identity = (here.st_dev, here.st_ino)
    if identity in above:
        return
    with os.scandir(root) as entries:
        for entry in entries:
            if entry.name.startswith((".", "__MACOSX")):
                continue
            name = f"{inside}{entry.name}"
            if entry.is_dir():
                yield from _walk(Path(entry.path), f"{name}/", (*above, identity))
            elif entry.is_file():  # not a link to nothing
                stat = entry.stat()
                yield name, Stamp(stat.st_size, stat.st_mtime_ns)


def _by_folder(images: tuple[str, ...], tops: set[str]) -> dict[str, tuple[str, ...]]:
    return {
        top: tuple(name for name in images if name.startswith(f"{top}/"))
        for top in sorted(tops)
    }


def _held_out(images: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Hold out those whose hash is small: at least one, unless there is only one."""
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


def _place(text: str, total: int, *, default: int) -> int:
    """Read where a slice starts or stops: a number or per cent, from the end if < 0."""
    if not text.strip("-%"):
        return default
    if not text.endswith("%"):
        return int(text)
    place = round(int(text[:-1]) * total / 100)
    return place + total if text.startswith("-") else place


def _instead(listing: Listing, name: str) -> str:
    """Suggest what to hold out where the split for it has another name, or is not."""
    if not listing.has_splits or name != TEST:
        return ""
    others = [split for split in listing.by_split if split != TRAIN]
    if others:
        return f"; try --data.test-split {others[0]}"
    return "; try --data.train-split 'train[5%:]' --data.test-split 'train[:5%]'"
