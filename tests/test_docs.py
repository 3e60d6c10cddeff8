"""The documentation: its links, its paths, its commands and its generated page."""

import re
import runpy

import pytest

from ldm_jax.cli.main import COMMANDS
from tests.support.commands import ROOT

SCRIPT = "docs/make_config_reference.py"
KINDS = {"tutorial", "how_to", "reference", "explanation"}
MAX_README_LINES = 150
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
every_page = pytest.mark.parametrize(
    "path", PAGES, ids=lambda path: str(path.relative_to(ROOT))
)
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)")
SOURCE = re.compile(
    r"`((?:ldm_jax|tests|benchmarks|configs|examples|docs)/[\w./]*)`", re.ASCII
)


def anchors(text: str) -> set[str]:
    """List the anchors that GitHub gives the headings of a page."""
    titles = re.findall(r"(?m)^#+ (.+)$", text)
    words = (re.sub(r"[^\w\- ]", "", title.lower()) for title in titles)
    return {one.replace(" ", "-") for one in words}


def test_docs_have_one_folder_for_each_kind_of_page():
    pages = (ROOT / "docs").rglob("*.md")
    assert {str(path.parent.relative_to(ROOT / "docs")) for path in pages} == KINDS


@every_page
def test_every_link_leads_to_a_file_and_a_heading(path):
    for target, anchor in LINK.findall(path.read_text()):
        page = (path.parent / target).resolve() if target else path
        assert page.exists(), target
        if anchor:
            assert anchor in anchors(page.read_text()), f"{target}#{anchor}"


@every_page
def test_every_path_in_a_page_exists(path):
    for name in SOURCE.findall(path.read_text()):
        if "NAME" not in name:
            assert (ROOT / name).exists(), name


def test_every_command_has_a_section_in_the_reference():
    text = (ROOT / "docs/reference/commands.md").read_text()
    titles = ", ".join(re.findall(r"(?m)^## (.+)$", text)).split(", ")
    assert {f"ldm {name}" for name in COMMANDS} == {
        title for title in titles if title.startswith("ldm ")
    }


def test_config_reference_is_up_to_date():
    page = runpy.run_path(str(ROOT / SCRIPT))["page"]()
    written = (ROOT / "docs/reference/config.md").read_text()
    assert written == page, f"run: python {SCRIPT}"


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= MAX_README_LINES
