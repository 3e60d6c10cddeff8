"""The report that training writes, and the config that repeats the run."""

from tests.support.commands import succeeded, train
from tests.tools.test_report import Page


def test_training_writes_a_report_and_a_config_that_repeats_the_run(tmp_path):
    workdir = tmp_path / "run"
    first = succeeded(train(workdir))
    page = Page((workdir / "report.html").read_text())
    assert "finished" in page.text and "Samples over training" in page.text
    # The command that the report gives to repeat the run works.
    again = train(tmp_path / "again", "--config", workdir / "config.json")
    assert succeeded(again).splitlines()[-1] == first.splitlines()[-1]
