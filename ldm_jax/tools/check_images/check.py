"""Check of a folder of images: a report and a contact sheet."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ldm_jax.images import write_png
from ldm_jax.tools.check_images.contact_sheet import choose, draw_sheet
from ldm_jax.tools.check_images.survey import survey, to_tree

NUM_NAMED = 10
"""Files of each kind that the text report names; JSON names all."""
MAX_CLASSES = 40


def check_images(
    folder: Path,
    out: Path,
    *,
    image_size: int | None = None,
    train_split: str = "train",
    test_split: str | None = None,
) -> dict[str, Any]:
    """Decode every image of a folder, and draw a contact sheet.

    Args:
      folder: Folder of the images.
      out: PNG of the contact sheet; not written if no image can be read.
      image_size: Side in pixels below which an image is listed as small.
      train_split: Training split.
      test_split: Held-out split; None for `test`, if there is one.

    Returns:
      The result of `to_tree`, and the path of the `contact_sheet`.

    Raises:
      InputError: If it is no folder of images.
      OSError: If the sheet cannot be written.
    """
    found = survey(folder, train_split=train_split, test_split=test_split)
    tree = to_tree(found, image_size=image_size)
    tree["contact_sheet"] = None
    if chosen := choose(tuple(found.images)):
        labels = {name: found.listing.class_of(name) or name for name in chosen}
        labels |= {name: text for name, text in found.captions.by_image.items() if text}
        title = f"{len(chosen)} of {len(found.listing.images)} images in {folder}"
        write_png(out, draw_sheet(folder, chosen, title=title, labels=labels))
        tree["contact_sheet"] = str(out)
    return tree


def in_words(tree: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of the text report of `check_images`."""
    splits: dict[str, int] = tree["splits"]
    parts = ", ".join(f"{split} {number:,}" for split, number in splits.items())
    yield f"{tree['folder']}: {tree['num_images']:,} images ({parts})"
    yield ""
    yield from _classes(tree["classes"], list(splits))
    yield from _sizes(tree)
    for name in ("formats", "modes"):
        yield f"{name:<10}{_counts(tree[name])}"
    if tree["num_captions"]:
        words = tree["words_of_captions"]
        yield (
            f"captions  {tree['num_captions']:,}, of {words['least']} to "
            f"{words['most']} words, half of them at most {words['median']}"
        )
    else:
        yield "captions  none"
    if tree["other_files"]:
        yield f"others    {_counts(tree['other_files'])}"
    yield ""
    yield from _problems(tree)
    if tree["contact_sheet"]:
        yield f"contact sheet: {tree['contact_sheet']}"


def _classes(classes: dict[str, dict[str, int]], splits: list[str]) -> Iterator[str]:
    if not classes:
        yield "classes   none"
        return
    width = max(len("class"), *map(len, classes))
    head = "".join(f"{split:>12}" for split in splits)
    yield f"label  {'class':<{width}}{head}"
    for label, (name, counts) in enumerate(classes.items()):
        if label == MAX_CLASSES:
            yield f"  ...  and {len(classes) - MAX_CLASSES:,} more"
            break
        numbers = "".join(f"{counts[split]:>12,}" for split in splits)
        yield f"{label:>5}  {name:<{width}}{numbers}"
    yield ""


def _sizes(tree: dict[str, Any]) -> Iterator[str]:
    names = ("least", "median", "most")
    if tree["height"]:
        yield f"{'pixels':<10}" + "".join(f"{name:>8}" for name in names)
        for side in ("height", "width"):
            yield f"{side:<10}" + "".join(f"{tree[side][name]:>8,}" for name in names)


def _problems(tree: dict[str, Any]) -> Iterator[str]:
    """Yield what a user may want to correct."""
    equal = [" = ".join(group) for group in tree["duplicates"]]
    leaks = [" = ".join(group) for group in tree["in_both_splits"]]
    broken = [f"{name}: {reason}" for name, reason in tree["broken"].items()]
    small = tree["smaller"] or {"than": 0, "files": []}
    lists: dict[str, Sequence[str]] = {
        "broken": broken,
        "in no class": tree["without_class"],
        "without a caption": tree["without_caption"],
        "captions without an image": tree["captions_without_image"],
        "texts that are not read as captions": tree["texts_not_read"],
        f"smaller than {small['than']} pixels": small["files"],
        "the same image more than once": equal,
        "of these, in both splits": leaks,
    }
    found = False
    for what, lines in lists.items():
        if lines:
            found = True
            yield f"{what}: {len(lines):,}"
            yield from _some(lines)
    if not found:
        yield "no image is broken, duplicated or without its caption"


def _some(lines: Iterable[str]) -> Iterator[str]:
    lines = list(lines)
    yield from (f"  {line}" for line in lines[:NUM_NAMED])
    if len(lines) > NUM_NAMED:
        yield f"  and {len(lines) - NUM_NAMED:,} more (--json names all)"


def _counts(number_by_word: dict[str, int]) -> str:
    return ", ".join(f"{word} {number:,}" for word, number in number_by_word.items())
