"""TFDS builders: of this package, of a user's Python file, and of TFDS itself.

Python is run of a file that a user names, and of nothing else: no community data set is
downloaded with its code, and a prepared data set names no class but TFDS' own.

A file `builder:PATH.py` is imported from the folder above its packages, as Python would
import it, so that it can import its neighbours. Its data set is prepared under the name
that its builder gives itself.
"""

import contextlib
import difflib
import importlib
import io
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ldm_jax.files import read_json
from ldm_jax.types import InputError

BUILDER = "builder:"
"""Prefix of the name of a data set that a Python file builds; its path follows."""

OWN_BUILDERS = {"digits": "ldm_jax.data.builders.digits.digits_dataset_builder"}
"""Modules of the data sets of this package, by name."""

NAMESPACE = re.compile(r"[^/:]+:(?![\d.*]+$)")
"""Start of the name of a community data set, whose code TFDS downloads and runs; not
the version of another."""
FEATURES_FILE = "features.json"
CLASS_KEYS = frozenset({"type", "pythonClassName", "python_class_name"})
"""Keys of a features file whose value TFDS imports."""

MAX_ERROR_LENGTH = 200
"""Characters quoted of an error in a builder's code: mostly its end."""
PNG_ADVICE = (
    "; try examples whose image is the bytes of a PNG file, which TFDS stores as they "
    "are, or pip install tensorflow"
)


class OwnBuilder(NamedTuple):
    """A builder class that TFDS does not know, and one of its configs."""

    cls: Any
    """The class."""
    config: str | None
    """Name of the config; None for the builder's default."""

    def make(self, where: str) -> Any:
        """Return the builder for data in a folder, prepared or not."""
        return self.cls(config=self.config, data_dir=where, file_format="array_record")


def open_builder(name: str, where: str, *, prepare: bool = True) -> Any:
    """Open a builder of prepared data.

    Args:
      name: `tfds:NAME` or `tfds:NAME/CONFIG`; `builder:PATH.py` or
        `builder:PATH.py/CONFIG`.
      where: TFDS' data folder.
      prepare: Whether a builder of this package or of a file prepares its data first.

    Raises:
      InputError: If there is no such builder, it fails, or its data is not prepared.
    """
    import tensorflow_datasets as tfds

    if own := find_own(name):
        with _errors_in_one_line(name):
            builder = own.make(where)
            if prepare:
                builder.download_and_prepare()
        return builder
    plain = name.removeprefix("tfds:")
    _check_own_code(name, plain, where)
    try:
        builder = tfds.builder(plain, data_dir=where, try_gcs=False)
    except (tfds.core.DatasetNotFoundError, ImportError, ValueError) as error:
        reason = " ".join(str(error).split()).split(" Available datasets")[0][:160]
        known = [*OWN_BUILDERS, *tfds.list_builders(with_community_datasets=False)]
        advice = nearest(plain.partition("/")[0], known) or (
            "; try a name of its catalogue, or your own builder's file, as in "
            "builder:FILE.py"
        )
        raise InputError(
            f"data.source: got {name}, which TFDS does not find in {where} "
            f"({reason}){advice}"
        ) from error
    if not builder.is_prepared():
        raise InputError(
            f"data.source: {name} is not prepared in {where}; try: tfds build {plain} "
            f"--data_dir {where} --file_format array_record"
        )
    return builder


def check_builder(source: str, given: str | None) -> None:
    """Raise `InputError` if a run's config names a Python file that no one gave.

    Args:
      source: Name of the run's data set; reading it runs the file.
      given: The file and config that were given by hand, or None.
    """
    if source.startswith(BUILDER) and given != source.removeprefix(BUILDER):
        path = repr(source.removeprefix(BUILDER))
        raise InputError(
            f"--builder: {'not given' if given is None else f'got {given}'}, but the "
            f"run's config names {path}, a Python file that is run to read its data; "
            f"look at it, and give --builder {path}"
        )
    if given is not None and not source.startswith(BUILDER):
        raise InputError(
            f"--builder: got {given}, but the data of the run is {source!r}, wanted "
            "none"
        )


def find_own(name: str) -> OwnBuilder | None:
    """Find a builder of this package or of a file; None if TFDS must find it.

    Raises:
      InputError: If the file does not exist, fails, or has not exactly one builder; or
        if there is no such config.
    """
    if name.startswith(BUILDER):
        path, config = _split_path(name)
        with _errors_in_one_line(name):
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


def tfds_directory(directory: str | None) -> str:
    """Return the folder of prepared data: as given, or TFDS' default."""
    if directory is None:
        with quiet():
            from tensorflow_datasets.core import constants

        directory = str(constants.DATA_DIR)
    return os.path.expanduser(directory)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep TFDS from printing progress bars and advice on image libraries."""
    absl_logger = logging.getLogger("absl")
    level = absl_logger.level
    absl_logger.setLevel(logging.ERROR)
    try:
        import tensorflow_datasets as tfds

        tfds.disable_progress_bar()
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        absl_logger.setLevel(level)


def nearest(name: str, known: list[str]) -> str:
    """Return "; try NAME" for the known name most like a wrong one; "" if none is."""
    found = difflib.get_close_matches(name, known, n=1)
    return f"; try {found[0]}" if found else ""


def _check_own_code(name: str, plain: str, where: str) -> None:
    """Raise `InputError` if TFDS would import code that is not its own."""
    if NAMESPACE.match(plain):
        raise InputError(
            f"data.source: got {name}, a community data set, whose code TFDS would "
            "download and run; try your own builder's file, as in builder:FILE.py"
        )
    folder = Path(where, plain.partition("/")[0].partition(":")[0])
    for depth in ("*", "*/*"):
        for path in folder.glob(f"{depth}/{FEATURES_FILE}"):
            classes = _classes_in(path) if path.is_file() else [str(path)]
            for found in classes:
                if not found.startswith("tensorflow_datasets."):
                    raise InputError(
                        f"data.source: {path} names the class {found!r}, which TFDS "
                        "would import; wanted a class of TFDS; try your own builder's "
                        "file, as in builder:FILE.py"
                    )


def _classes_in(path: Path) -> list[str]:
    """List the classes that a features file names."""
    found, left = [], [read_json(path, remedy="try preparing the data set again")]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            names = (value[key] for key in CLASS_KEYS & value.keys())
            found += [name for name in names if isinstance(name, str)]
            left += value.values()
        elif isinstance(value, list):
            left += value
    return found


def _split_path(name: str) -> tuple[Path, str]:
    """Split the name of a builder's file into its path and config ("" for none)."""
    before, suffix, config = name.removeprefix(BUILDER).rpartition(".py/")
    path = f"{before}.py" if suffix else config
    return Path(os.path.expanduser(path)), config if suffix else ""


@contextlib.contextmanager
def _errors_in_one_line(name: str) -> Iterator[None]:
    """Turn an exception in the code of a builder's file into an `InputError`."""
    try:
        yield
    except (InputError, OSError):
        raise
    except Exception as error:
        if not name.startswith(BUILDER):
            raise
        path, _ = _split_path(name)
        here = os.path.realpath(path)
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f.lineno for f in frames if os.path.realpath(f.filename) == here]
        where = f" line {lines[-1]}" if lines else ""
        text = " ".join(str(error).split())
        if len(text) > MAX_ERROR_LENGTH:  # TFDS quotes the whole example first
            text = f"{text[: MAX_ERROR_LENGTH // 4]} ... {text[-MAX_ERROR_LENGTH:]}"
        needs_png = isinstance(error, ImportError) and "tensorflow" in text
        raise InputError(
            f"data.source: {path}{where} raised {type(error).__name__}: {text}"
            f"{PNG_ADVICE if needs_png else ''}"
        ) from error


def _load_file(path: Path) -> Any:
    """Import a file and return its builder class."""
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
            f"{module.__file__}; try another name, or the installed folder"
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
    # TFDS looks for it in a package, and the file may lie outside of one.
    cls.pkg_dir_path = cls.__dict__.get("pkg_dir_path") or tfds.core.Path(path.parent)
    return cls
