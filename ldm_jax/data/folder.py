"""A folder of images as a data set, checked before training.

Unreadable files stop the run, or are skipped up to a limit. Damage after a file's
header shows when it is decoded: at once if all images fit into memory, otherwise during
training, where it stops the run with the file's name.
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
from ldm_jax.data.folder_listing import Listing, list_folder, select, some
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
BATCH = 512
"""Images queued for the threads: enough to keep them busy, few enough to stop soon."""
SECONDS_BEFORE_BAR = 3.0


class FolderExamples:
    """Images of a folder, decoded on access; those of small folders are kept."""

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
        """Wrap images by name; `labels` and `captions` hold all of them or none."""
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
          RunError: If its file is damaged.
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
                f"ldm check-images {self._root}, and remove the files that it names"
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
    """Open a split of a folder of images; warns once of what may be a mistake.

    All splits are checked, so that an error in one is found before training on another.

    Args:
      root: The folder.
      split: Part of the folder in the notation of `select`.
      needs: What every example must have; captions are read only if needed.
      image_size: Side of the training images, in pixels; a warning names smaller ones.
      max_broken_files: Unreadable files that are skipped.
      max_bytes_in_memory: Bytes of pixels up to which all images are decoded and kept.

    Returns:
      The examples in the order of their names, and the names of their classes.

    Raises:
      InputError: If the folder has no such split, too many unreadable files, or lacks
        what is needed.
      OSError: If a file cannot be opened.
    """
    listing = list_folder(root)
    chosen = select(listing, split)
    headers, broken = check_files(listing, max_bytes_in_memory=max_bytes_in_memory)
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


def folder_captions(root: Path, split: str) -> list[str]:
    """Read the captions of a split of a folder without reading its images.

    Raises:
      InputError: As `open_folder` for one that needs captions.
    """
    listing = list_folder(root)
    captions = _captions(listing)
    return [captions[name] for name in select(listing, split)]


def check_files(
    listing: Listing, *, max_bytes_in_memory: int
) -> tuple[dict[str, Header], dict[str, str]]:
    """Read the header of every image of a folder; decode all if they fit into memory.

    Returns:
      The headers of the readable files, and the reason why each other one is not.

    Raises:
      OSError: If a file cannot be opened.
    """
    stamps = listing.stamps

    def header(name: str) -> Header:
        return read_header(listing.root / name, stamps[name])

    def whole(name: str) -> None:
        check_image(listing.root / name, stamps[name])

    found, broken = in_threads(header, listing.images, doing="reading headers")
    if sum(header.num_bytes for header in found.values()) < max_bytes_in_memory:
        _, damaged = in_threads(whole, tuple(found), doing="decoding images")
        broken = dict(sorted((broken | damaged).items()))
    return {name: x for name, x in found.items() if name not in broken}, broken


def in_threads(
    do: Callable[[str], T], names: tuple[str, ...], *, doing: str
) -> tuple[dict[str, T], dict[str, str]]:
    """Apply a function to every image in threads; a progress bar appears after 3 s.

    Args:
      do: Function of an image's name; raises `BrokenImageError` for a broken image.
      names: Names of the images.
      doing: Label of the progress bar.

    Returns:
      Its results by name, and the reasons of its failures by name.
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
        # Our own size limit is stricter than the one that Pillow warns of.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        for start in range(0, len(names), BATCH):
            part = names[start : start + BATCH]
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
    """Return the number of threads that read images."""
    return min(os.cpu_count() or 1, MAX_THREADS)


def _check_broken(listing: Listing, broken: dict[str, str], limit: int) -> None:
    if not broken:
        return
    details = some([f"{name} ({reason})" for name, reason in broken.items()])
    if len(broken) > limit:
        raise InputError(
            f"data.max_broken_files: {len(broken):,} of {len(listing.images):,} images "
            f"in {listing.root} cannot be read, wanted at most {limit}: {details}; try "
            f"ldm check-images {listing.root} and removing them, or "
            f"--data.max-broken-files {len(broken)} to skip them"
        )
    _warn_once(
        f"{listing.root}: {len(broken):,} of {len(listing.images):,} images cannot be "
        f"read and are skipped: {details}"
    )


def _classes(listing: Listing, *, needed: bool) -> tuple[str, ...]:
    """Return the names of the classes; () if some image lies in none."""
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
    """Return a caption for each image; warn of captions without an image."""
    found: Captions = read_caption_files(listing)
    without = [name for name in listing.images if name not in found.by_image]
    orphans = f"{len(found.orphans):,} captions have no image: {some(found.orphans)}"
    if without:
        also = f"; {orphans}" if found.orphans else ""
        if found.unread:
            also += f"; {len(found.unread):,} texts are not read: {some(found.unread)}"
        raise InputError(
            f"data.source: {len(without):,} of {len(listing.images):,} images in "
            f"{listing.root} have no caption: {some(without)}{also}; try a .txt file "
            "beside each, or a line of captions.jsonl; a caption may be empty"
        )
    if found.orphans:
        _warn_once(f"{listing.root}: {orphans}")
    return found.by_image


def _warn_of_small(root: Path, headers: dict[str, Header], image_size: int) -> None:
    small = [
        f"{name} ({header.width}x{header.height})"
        for name, header in headers.items()
        if min(header.width, header.height) < image_size
    ]
    if small:
        _warn_once(
            f"{root}: {len(small):,} of {len(headers):,} images are smaller than "
            f"{image_size} pixels and are enlarged: {some(small)}"
        )


@functools.cache
def _warn_once(message: str) -> None:
    """Warn once, however often the folder is opened."""
    logging.getLogger(__name__).warning("%s", message)
