"""What is in a folder of images, before a model is trained on it.

    ldm check-images pictures

Decodes every file and says how many there are in each class and split, their sizes and
modes, what cannot be read, which are the same picture, and what has no caption; and
draws a contact sheet. Exit code 1 if files cannot be read, else 0.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ldm_jax.config.flags import FAILED_RUN_EXIT_CODE, OneLineParser, run_main
from ldm_jax.types import InputError

PROG = "ldm check-images"
DEFAULT_OUT = Path("contact_sheet.png")
NAMED = 10
"""How many files of a kind are named; `--json` names all."""
MAX_CLASSES = 40


def parse(args: list[str]) -> argparse.Namespace:
    """Read the command line.

    Returns:
      `path`, `out`, `image_size`, `train_split`, `test_split` and `json`.

    Raises:
      InputError: If it is wrong.
      SystemExit: After printing the help.
    """
    parser = OneLineParser(
        prog=PROG,
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("path", type=Path, help="the folder")
    add("--out", type=Path, default=DEFAULT_OUT, help=f"PNG to draw; {DEFAULT_OUT}")
    add("--image-size", type=int, help="name images smaller than so many pixels")
    add("--train-split", default="train", help="as --data.train-split; train")
    add("--test-split", help="as --data.test-split; test, if there is one")
    add("--json", action="store_true", help="print JSON, with all names")
    given = parser.parse_args(args)
    given.path = given.path.expanduser()
    if given.image_size is not None and given.image_size < 1:
        raise InputError(f"--image-size: got {given.image_size}, wanted 1 or more")
    if given.out.suffix.lower() != ".png":
        raise InputError(f"--out: got {given.out}, wanted a name that ends in .png")
    if given.path.resolve() in given.out.resolve().parents:
        raise InputError(
            f"--out: {given.out} lies in {given.path}, where it would count as one of "
            "its images; try --out with a file elsewhere"
        )
    if not given.out.absolute().parent.is_dir():
        raise InputError(f"--out: no folder {given.out.parent} to write to")
    return given


def main(args: list[str]) -> None:
    """Parse, look at everything, say what is there.

    Raises:
      SystemExit: With code 1, if there are broken files.
    """
    given = parse(args)
    # Only now: help and bad input need not wait for these.
    from ldm_jax.images import write_png
    from ldm_jax.tools.check_images.contact_sheet import choose, draw_sheet
    from ldm_jax.tools.check_images.survey import survey, to_tree

    found = survey(
        given.path, train_split=given.train_split, test_split=given.test_split
    )
    tree = to_tree(found, image_size=given.image_size)
    tree["contact_sheet"] = None
    if chosen := choose(tuple(found.facts)):
        labels = {name: found.listing.class_of(name) or name for name in chosen}
        labels |= {name: text for name, text in found.captions.by_image.items() if text}
        title = f"{len(chosen)} of {len(found.listing.images)} images in {given.path}"
        page = draw_sheet(given.path, chosen, title=title, labels=labels)
        write_png(given.out, page)
        tree["contact_sheet"] = str(given.out)
    text = json.dumps(tree) if given.json else "\n".join(in_words(tree))
    print(text.encode("utf-8", "backslashreplace").decode())  # noqa: T201
    if found.broken:
        sys.exit(FAILED_RUN_EXIT_CODE)


def in_words(tree: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of a report.

    Args:
      tree: What `to_tree` makes of a survey, and `contact_sheet`.
    """
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
    yield from _odd(tree)
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


def _odd(tree: dict[str, Any]) -> Iterator[str]:
    """Yield what a user may want to mend, or that there is nothing."""
    equal = [" = ".join(group) for group in tree["duplicates"]]
    leaks = [" = ".join(group) for group in tree["in_both_splits"]]
    broken = [f"{name}: {reason}" for name, reason in tree["broken"].items()]
    small = tree["smaller"] or {"than": 0, "files": []}
    lists: dict[str, Sequence[str]] = {
        "broken": broken,
        "in none of the classes": tree["without_class"],
        "without a caption": tree["without_caption"],
        "captions without an image": tree["captions_without_image"],
        f"smaller than {small['than']} pixels": small["files"],
        "the same picture more than once": equal,
        "of these, both trained on and held out": leaks,
    }
    found = False
    for what, lines in lists.items():
        if lines:
            found = True
            yield f"{what}: {len(lines):,}"
            yield from _some(lines)
    if not found:
        yield "nothing is broken, twice there or without its caption"


def _some(lines: Iterable[str]) -> Iterator[str]:
    lines = list(lines)
    yield from (f"  {line}" for line in lines[:NAMED])
    if len(lines) > NAMED:
        yield f"  and {len(lines) - NAMED:,} more (--json names all)"


def _counts(number_by_word: dict[str, int]) -> str:
    return ", ".join(f"{word} {number:,}" for word, number in number_by_word.items())


if __name__ == "__main__":
    run_main(main, PROG)
