"""Survey of a folder of images: every file decoded, counted and compared."""

import collections
import hashlib
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ldm_jax.data.caption_files import Captions, read_caption_files
from ldm_jax.data.folder import in_threads
from ldm_jax.data.folder_listing import TEST, Listing, list_folder, select
from ldm_jax.data.image_files import (
    BrokenImageError,
    read_header,
    read_image,
)


class DecodedImage(NamedTuple):
    """Properties of a decoded image."""

    height: int
    """Height in pixels, upright."""
    width: int
    """Width in pixels, upright."""
    mode: str
    """Pillow's name of the stored channels."""
    format: str
    """Pillow's name of the file format."""
    digest: bytes
    """Digest of the decoded pixels."""


class Survey(NamedTuple):
    """Content of a folder."""

    listing: Listing
    """Files of the folder."""
    splits: dict[str, tuple[str, ...]]
    """Images of the training split and of the held-out split."""
    images: dict[str, DecodedImage]
    """Readable images."""
    broken: dict[str, str]
    """Reasons of the unreadable images."""
    captions: Captions
    """Captions of the folder."""
    duplicates: tuple[tuple[str, ...], ...]
    """Groups of images with equal pixels."""

    @property
    def leaks(self) -> tuple[tuple[str, ...], ...]:
        """Duplicates that are in both splits."""
        sides = [set(names) for names in self.splits.values()]
        return tuple(
            group
            for group in self.duplicates
            if len(sides) > 1 and all(side.intersection(group) for side in sides)
        )

    @property
    def uncaptioned(self) -> tuple[str, ...]:
        """Images without a caption, in a folder with captions."""
        by_image = self.captions.by_image
        if not by_image:
            return ()
        return tuple(name for name in self.listing.images if name not in by_image)

    @property
    def classless(self) -> tuple[str, ...]:
        """Images in no class, in a folder with classes."""
        listing, classes = self.listing, self.listing.class_names
        if not classes:
            return ()
        return tuple(x for x in listing.images if listing.class_of(x) not in classes)

    @property
    def classes(self) -> dict[str, dict[str, int]]:
        """Number of images of each class in each split, in the order of the labels."""
        listing = self.listing
        counts = {
            split: collections.Counter(listing.class_of(name) for name in names)
            for split, names in self.splits.items()
        }
        return {
            name: {split: count[name] for split, count in counts.items()}
            for name in listing.class_names
        }

    @property
    def others(self) -> dict[str, int]:
        """Number of files that are neither images nor captions, by suffix."""
        known = self.captions.files.union(self.listing.images)
        names = [name for name in self.listing.stamps if name not in known]
        return counts_of(Path(name).suffix.lower() or "(none)" for name in names)

    def smaller_than(self, side: int) -> list[str]:
        """Return the images with a side below `side` pixels."""
        return [
            name for name, x in self.images.items() if min(x.height, x.width) < side
        ]


def survey(root: Path, *, train_split: str, test_split: str | None) -> Survey:
    """Decode all images of a folder.

    Args:
      root: The folder.
      train_split: Training split.
      test_split: Held-out split; None for `test`, if there is one.

    Raises:
      InputError: If it is no folder of images, has no such split, or captions cannot be
        read.
      OSError: If a sub-folder cannot be listed.
    """
    listing = list_folder(root)
    splits = {train_split: select(listing, train_split)}
    if test_split is not None:
        splits[test_split] = select(listing, test_split)
    elif held_out := listing.by_split.get(TEST):
        splits[TEST] = held_out
    captions = read_caption_files(listing)

    def decode(name: str) -> DecodedImage:
        try:
            header = read_header(root / name, listing.stamps[name])
            image = read_image(root / name)
        except OSError as error:
            raise BrokenImageError(str(error.strerror or error)) from None
        digest = hashlib.sha256(f"{image.shape}".encode())
        digest.update(image.tobytes())
        height, width = image.shape[:2]
        return DecodedImage(height, width, header.mode, header.format, digest.digest())

    images, broken = in_threads(decode, listing.images, doing="reading images")
    by_digest: dict[bytes, list[str]] = collections.defaultdict(list)
    for name, decoded in images.items():
        by_digest[decoded.digest].append(name)
    duplicates = tuple(tuple(x) for x in by_digest.values() if len(x) > 1)
    return Survey(listing, splits, images, broken, captions, duplicates)


def to_tree(found: Survey, *, image_size: int | None) -> dict[str, Any]:
    """Convert a survey to JSON-compatible values.

    Args:
      found: The survey.
      image_size: Side in pixels below which an image is listed as small.
    """
    images = list(found.images.values())
    small = found.smaller_than(image_size or 0)
    captions = found.captions.by_image.values()
    return {
        "folder": str(found.listing.root),
        "num_images": len(found.listing.images),
        "splits": {split: len(names) for split, names in found.splits.items()},
        "classes": found.classes,
        "without_class": found.classless,
        "height": least_median_most(x.height for x in images),
        "width": least_median_most(x.width for x in images),
        "formats": counts_of(x.format for x in images),
        "modes": counts_of(x.mode for x in images),
        "smaller": {"than": image_size, "files": small} if image_size else None,
        "num_captions": len(captions),
        "words_of_captions": least_median_most(len(text.split()) for text in captions),
        "without_caption": found.uncaptioned if captions else (),
        "captions_without_image": found.captions.orphans,
        "texts_not_read": found.captions.unread,
        "duplicates": found.duplicates,
        "in_both_splits": found.leaks,
        "broken": found.broken,
        "other_files": found.others,
    }


def least_median_most(numbers: Iterable[int]) -> dict[str, int] | None:
    """Return the minimum, median and maximum of numbers; None if there are none."""
    known = sorted(numbers)
    if not known:
        return None
    median = statistics.median_low(known)
    return {"least": known[0], "median": median, "most": known[-1]}


def counts_of(words: Iterable[str]) -> dict[str, int]:
    """Count words, by falling frequency, then in alphabetical order."""
    counted = collections.Counter(words).items()
    return dict(sorted(counted, key=lambda pair: (-pair[1], pair[0])))
