"""The folder of a run: check its config, and lock it against other processes."""

import contextlib
import dataclasses
import fcntl
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ldm_jax import config as config_lib
from ldm_jax.config import CONFIG_FILE, Config
from ldm_jax.files import write_text
from ldm_jax.parallel.layout import Layout
from ldm_jax.parallel.multihost import first_alone
from ldm_jax.types import InputError

LOCK_FILE = ".lock"
MAY_CHANGE = "max_skipped_steps"
"""Config field that may change when a run resumes: it changes no finite step."""


def facts_of(config: Config, layout: Layout) -> dict[str, Any]:
    """Return what must be equal on all processes of a run."""
    return {
        **config_lib.flatten(config),
        "ldm_jax": version("ldm_jax"),
        "jax": version("jax"),
        "jaxlib": version("jaxlib"),
        "flax": version("flax"),
        "optax": version("optax"),
        "devices": f"{len(layout.devices)} {layout.devices[0].device_kind}",
    }


def check_workdir(config: Config, workdir: Path) -> None:
    """Check that a folder is new or belongs to this config.

    Raises:
      InputError: If it was made with another config, or is a file.
    """
    path = workdir / CONFIG_FILE
    if path.exists():
        theirs = config_lib.from_json(path.read_text())
        theirs = dataclasses.replace(
            theirs, **{MAY_CHANGE: getattr(config, MAY_CHANGE)}
        )
        if fields := config_lib.differences(theirs, config):
            raise InputError(
                f"--workdir: {workdir} was made with a different config: "
                f"{', '.join(fields)}; try another --workdir or the same values"
            )
    elif workdir.exists() and not workdir.is_dir():
        raise InputError(f"--workdir: {workdir} is a file, wanted a folder")


@contextlib.contextmanager
def open_workdir(config: Config, workdir: Path) -> Iterator[None]:
    """Create and lock the folder of a run, and write or check its config.

    Raises:
      InputError: If it was made with another config, holds something else, or
        another process is training in it.
      OSError: If it cannot be written.
    """
    with contextlib.ExitStack() as held:
        first_alone(lambda: held.enter_context(_locked(config, workdir)))
        yield


@contextlib.contextmanager
def _locked(config: Config, workdir: Path) -> Iterator[None]:
    check_workdir(config, workdir)
    path = workdir / CONFIG_FILE
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / LOCK_FILE).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"--workdir: another process is training in {workdir}; wait for it, "
                "try another --workdir, or --pod if they are to train together"
            ) from None
        if not path.exists():
            write_text(path, config_lib.to_json(config))
        yield
