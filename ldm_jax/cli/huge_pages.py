"""Memory in huge pages, which glibc grants only to a process that starts with them."""

import contextlib
import os
import sys
from pathlib import Path

TUNABLES = "GLIBC_TUNABLES"
HUGE_PAGES = "glibc.malloc.hugetlb"
"""Asks the system for huge pages where set to 1 (glibc 2.35 and later)."""
PAGES_FILE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
"""Says what Linux does: `always`, `madvise` (for who asks) or `never`, in brackets."""
WATCHERS = ("coverage", "debugpy", "pydevd")


def use_huge_pages() -> None:
    """Start this program again with its memory in huge pages, where Linux has them.

    On a CPU every step takes fresh memory for its intermediate results; in pages of 4
    KiB that was a fifth of a small model's step (docs/reference/benchmarks.md). The C
    library reads the setting once, when a process starts. The process stays the same
    one. A setting of the user's is left as it is, and a debugger keeps the program it
    holds.
    """
    given = os.environ.get(TUNABLES, "")
    watched = sys.gettrace() is not None or not sys.modules.keys().isdisjoint(WATCHERS)
    if HUGE_PAGES in given or watched or not sys.executable or not _must_be_asked():
        return
    os.environ[TUNABLES] = ":".join(filter(None, (given, f"{HUGE_PAGES}=1")))
    with contextlib.suppress(OSError):  # refused: slower, and nothing else
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _must_be_asked() -> bool:
    try:
        return "[madvise]" in PAGES_FILE.read_text()
    except OSError:  # another system, or one without them
        return False
