"""TODO."""

import argparse
import re
from pathlib import Path
from typing import Any, NamedTuple

from ldm_jax.types import InputError

CACHE_FOLDER = ".compiled"


class Launch(NamedTuple):
    """How a program starts."""

    pod: bool = False
    """Whether it is one of several processes."""
    coordinator: str | None = None
    """`HOST:PORT` of process 0; None asks the cluster."""
    num_processes: int | None = None
    """How many there are; None asks the cluster."""
    process_id: int | None = None
    """Which one this is; None asks the cluster."""
    cache: Path | None = None
    """Folder of compiled programs; None keeps none."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how a program starts."""
    parser.add_argument(
        "--pod",
        action="store_true",
        help="join the other processes of a TPU pod, SLURM step or Kubernetes job",
    )
    parser.add_argument(
        "--coordinator", metavar="HOST:PORT", help="of process 0, to join by hand"
    )
    parser.add_argument("--num-processes", type=int, metavar="N", help="how many")
    parser.add_argument("--process-id", type=int, metavar="I", help="0 to N - 1")
    parser.add_argument(
        "--compilation-cache",
        metavar="DIR",
        help="folder of compiled programs, or none; default: beside --workdir",
    )


def check_local(path: Path | None, flag: str) -> None:
    """Raise `InputError` if a path is the address of a bucket, not a folder."""
    if path is not None and re.match(r"[a-z0-9]{2,}:/", str(path)):
        raise InputError(
            f"{flag}: got {path}, wanted a folder of a mounted file system; try to "
            "mount the bucket (gcsfuse, s3fs) and give the place"
        )


def check_launch(given: Any, *, beside: Path | None) -> Launch:
    """Check the flags that say how a program starts.

    Args:
      given: The flags of `add_flags`, as attributes.
      beside: What the cache lies beside if no folder is given; None for none.

    Returns:
      How the program starts.

    Raises:
      InputError: If some of the three that go together are missing, or out of range.
    """
    coordinator = given.coordinator
    num_processes, process_id = given.num_processes, given.process_id
    three = {
        "--coordinator": coordinator,
        "--num-processes": num_processes,
        "--process-id": process_id,
    }
    missing = [flag for flag, value in three.items() if value is None]
    if missing and len(missing) < len(three):
        raise InputError(
            f"{missing[0]}: not given, wanted it with the other two of "
            "--coordinator HOST:PORT --num-processes N --process-id I"
        )
    if coordinator is not None and num_processes is not None and process_id is not None:
        host, colon, port = coordinator.rpartition(":")
        if not (host and colon and port.isdigit()):
            raise InputError(
                f"--coordinator: got {coordinator!r}, wanted HOST:PORT; try "
                "localhost:12345"
            )
        if num_processes < 1:
            raise InputError(f"--num-processes: got {num_processes}, wanted 1 or more")
        if not 0 <= process_id < num_processes:
            raise InputError(
                f"--process-id: got {process_id}, wanted 0 to {num_processes - 1}"
            )
    cache = None
    if given.compilation_cache is not None:
        named = given.compilation_cache
        cache = None if named == "none" else Path(named)
    elif beside is not None:
        cache = beside.absolute().parent / CACHE_FOLDER
    return Launch(
        given.pod or coordinator is not None,
        coordinator,
        num_processes,
        process_id,
        cache,
    )
