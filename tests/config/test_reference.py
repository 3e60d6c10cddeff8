"""The page of config fields is generated from the dataclasses."""

import runpy

from tests.support.commands import ROOT

SCRIPT = "docs/make_config_reference.py"


def test_the_page_of_config_fields_is_up_to_date():
    page = runpy.run_path(str(ROOT / SCRIPT))["page"]()
    written = (ROOT / "docs/reference/config.md").read_text()
    assert written == page, f"run: python {SCRIPT}"
