"""Configs by name, as shipped, or by file."""

import difflib
import importlib.util
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ldm_jax.config.run import Config
from ldm_jax.config.serialization import from_json
from ldm_jax.files import read_text
from ldm_jax.types import InputError

PACKAGE = Path(__file__).parents[1]


def shipped_configs() -> dict[str, Path]:
    """Return the files of `configs/` by name: `digits`, `ldm/sd15`."""
    inside = PACKAGE / "configs"  # as installed; in a checkout they lie beside
    folder = inside if inside.is_dir() else PACKAGE.parent / "configs"
    paths = sorted(folder.glob("**/*.py"))
    return {str(path.relative_to(folder).with_suffix("")): path for path in paths}


def load_config(named: str) -> Config:
    """Load a config: the name of a shipped one, a Python file, or a `config.json`.

    A Python file is run, and its `get_config()` called.

    Raises:
      InputError: If there is none of that name, it does not run, has no `get_config`,
        or returns something else.
    """
    shipped = shipped_configs()
    path = Path(named) if Path(named).is_file() else shipped.get(named)
    if path is None:
        bare = named.removeprefix("configs/").removesuffix(".py")
        near = next(iter(difflib.get_close_matches(bare, shipped, 1, 0.0)), "digits")
        raise InputError(
            f"--config: no file {named!r} and no config of that name; did you mean "
            f"{near}?"
        )
    try:
        if path.suffix == ".json":
            return from_json(read_text(path, remedy="try another copy"))
        config = _run(path)
    except InputError as error:
        raise InputError(f"--config: {path}: {error}") from None
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a user's file may call sys.exit
        raise InputError(f"--config: {path}{_raised(error, path)}") from error
    if type(config) is not Config:
        raise InputError(
            f"--config: get_config() in {path} returned {type(config).__name__}, "
            "wanted ldm_jax.config.Config itself"
        )
    return config


def _raised(error: BaseException, path: Path) -> str:
    """Say what a config file raised, and on which of its own lines."""
    details = f"raised {type(error).__name__}: {error}"
    if isinstance(error, SystemExit):
        details = f"called sys.exit({error.code!r}), wanted get_config() to return"
    here = str(path.absolute())
    if isinstance(error, SyntaxError) and error.filename in (here, str(path)):
        return f" line {error.lineno}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename in (here, str(path))]
    return f" line {lines[-1]} {details}" if lines else f" {details}"


def _run(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("ldm_jax_config", path)
    if spec is None or spec.loader is None:
        raise InputError("no Python file (.py) and no config.json")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    get_config: Callable[[], Any] | None = getattr(module, "get_config", None)
    if not callable(get_config):
        raise InputError("it has no function get_config(); see --config digits")
    return get_config()
