"""Captions of a folder of images: `.txt` files beside them, or lines of JSON.

A line of `captions.jsonl` is {"file": "a.png", "caption": "a red bird"}; one of
`metadata.jsonl`, as other programs write it, is {"file_name": "a.png", "text": ...}.
Both files may use either pair of keys. Paths start at the file's folder. Of a list of
captions the first is read.

What looks like captions and is none of these is listed with the reason.
"""

import functools
import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ldm_jax.data.folder_listing import Listing
from ldm_jax.data.image_files import Stamp
from ldm_jax.files import parse_json
from ldm_jax.types import InputError

TEXT_SUFFIX = ".txt"
OWN_FILE, OTHERS_FILE = "captions.jsonl", "metadata.jsonl"
FILE_KEYS, CAPTION_KEYS = ("file", "file_name"), ("caption", "text")

OTHER_TEXTS = (
    *(".txt", ".text", ".caption", ".captions", ".cap", ".prompt", ".tag", ".tags"),
    *(".json", ".md"),
)
"""Suffixes of texts beside images, in any case, as other programs write them."""
OTHER_TABLES = re.compile(
    r"(?i)(.*/)?[^/]*(metadata|caption|prompt|annotation|text)[^/]*"
    r"\.(csv|tsv|json|jsonl|ndjson|parquet|arrow|xlsx?|ya?ml)"
)
"""Names of tables of captions, as other programs write them."""


class Captions(NamedTuple):
    """The captions of a folder."""

    by_image: dict[str, str]
    """Captions by the name of the image."""
    orphans: tuple[str, ...]
    """Locations of captions without an image."""
    files: frozenset[str]
    """Names of the files with captions."""
    unread: tuple[str, ...] = ()
    """What looks like captions of images that have none, each with the reason."""


class Skipped(NamedTuple):
    """A line of JSON without a caption."""

    place: str
    """File and line number."""
    image: str
    """Path of its image from the folder of all; "" if it names none."""
    columns: tuple[str, ...]
    """Its other keys."""


class Line(NamedTuple):
    """A line of JSON with a caption."""

    number: int
    """Line number, from 1."""
    file: str
    """Path of the image from the file's folder."""
    caption: str | None
    """The caption; the first of a list. None if it has none."""
    columns: tuple[str, ...] = ()
    """Keys of a line without a caption."""


def read_caption_files(listing: Listing) -> Captions:
    """Read every caption of a folder.

    Raises:
      InputError: If a file is not UTF-8, a line is malformed, or an image has two
        captions.
      OSError: If a file cannot be read.
    """
    place_by_image: dict[str, str] = {}
    by_image: dict[str, str] = {}
    orphans: list[str] = []
    files: set[str] = set()
    skipped: list[Skipped] = []
    images = set(listing.images)
    nearest = _Nearest(listing)
    for name, stamp in listing.stamps.items():
        folder, file = posixpath.split(name)
        if file not in (OWN_FILE, OTHERS_FILE):
            continue
        files.add(name)
        for line in _read_lines(listing.root / name, stamp):
            image = posixpath.normpath(posixpath.join(folder, line.file))
            place = f"{name} line {line.number}"
            if line.caption is None:
                skipped.append(Skipped(place, image, line.columns))
                continue
            if image not in images:
                orphans.append(f"{place} ({line.file}{nearest.hint(line.file)})")
                continue
            _check_single(listing.root, image, place, place_by_image.get(image))
            place_by_image[image], by_image[image] = place, line.caption
    for image in listing.images:
        name = posixpath.splitext(image)[0] + TEXT_SUFFIX
        if stamp := listing.stamps.get(name):
            _check_single(listing.root, image, name, place_by_image.get(image))
            by_image[image] = _read_text(listing.root / name, stamp)
            files.add(name)
    without = [name for name in listing.images if name not in by_image]
    unread = dict(_unread(listing, without, files, skipped))
    orphans += [
        name
        for name in listing.stamps
        if name.lower().endswith(TEXT_SUFFIX)
        and name not in files
        and name not in unread
    ]
    reasons = tuple(f"{name} ({reason})" for name, reason in unread.items())
    return Captions(by_image, tuple(orphans), frozenset(files), reasons)


class _Nearest:
    """The images of a folder by their names, for what a line may have meant."""

    def __init__(self, listing: Listing) -> None:
        self._listing = listing

    @functools.cached_property
    def _by_stem(self) -> dict[str, str]:
        names = reversed(self._listing.images)
        return {posixpath.splitext(_base(name))[0]: name for name in names}

    def hint(self, file: str) -> str:
        """Return "; the nearest is NAME", or "" if there is none."""
        found = self._by_stem.get(posixpath.splitext(_base(file))[0])
        why = ", wanted slashes" if "\\" in file else ""
        return f"{why}; the nearest is {found}" if found else why


def _base(path: str) -> str:
    """Return the last part of a path of any system, in small letters."""
    return re.split(r"[/\\]", path)[-1].lower()


def _unread(
    listing: Listing, without: list[str], files: set[str], skipped: list[Skipped]
) -> Iterator[tuple[str, str]]:
    """Yield what looks like captions of images that have none, with the reason.

    Args:
      without: Images without a caption.
      files: Names of the files with captions.
      skipped: Lines without a caption.
    """
    if not without:
        return
    images = set(without)
    wanted = " or ".join(CAPTION_KEYS)
    for line in skipped:
        if line.image in images:
            columns = ", ".join(line.columns) or "nothing"
            yield line.place, f"has {columns}, wanted {wanted}"
    stems = {posixpath.splitext(name)[0].lower(): name for name in without}
    whole = {name.lower(): name for name in without}
    for name in sorted(listing.stamps.keys() - files - set(listing.images)):
        stem, suffix = posixpath.splitext(name)
        image = stems.get(stem.lower()) or whole.get(stem.lower())
        if image is not None and suffix.lower() in OTHER_TEXTS:
            text = posixpath.splitext(_last(image))[0] + TEXT_SUFFIX
            yield name, f"wanted {text} beside {_last(image)}"
        elif OTHER_TABLES.fullmatch(name):
            yield name, f"wanted {OWN_FILE} or {OTHERS_FILE}"


def _last(name: str) -> str:
    return posixpath.basename(name)


def _check_single(root: Path, image: str, place: str, other: str | None) -> None:
    if other is not None:
        raise InputError(
            f"{root}: {image} has two captions, in {other} and in {place}, wanted one; "
            "try a list of them on one line, or remove one"
        )


@functools.lru_cache(maxsize=2**20)
def _read_text(path: Path, stamp: Stamp) -> str:
    """Read a text file, cached by its stamp."""
    return _decoded(path.read_bytes(), f"{path}").strip()


@functools.lru_cache(maxsize=64)
def _read_lines(path: Path, stamp: Stamp) -> tuple[Line, ...]:
    """Read the captions of a file, cached by its stamp."""
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        where = f"{path} line {number}"
        text = _decoded(line, where)
        if not text.strip():
            continue
        row = parse_json(text, what=where, remedy="try one JSON object on each line")
        has_caption = isinstance(row, dict) and any(key in row for key in CAPTION_KEYS)
        if has_caption or path.name == OWN_FILE:
            found.append(_checked(row, number, where))
        elif isinstance(row, dict):
            file = next((row[key] for key in FILE_KEYS if key in row), "")
            columns = tuple(str(key) for key in row if key not in FILE_KEYS)
            found.append(Line(number, str(file), None, columns))
    return tuple(found)


def _checked(row: Any, number: int, where: str) -> Line:
    """Return the image and the caption of a line, checked."""
    if not isinstance(row, dict):
        row = {}
    file = next((row[key] for key in FILE_KEYS if key in row), None)
    caption = next((row[key] for key in CAPTION_KEYS if key in row), None)
    if isinstance(caption, list) and caption:
        caption = caption[0]
    if not isinstance(file, str) or not isinstance(caption, str):
        raise InputError(
            f"{where}: got {json.dumps(row)[:80]}, wanted "
            '{"file": "IMAGE", "caption": "TEXT"}'
        )
    try:
        caption.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: its caption is not Unicode ({error})") from None
    return Line(number, file, caption.strip())


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")  # some editors write a byte order mark
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: not UTF-8 ({error.reason} at byte {error.start}); try saving it "
            "as UTF-8"
        ) from None
