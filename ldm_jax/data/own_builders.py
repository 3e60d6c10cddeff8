"""TFDS builders that TFDS does not know: those in here, and a user's own Python files.

A file `builder:PATH.py` is imported as Python would from the folder above its packages,
so that it may import its neighbours, and prepared under the name that it gives itself.
"""

import contextlib
import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ldm_jax.types import InputError

BUILDER = "builder:"
"""Begins the name of a data set that a Python file builds; what follows is its path."""

OWN_BUILDERS = {"digits": "ldm_jax.data.builders.digits.digits_dataset_builder"}
"""Data sets that are shipped here, by name; prepared when first opened."""

CONDITION_KEYWORDS = 200
"""Letters of what a builder's code raises; of more, the last and a few of the first."""
PNG_ADVICE = (
    "; try examples whose image is the bytes of a PNG file, which TFDS stores as they "
    "are, or pip install tensorflow"
)


class OwnBuilder(NamedTuple):
    """A builder, and which of its configs."""

    cls: Any
    """The class."""
    config: str | None
    """Name of the config; None for the builder's default."""

    def make(self, where: str) -> Any:
        """Return the builder of what is prepared, or will be, in a folder."""
        return self.cls(config=self.config, data_dir=where, file_format="array_record")


def find_own(name: str) -> OwnBuilder | None:
    """Find a builder of this package or of a file.

    Args:
      name: `tfds:NAME` or `tfds:NAME/CONFIG`; `builder:PATH.py` or
        `builder:PATH.py/CONFIG`.

    Returns:
      The builder; None if it is for TFDS to find.

    Raises:
      InputError: If the file is not there, does not run, or has no builder or more than
        one; or if there is no such config.
    """
    if name.startswith(BUILDER):
        path, config = split_path(name)
        with details(name):
            cls = _load_file(path)
    else:
        own, _, config = name.removeprefix("tfds:").partition("/")
        if own not in OWN_BUILDERS:
            return None
        cls = importlib.import_module(OWN_BUILDERS[own]).Builder
    known = list(cls.builder_configs)
    if config and config not in known:
        raise InputError(
            f"data.source: got {name}, wanted a config of {cls.name}: "
            f"{', '.join(known) or 'it has none'}{nearest(config, known)}"
        )
    return OwnBuilder(cls, config or None)


def split_path(name: str) -> tuple[Path, str]:
    """Return the path in the name of a builder's file, and the config; "" if none."""
    before, suffix, config = name.removeprefix(BUILDER).rpartition(".py/")
    path = f"{before}.py" if suffix else config
    return Path(path).expanduser(), config if suffix else ""


@contextlib.contextmanager
def details(name: str) -> Iterator[None]:
    """Tell in one line what the code of a builder's file raises."""
    try:
        yield
    except (InputError, OSError):
        raise
    except Exception as error:
        if not name.startswith(BUILDER):
            raise
        path, _ = split_path(name)
        here = os.path.realpath(path)
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f.lineno for f in frames if os.path.realpath(f.filename) == here]
        where = f" line {lines[-1]}" if lines else ""
        text = " ".join(str(error).split())
        # TFDS quotes the whole example first.
        text = (
            text
            if len(text) <= CONDITION_KEYWORDS
            else f"{text[: CONDITION_KEYWORDS // 4]} ... {text[-CONDITION_KEYWORDS:]}"
        )
        needs = isinstance(error, ImportError) and "tensorflow" in text
        raise InputError(
            f"data.source: {path}{where} raised {type(error).__name__}: {text}"
            f"{PNG_ADVICE if needs else ''}"
        ) from error


def nearest(name: str, known: list[str]) -> str:
    """Return "; try NAME" for the known name most like a wrong one; "" if none is."""
    found = difflib.get_close_matches(name, known, n=1)
    return f"; try {found[0]}" if found else ""


def _load_file(path: Path) -> Any:
    """Import a file and return its builder."""
    import tensorflow_datasets as tfds

    if not path.is_file() or path.suffix != ".py":
        what = "no file" if path.suffix == ".py" else "no Python file"
        raise InputError(
            f"data.source: {what} {path} in {Path.cwd()}, wanted that of a TFDS "
            "builder, as in builder:FILE.py or builder:FILE.py/CONFIG; try the path "
            "from the folder where this command runs"
        )
    root, parts = Path(os.path.abspath(path)).parent, [path.stem]
    while (root / "__init__.py").is_file():
        root, parts = root.parent, [root.name, *parts]
    if str(root) not in sys.path:
        sys.path.append(str(root))
    name = ".".join(parts)
    module = importlib.import_module(name)
    if not module.__file__ or not path.samefile(module.__file__):
        raise InputError(
            f"data.source: {path} is imported as {name}, which is another file: "
            f"{module.__file__}; try another name for the file or its folder"
        )
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, tfds.core.DatasetBuilder)
        and value.__module__ == name
    ]
    if len(found) != 1:
        names = ", ".join(cls.__name__ for cls in found) or "none"
        raise InputError(
            f"data.source: {path} has the builders {names}, wanted one class of "
            "tfds.core.GeneratorBasedBuilder; try class Builder"
        )
    (cls,) = found
    # TFDS looks for it in a package, and the file need not be in one.
    cls.pkg_dir_path = cls.__dict__.get("pkg_dir_path") or tfds.core.Path(path.parent)
    return cls
