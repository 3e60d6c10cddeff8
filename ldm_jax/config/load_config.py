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
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1].lineno
        text = " ".join(str(error).split())
        raise InputError(
            f"--config: {path} line {where} raised {type(error).__name__}: {text}"
        ) from error
    if not isinstance(config, Config):
        raise InputError(
            f"--config: get_config() in {path} returned {type(config).__name__}, "
            "wanted ldm_jax.config.Config"
        )
    return config


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
