"""Training leaves a page, and what the page says makes the run again."""

from tests.support.commands import succeeded, train
from tests.tools.test_report import Page


def test_training_leaves_a_page(tmp_path):
    workdir = tmp_path / "run"
    first = succeeded(train(workdir))
    page = Page((workdir / "report.html").read_text())
    assert "finished" in page.text and "Samples over training" in page.text
    # The command that it gives to make the run again is one that works.
    again = train(tmp_path / "again", "--config", workdir / "config.json")
    assert succeeded(again).splitlines()[-1] == first.splitlines()[-1]
