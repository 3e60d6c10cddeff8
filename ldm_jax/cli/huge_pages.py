"""Memory in huge pages, which glibc grants only to a process that starts with them."""

import contextlib
import os
import sys
from pathlib import Path

TUNABLES = "GLIBC_TUNABLES"
HUGE_PAGES = "glibc.malloc.hugetlb"
"""Setting that requests huge pages if it is 1 (glibc 2.35 and later)."""
PAGES_FILE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
"""Linux's setting in brackets: `always`, `madvise` (on request) or `never`."""
WATCHERS = ("coverage", "debugpy", "pydevd")


def use_huge_pages() -> None:
    """Restart this program with its memory in huge pages, if Linux has them.

    On a CPU every step allocates its intermediate results; with pages of 4 KiB that
    took a fifth of a small model's step (docs/reference/benchmarks.md). The C library
    reads the setting once, when a process starts. The process id stays the same. A
    setting by the user is kept, and a debugged program is not restarted.
    """
    given = os.environ.get(TUNABLES, "")
    watched = sys.gettrace() is not None or not sys.modules.keys().isdisjoint(WATCHERS)
    if HUGE_PAGES in given or watched or not sys.executable or not _must_be_asked():
        return
    os.environ[TUNABLES] = ":".join(filter(None, (given, f"{HUGE_PAGES}=1")))
    with contextlib.suppress(OSError):  # refused: the program is only slower
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _must_be_asked() -> bool:
    try:
        return "[madvise]" in PAGES_FILE.read_text()
    except OSError:  # another system, or one without them
        return False
