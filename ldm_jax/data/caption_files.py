"""Captions of a folder of images: `.txt` files beside them, or lines of JSON.

A line of `captions.jsonl` is {"file": "a.png", "caption": "a red bird"}; one of
`metadata.jsonl`, as other programs write it, is {"file_name": "a.png", "text": ...}.
Both files may use either pair of keys. Paths start at the file's folder. Of a list of
captions the first is read.
"""

import functools
import json
import posixpath
from pathlib import Path
from typing import Any, NamedTuple

from ldm_jax.data.folder_listing import Listing
from ldm_jax.data.image_files import Stamp
from ldm_jax.files import parse_json
from ldm_jax.types import InputError

TEXT_SUFFIX = ".txt"
OWN_FILE, OTHERS_FILE = "captions.jsonl", "metadata.jsonl"
FILE_KEYS, CAPTION_KEYS = ("file", "file_name"), ("caption", "text")


class Captions(NamedTuple):
    """The captions of a folder."""

    by_image: dict[str, str]
    """Captions by the name of the image."""
    orphans: tuple[str, ...]
    """Locations of captions without an image."""
    files: frozenset[str]
    """Names of the files with captions."""


class Line(NamedTuple):
    """A line of JSON with a caption."""

    number: int
    """Line number, from 1."""
    file: str
    """Path of the image from the file's folder."""
    caption: str
    """The caption; the first of a list."""


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
    images = set(listing.images)
    for name, stamp in listing.stamps.items():
        folder, file = posixpath.split(name)
        if file not in (OWN_FILE, OTHERS_FILE):
            continue
        files.add(name)
        for line in _read_lines(listing.root / name, stamp):
            image = posixpath.normpath(posixpath.join(folder, line.file))
            place = f"{name} line {line.number}"
            if image not in images:
                orphans.append(f"{place} ({line.file})")
                continue
            _check_single(listing.root, image, place, place_by_image.get(image))
            place_by_image[image], by_image[image] = place, line.caption
    for image in listing.images:
        name = posixpath.splitext(image)[0] + TEXT_SUFFIX
        if stamp := listing.stamps.get(name):
            _check_single(listing.root, image, name, place_by_image.get(image))
            by_image[image] = _read_text(listing.root / name, stamp)
            files.add(name)
    orphans += [
        name
        for name in listing.stamps
        if name.lower().endswith(TEXT_SUFFIX) and name not in files
    ]
    return Captions(by_image, tuple(orphans), frozenset(files))


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
