import os
import subprocess
import sys

import pytest

from ldm_jax.cli import huge_pages


@pytest.mark.parametrize(
    ("given", "system", "wanted"),
    [
        (None, "always [madvise] never", "glibc.malloc.hugetlb=1"),
        ("a.b=2", "always [madvise] never", "a.b=2:glibc.malloc.hugetlb=1"),
        ("glibc.malloc.hugetlb=0", "always [madvise] never", None),
        (None, "[always] madvise never", None),
        (None, "always madvise [never]", None),
        (None, None, None),
    ],
)
def test_huge_pages_are_requested_once_under_the_madvise_setting(
    tmp_path, monkeypatch, given, system, wanted
):
    monkeypatch.delenv(huge_pages.TUNABLES, raising=False)
    if given is not None:
        monkeypatch.setenv(huge_pages.TUNABLES, given)
    monkeypatch.setattr(huge_pages, "PAGES_FILE", tmp_path / "enabled")
    if system is not None:
        (tmp_path / "enabled").write_text(system + "\n")
    started: list[tuple[str | None, list[str]]] = []

    def execv(path, arguments):
        assert path == sys.executable
        started.append((os.environ.get(huge_pages.TUNABLES), arguments))

    monkeypatch.setattr(os, "execv", execv)
    huge_pages.use_huge_pages()
    huge_pages.use_huge_pages()  # as the restarted program does
    again = [sys.executable, *sys.orig_argv[1:]]
    assert started == ([] if wanted is None else [(wanted, again)])


@pytest.fixture
def starts(tmp_path, monkeypatch):
    """A list of restarts, under the madvise setting."""
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    monkeypatch.setattr(huge_pages, "PAGES_FILE", tmp_path / "enabled")
    monkeypatch.delenv(huge_pages.TUNABLES, raising=False)
    started = []
    monkeypatch.setattr(os, "execv", lambda *command: started.append(command))
    return started


@pytest.mark.parametrize("watcher", ["trace", *huge_pages.WATCHERS])
def test_a_debugged_program_is_not_restarted(starts, monkeypatch, watcher):
    if watcher == "trace":
        monkeypatch.setattr(sys, "gettrace", lambda: print)
    else:
        monkeypatch.setitem(sys.modules, watcher, sys)
    huge_pages.use_huge_pages()
    assert not starts


def test_a_program_continues_if_its_restart_is_refused(starts, monkeypatch):
    def execv(*command):
        starts.append(command)
        raise OSError("not permitted")

    monkeypatch.setattr(os, "execv", execv)
    huge_pages.use_huge_pages()
    assert starts == [(sys.executable, [sys.executable, *sys.orig_argv[1:]])]


def test_a_restarted_program_has_the_same_process_and_arguments():
    code = "\n".join(
        [
            "import os, sys",
            "from ldm_jax.cli import huge_pages",
            "print(os.getpid(), sys.argv[1:], flush=True)",
            "huge_pages._must_be_asked = lambda: True",
            "huge_pages.use_huge_pages()",
        ]
    )
    environment = {k: v for k, v in os.environ.items() if k != huge_pages.TUNABLES}
    run = subprocess.run(
        [sys.executable, "-c", code, "--seed", "1 2"],
        capture_output=True,
        text=True,
        check=True,
        timeout=1800,
        env=environment,
    )
    first, again = run.stdout.splitlines()
    assert first.endswith("['--seed', '1 2']")
    assert again == first
