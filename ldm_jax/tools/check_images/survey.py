"""What is in a folder of images: every file decoded, counted and compared."""

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


class Facts(NamedTuple):
    """What is known of an image that was decoded."""

    height: int
    """In pixels, upright."""
    width: int
    """Likewise."""
    mode: str
    """Pillow's name for its channels, as stored."""
    format: str
    """Of the file, by its content."""
    digest: bytes
    """Of its pixels as they are read."""


class Spread(NamedTuple):
    """The range of a number."""

    least: int
    """Of all."""
    median: int
    """The one in the middle."""
    most: int
    """Of all."""


class Survey(NamedTuple):
    """What a folder holds."""

    listing: Listing
    """The folder."""
    splits: dict[str, tuple[str, ...]]
    """The names of the images of the split trained on and of the one held out."""
    facts: dict[str, Facts]
    """Of each image that can be read."""
    broken: dict[str, str]
    """Why the others cannot."""
    captions: Captions
    """What captions there are."""
    duplicates: tuple[tuple[str, ...], ...]
    """Names of images with the same pixels, two or more together."""

    @property
    def leaks(self) -> tuple[tuple[str, ...], ...]:
        """Duplicates that are both trained on and held out."""
        sides = [set(names) for names in self.splits.values()]
        return tuple(
            group
            for group in self.duplicates
            if len(sides) > 1 and all(side.intersection(group) for side in sides)
        )

    @property
    def uncaptioned(self) -> tuple[str, ...]:
        """Images without a caption, in a folder that has some."""
        by_image = self.captions.by_image
        if not by_image:
            return ()
        return tuple(name for name in self.listing.images if name not in by_image)

    @property
    def classless(self) -> tuple[str, ...]:
        """Images that lie in none of the classes, in a folder that has some."""
        listing, classes = self.listing, self.listing.class_names
        if not classes:
            return ()
        return tuple(x for x in listing.images if listing.class_of(x) not in classes)

    @property
    def classes(self) -> dict[str, dict[str, int]]:
        """Images of each class in each split, in the order of their labels."""
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
        """Files that are neither images of a split nor captions, by their suffix."""
        known = self.captions.files.union(self.listing.images)
        names = [name for name in self.listing.stamps if name not in known]
        return most_first(Path(name).suffix.lower() or "(none)" for name in names)

    def smaller_than(self, side: int) -> list[str]:
        """Return the images with a side below some number of pixels."""
        return [name for name, x in self.facts.items() if min(x.height, x.width) < side]


def survey(root: Path, *, train_split: str, test_split: str | None) -> Survey:
    """Decode all of a folder of images.

    Args:
      root: The folder.
      train_split: The split trained on.
      test_split: The one held out; None for `test`, if there is one.

    Returns:
      What it holds.

    Raises:
      InputError: If it is no such folder, has no such split, or captions cannot be
        read.
      OSError: If a part of it cannot be listed.
    """
    listing = list_folder(root)
    splits = {train_split: select(listing, train_split)}
    if test_split is not None:
        splits[test_split] = select(listing, test_split)
    elif held_out := listing.by_split.get(TEST):
        splits[TEST] = held_out
    captions = read_caption_files(listing)

    def look(name: str) -> Facts:
        try:
            header = read_header(root / name, listing.stamps[name])
            image = read_image(root / name)
        except OSError as error:
            raise BrokenImageError(str(error.strerror or error)) from None
        digest = hashlib.sha256(f"{image.shape}".encode())
        digest.update(image.tobytes())
        height, width = image.shape[:2]
        return Facts(height, width, header.mode, header.format, digest.digest())

    facts, broken = in_threads(look, listing.images, doing="reading images")
    by_digest: dict[bytes, list[str]] = collections.defaultdict(list)
    for name, fact in facts.items():
        by_digest[fact.digest].append(name)
    duplicates = tuple(tuple(x) for x in by_digest.values() if len(x) > 1)
    return Survey(listing, splits, facts, broken, captions, duplicates)


def to_tree(found: Survey, *, image_size: int | None) -> dict[str, Any]:
    """Write a survey as what JSON can hold.

    Args:
      found: The survey.
      image_size: Side below which images are named as small, in pixels.
    """
    facts = list(found.facts.values())
    small = found.smaller_than(image_size or 0)
    captions = found.captions.by_image.values()
    return {
        "folder": str(found.listing.root),
        "num_images": len(found.listing.images),
        "splits": {split: len(names) for split, names in found.splits.items()},
        "classes": found.classes,
        "without_class": found.classless,
        "height": spread(x.height for x in facts),
        "width": spread(x.width for x in facts),
        "formats": most_first(x.format for x in facts),
        "modes": most_first(x.mode for x in facts),
        "smaller": {"than": image_size, "files": small} if image_size else None,
        "num_captions": len(captions),
        "words_of_captions": spread(len(text.split()) for text in captions),
        "without_caption": found.uncaptioned if captions else (),
        "captions_without_image": found.captions.orphans if captions else (),
        "duplicates": found.duplicates,
        "in_both_splits": found.leaks,
        "broken": found.broken,
        "other_files": found.others,
    }


def spread(numbers: Iterable[int]) -> dict[str, int] | None:
    """Return the least, the middle and the most of some numbers; None of none."""
    known = sorted(numbers)
    if not known:
        return None
    return Spread(known[0], statistics.median_low(known), known[-1])._asdict()


def most_first(words: Iterable[str]) -> dict[str, int]:
    """Count words, the most frequent first; those as frequent by the alphabet."""
    counted = collections.Counter(words).items()
    return dict(sorted(counted, key=lambda pair: (-pair[1], pair[0])))
