"""A folder of images as a data set: all files are looked at before one is trained on.

Files that cannot be read stop the run, or are passed over up to a limit. What is in a
file but not in its head is seen when it is decoded: at once where all of them fit into
memory, else when its turn comes, where a damaged one stops the run and is named.
"""

import concurrent.futures
import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from PIL import Image
from tqdm import tqdm

from ldm_jax.data.caption_files import Captions, read_caption_files
from ldm_jax.data.folder_listing import Listing, digest_of, list_folder, select, some
from ldm_jax.data.image_files import (
    BrokenImageError,
    Header,
    check_image,
    read_header,
    read_image,
)
from ldm_jax.types import InputError, RunError

T = TypeVar("T")
Need = Literal["label", "caption"]

MAX_THREADS = 16
AT_ONCE = 512
"""Images that wait for a thread: enough to keep all busy, and soon done if told to."""
SECONDS_BEFORE_BAR = 3.0


class FolderExamples:
    """Images of a folder, decoded on access; small folders are decoded once."""

    def __init__(
        self,
        root: Path,
        names: tuple[str, ...],
        *,
        labels: Mapping[str, int],
        captions: Mapping[str, str],
        channels: int,
        keeps: bool,
    ) -> None:
        """Keep what is known of each; `labels` and `captions` have all or none."""
        self.channels = channels
        self._root, self._names = root, names
        self._labels, self._captions = labels, captions
        self._kept: dict[str, Any] | None = {} if keeps else None

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._names)

    def __getitem__(self, record: int, /) -> Mapping[str, Any]:
        """Return one example: `image`, and `label` and `caption` if there are any.

        Raises:
          RunError: If its file turns out to be damaged.
        """
        name = self._names[record]
        example: dict[str, Any] = {"image": self._image(name)}
        if self._labels:
            example["label"] = self._labels[name]
        if self._captions:
            example["caption"] = self._captions[name]
        return example

    def _image(self, name: str) -> Any:
        if self._kept is not None and name in self._kept:
            return self._kept[name]
        try:
            image = read_image(self._root / name)
        except BrokenImageError as error:
            raise RunError(
                f"{self._root / name}: cannot be decoded ({error}); try "
                f"ldm check-images {self._root}, and take away what it names"
            ) from None
        if self._kept is not None:
            self._kept[name] = image
        return image


def open_folder(
    root: Path,
    split: str,
    *,
    needs: tuple[Need, ...],
    image_size: int,
    max_broken_files: int,
    max_bytes_in_memory: int,
) -> tuple[FolderExamples, tuple[str, ...]]:
    """Open a split of a folder of images; says once what is odd about it.

    All of the folder is looked at, so that what is wrong with one split is known before
    the other is trained on.

    Args:
      root: The folder.
      split: Which part, as `select` reads it.
      needs: What every example must have; captions are read only if they are asked for.
      image_size: Side that images are made into, in pixels; smaller ones are told of.
      max_broken_files: How many files that cannot be read are passed over.
      max_bytes_in_memory: Of pixels, up to which all are decoded now and kept.

    Returns:
      The examples, in the order of their names; and the names of their classes.

    Raises:
      InputError: If the folder has no such split, too many broken files, or not what
        is needed.
      OSError: If a file cannot be opened.
    """
    listing = list_folder(root)
    chosen = select(listing, split)
    headers, broken = look_at(listing, max_bytes_in_memory=max_bytes_in_memory)
    _check_broken(listing, broken, max_broken_files)
    names = tuple(name for name in chosen if name in headers)
    if not names:
        raise InputError(f"data: all {len(chosen)} images of {split!r} are broken")
    classes = _classes(listing, needed="label" in needs)
    captions = _captions(listing) if "caption" in needs else {}
    _warn_of_small(root, headers, image_size)
    label_by_class = {name: label for label, name in enumerate(classes)}
    class_by_name = {name: listing.class_of(name) for name in names if classes}
    examples = FolderExamples(
        root,
        names,
        labels={name: label_by_class[str(x)] for name, x in class_by_name.items()},
        captions=captions,
        channels=1 if all(headers[name].is_grey for name in names) else 3,
        keeps=sum(headers[name].num_bytes for name in names) < max_bytes_in_memory,
    )
    return examples, classes


def folder_digest(root: Path) -> str:
    """Tell two states of a folder apart, by names and sizes of its files.

    Raises:
      InputError: If it is no folder, or holds no images.
    """
    return digest_of(list_folder(root))


def folder_captions(root: Path, split: str) -> list[str]:
    """Read the captions of a split of a folder, without looking at its images.

    Raises:
      InputError: As `open_folder` for one that needs captions.
    """
    listing = list_folder(root)
    captions = _captions(listing)
    return [captions[name] for name in select(listing, split)]


def look_at(
    listing: Listing, *, max_bytes_in_memory: int
) -> tuple[dict[str, Header], dict[str, str]]:
    """Look at every file of a folder; decode them too if all fit into memory.

    Args:
      listing: The folder.
      max_bytes_in_memory: Of pixels.

    Returns:
      The headers of what can be read, and why the others cannot.

    Raises:
      OSError: If a file cannot be opened.
    """
    stamps = listing.stamps

    def header(name: str) -> Header:
        return read_header(listing.root / name, stamps[name])

    def whole(name: str) -> None:
        check_image(listing.root / name, stamps[name])

    found, broken = in_threads(header, listing.images, doing="looking at images")
    if sum(header.num_bytes for header in found.values()) < max_bytes_in_memory:
        _, damaged = in_threads(whole, tuple(found), doing="decoding images")
        broken = dict(sorted((broken | damaged).items()))
    return {name: x for name, x in found.items() if name not in broken}, broken


def in_threads(
    do: Callable[[str], T], names: tuple[str, ...], *, doing: str
) -> tuple[dict[str, T], dict[str, str]]:
    """Do something with every image; a bar tells of it if it takes long.

    Args:
      do: What, with the name of one; raises `BrokenImageError` for a broken one.
      names: Of the images.
      doing: What to call it.

    Returns:
      What it returned for each, and why it failed for the others.
    """

    def attempt(name: str) -> tuple[T | None, str]:
        try:
            return do(name), ""
        except BrokenImageError as error:
            return None, str(error)

    found: dict[str, Any] = {}
    broken: dict[str, str] = {}
    with (
        concurrent.futures.ThreadPoolExecutor(num_threads()) as pool,
        tqdm(total=len(names), desc=doing, delay=SECONDS_BEFORE_BAR) as bar,
        warnings.catch_warnings(),
    ):
        bar.mininterval = 0.2 if sys.stderr.isatty() else 10.0
        # What Pillow only warns of is refused here.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        for start in range(0, len(names), AT_ONCE):
            part = names[start : start + AT_ONCE]
            for name, (value, reason) in zip(
                part, pool.map(attempt, part), strict=True
            ):
                if reason:
                    broken[name] = reason
                else:
                    found[name] = value
                bar.update()
    return found, broken


def num_threads() -> int:
    """Return how many threads read images."""
    return min(os.cpu_count() or 1, MAX_THREADS)


def _check_broken(listing: Listing, broken: dict[str, str], limit: int) -> None:
    if not broken:
        return
    details = some([f"{name} ({reason})" for name, reason in broken.items()])
    if len(broken) > limit:
        raise InputError(
            f"data.max_broken_files: {len(broken):,} of {len(listing.images):,} images "
            f"in {listing.root} cannot be read, wanted at most {limit}: {details}; try "
            f"ldm check-images {listing.root}, and take them away, or "
            f"--data.max-broken-files {len(broken)} to pass them over"
        )
    _say_once(
        f"{listing.root}: {len(broken):,} of {len(listing.images):,} images cannot be "
        f"read, and are passed over: {details}"
    )


def _classes(listing: Listing, *, needed: bool) -> tuple[str, ...]:
    """Return the names of the classes; none where not all images lie in one."""
    names = listing.class_names
    outside = [x for x in listing.images if listing.class_of(x) not in names]
    if not outside and (len(names) > 1 or not needed):
        return names
    if not needed:
        return ()
    without = (
        "try sub-folders, or a model without classes (--diffusion.condition.no-label)"
    )
    if not names:
        raise InputError(
            f"data.source: the images of {listing.root} lie in no sub-folders, wanted "
            f"one for each class; {without}"
        )
    if outside:
        raise InputError(
            f"data.source: {len(outside):,} of {len(listing.images):,} images in "
            f"{listing.root} lie in none of the folders of its {len(names)} classes "
            f"({some(names)}): {some(outside)}; {without}"
        )
    raise InputError(
        f"data.source: {listing.root} has one class only, {names[0]}, wanted two or "
        f"more for a class condition; {without}"
    )


def _captions(listing: Listing) -> dict[str, str]:
    """Return a caption for each image; tell of captions without one."""
    found: Captions = read_caption_files(listing)
    without = [name for name in listing.images if name not in found.by_image]
    orphans = f"{len(found.orphans):,} captions have no image: {some(found.orphans)}"
    if without:
        also = f"; {orphans}" if found.orphans and found.by_image else ""
        raise InputError(
            f"data.source: {len(without):,} of {len(listing.images):,} images in "
            f"{listing.root} have no caption: {some(without)}{also}; try a .txt file "
            "beside each, or a line of captions.jsonl; an empty one says nothing"
        )
    if found.orphans:
        _say_once(f"{listing.root}: {orphans}")
    return found.by_image


def _warn_of_small(root: Path, headers: dict[str, Header], image_size: int) -> None:
    small = [
        f"{name} ({header.width}x{header.height})"
        for name, header in headers.items()
        if min(header.width, header.height) < image_size
    ]
    if small:
        _say_once(
            f"{root}: {len(small):,} of {len(headers):,} images are smaller than "
            f"{image_size} pixels, and are enlarged: {some(small)}"
        )


@functools.cache
def _say_once(message: str) -> None:
    """Say something once, however often a folder is opened."""
    logging.getLogger(__name__).warning("%s", message)
