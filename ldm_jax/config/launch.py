"""How a program starts: alone or beside others, and where its compiled programs lie."""

import re
from pathlib import Path

from ldm_jax.config.validation import checked_dataclass, require
from ldm_jax.types import InputError

CACHE_FOLDER = ".compiled"
NO_CACHE = Path("none")
"""Value of `compilation_cache` that keeps no compiled programs."""
MAX_PORT = 2**16 - 1
MAX_JOIN_TIMEOUT = 10**6


@checked_dataclass
class Launch:
    """How a program starts; every field is a flag."""

    pod: bool = False
    """Join the other processes of a TPU pod, SLURM step or Kubernetes job."""
    coordinator: str | None = None
    """HOST:PORT of process 0, to join by hand; the next two flags go with it."""
    num_processes: int | None = None
    """How many processes there are."""
    process_id: int | None = None
    """Which one this is, from 0."""
    join_timeout: int = 300
    """Seconds to wait for the other processes at the start."""
    compilation_cache: Path | None = None
    """Folder of compiled programs, or none; beside --workdir by default."""

    @property
    def joins(self) -> bool:
        """Whether this is one of several processes."""
        return self.pod or self.coordinator is not None

    def cache_folder(self, *, beside: Path | None) -> Path | None:
        """Return the folder of compiled programs, or None to keep none.

        Args:
          beside: The run whose neighbour it is where no folder was given.
        """
        if self.compilation_cache is not None:
            named = self.compilation_cache
            return None if named == NO_CACHE else named
        return None if beside is None else beside.absolute().parent / CACHE_FOLDER

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the coordinator."""
        host, _, port = (self.coordinator or ":0").rpartition(":")
        return host.removeprefix("[").removesuffix("]"), int(port)

    def _check(self) -> None:
        within = 1 <= self.join_timeout <= MAX_JOIN_TIMEOUT
        require(self, "join_timeout", within, f"1 to {MAX_JOIN_TIMEOUT} seconds")
        three = ("coordinator", "num_processes", "process_id")
        missing = [name for name in three if getattr(self, name) is None]
        if missing and len(missing) < len(three):
            raise InputError(
                f"{missing[0]}: not given, wanted it with the other two of "
                "--coordinator HOST:PORT --num-processes N --process-id I"
            )
        if self.coordinator is None or self.num_processes is None:
            return
        wanted = f"HOST:PORT, with a port of 1 to {MAX_PORT}"
        good = bool(re.fullmatch(r".+:[0-9]{1,5}", self.coordinator))
        good = good and 1 <= self.address[1] <= MAX_PORT
        require(self, "coordinator", good, wanted, "localhost:12345")
        count = self.num_processes
        require(self, "num_processes", count >= 1, "1 or more")
        known = self.process_id is not None and 0 <= self.process_id < count
        require(self, "process_id", known, f"0 to {count - 1}")
