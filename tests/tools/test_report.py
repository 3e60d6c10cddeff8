"""The report of a run: complete, self-contained, and also of unfinished runs."""

import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import jax
import numpy as np
import pytest
from PIL import Image

from ldm_jax.cli.report import main
from ldm_jax.config import to_json
from ldm_jax.images import write_png
from ldm_jax.pretrained.model_weights import write_native
from ldm_jax.tools.report import writing
from ldm_jax.tools.report.charts import Curve, chart
from ldm_jax.tools.report.run_summary import read_run_summary
from ldm_jax.tools.report.scores import _sweep, best_scores
from ldm_jax.types import InputError
from tests.support import tiny
from tests.support.commands import error_line, ldm
from tests.support.models import model_of

VOID = {"meta", "img", "br", "line", "circle", "polyline"}
LOOK = {"title": "loss", "x_name": "steps", "smooth": True}


class Page(HTMLParser):
    """Parse a page's text and sources; assert that its tags close in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.words, self.sources = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.sources += [v for k, v in attrs if k in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(self.words)


def make_run(workdir, *, trained=True, finished=True):
    workdir.mkdir(parents=True)
    config = tiny.get_config()
    if trained:
        write_native(model_of(config), workdir)
    (workdir / "config.json").write_text(to_json(config))
    lines = [
        {"stage": stage, "step": step, "loss": 1.0 / step, "gradient_norm": 0.5}
        for stage, steps in (("autoencoder", 6), ("diffusion", 8))
        for step in range(1, steps + 1)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (workdir / "metrics.jsonl").write_text(text + '{"stage": "diffusion", "st')
    for stage, name in (("autoencoder", "reconstructions"), ("diffusion", "samples")):
        (workdir / stage).mkdir()
        for step in range(1, 11):
            picture = np.full((20, 30, 1), 20 * step, np.uint8)
            write_png(workdir / stage / f"{name}_{step:06d}.png", picture)
    if finished:
        final = {"digest": "d" * 64, "seconds_by_stage": {"autoencoder": 61.0}}
        (workdir / "final.json").write_text(json.dumps(final))
    return workdir


def measured(scale, fid, *, checkpoint="c" * 64):
    return {
        "scores": {
            "fid": fid,
            "kid": 0.1,
            "precision": 0.5,
            "recall": 0.25,
            "sfid": None,
        },
        "held_out_scores": {"fid": 0.01, "kid": 0.0, "precision": 0.9},
        "num_held_out": 297,
        "protocol": {"name": "dataset-classifier", "network": "classifier"},
        "settings": {
            "sampler": "ddim",
            "steps": 20,
            "guidance_scale": [scale],
            "step": 8,
        },
        "seeds": "0-499",
        "network": "n" * 64,
        "real": {"source": "tfds:digits", "data": "r" * 64},
        "made_with": {"checkpoint": checkpoint, "platform": "cpu"},
    }


def write(workdir, *flags):
    main(
        [str(a) for a in ("--workdir", workdir, *flags)] + ["--compilation-cache=none"]
    )
    return (workdir / "report.html").read_text()


def test_report_of_a_finished_run_has_all_sections(tmp_path):
    workdir = make_run(tmp_path / "<b>run & co</b>")
    for i, (scale, fid) in enumerate([(1.0, 0.5), (2.0, 0.2), (4.0, 0.9)]):
        folder = workdir / "evaluation" / str(i)
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps(measured(scale, fid)))
    found = {"psnr": 38.5, "ssim": None, "lpips": None, "rfid": 0.5, "num_images": 297}
    found = {"reconstructions": found, "protocol": {"name": "dataset-classifier"}}
    path = workdir / "evaluation" / "reconstructions_dataset-classifier.json"
    path.write_text(json.dumps(found))
    (workdir / "steps").mkdir()
    cheapest = {"sampler": "unipc", "steps": 10}
    found = {"cheapest": cheapest, "num_images": 500}
    (workdir / "steps" / "steps.json").write_text(json.dumps(found))
    write_png(workdir / "steps" / "steps.png", np.zeros((40, 80, 3), np.uint8))
    text = write(workdir)
    page = Page(text)
    assert page.sources and all(s.startswith("data:image/") for s in page.sources)
    assert "http" not in text and "<b>" not in text  # no network, nothing unescaped
    words = [
        "<b>run & co</b>",
        "finished",
        "Scores",
        "297 held-out real images",
        "FID against guidance scale",
        "Precision and recall against guidance scale",
        "dataset-classifier, 500 samples",
        "rFID",
        "38.5",
        "Reconstructions",
        "Samples over training",
        "Denoising",
        "Nearest training images",
        "nearest of 1,500 training images",
        "unipc, 10 steps",
        "d" * 64,
        '"num_timesteps": 1000',
        "ldm train --config",
        "ldm evaluate",
        f"--workdir '{workdir}' --step 8 --protocol dataset-classifier",
        "prefers-color-scheme: dark",
    ]
    missing = [word for word in words if word not in page.text]
    assert not missing
    # Six of ten pictures of each stage, the last one among them.
    assert "step 9" not in page.text and "Step 10. The same seeds" in page.text


def test_report_of_an_unfinished_run_is_written(tmp_path):
    workdir = make_run(tmp_path / "begun", trained=False, finished=False)
    page = Page(write(workdir))
    assert "unfinished" in page.text and "No samples were made" in page.text
    assert "Curves" in page.text
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text(to_json(tiny.get_config()))
    assert "0 of 8 steps" in Page(write(empty, "--no-samples")).text


def test_report_is_written_without_memory_for_samples(tmp_path, monkeypatch):
    def make_samples(summary):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 3 GiB\nallocations: ...")

    monkeypatch.setattr(writing, "make_samples", make_samples)
    workdir = make_run(tmp_path / "run")
    writing.write_report(
        read_run_summary(workdir), tmp_path / "page.html", with_samples=True
    )
    text = Page((tmp_path / "page.html").read_text()).text
    assert "No samples were made for this report: RESOURCE_EXHAUSTED: 3 GiB." in text


def test_run_summary_leaves_out_truncated_lines_and_files(tmp_path, caplog):
    workdir = make_run(tmp_path / "run", finished=False)
    summary = read_run_summary(workdir)
    assert not summary.is_finished
    assert [len(stage.records) for stage in summary.stages] == [6, 8]
    assert not caplog.messages
    log = workdir / "metrics.jsonl"
    lines = log.read_bytes().split(b"\n")
    bad = [b"[" * 10**5, b"1" * 5000, b"\xff\0", b'{"stage": 1, "step": 2}']
    bad += [b'{"stage": "diffusion", "step": 3, "loss": "low"}']
    log.write_bytes(b"\n".join([*lines[:2], *bad, *lines[2:]]))
    summary = read_run_summary(workdir)
    assert [len(stage.records) for stage in summary.stages] == [6, 8]
    assert caplog.messages == [
        f"{log}: 5 lines are no records of a log, and are left out"
    ]


def test_an_image_that_is_none_is_told_on_the_page(tmp_path):
    workdir = make_run(tmp_path / "run")
    shown = read_run_summary(workdir).stages[-1].images[-1].path
    Image.new("RGB", (8, 8)).save(shown, format="EPS")
    assert f"{shown.name} cannot be shown: not an image" in write(
        workdir, "--no-samples"
    )


def test_half_a_final_file_does_not_make_a_run_unfinished(tmp_path):
    workdir = make_run(tmp_path / "run")
    (workdir / "final.json").write_text('{"digest": ')
    with pytest.raises(InputError, match=r"final\.json: not JSON .*; delete it and"):
        read_run_summary(workdir)


@pytest.mark.parametrize(
    "values, words",
    [
        ({"scores": {"fid": "low"}}, "scores.fid: got 'low'"),
        ({"seeds": "few"}, "seeds: got 'few'"),
        ({"settings": []}, "settings.sampler: got None"),
    ],
)
def test_a_damaged_evaluation_is_one_line(tmp_path, values, words):
    workdir = make_run(tmp_path / "run")
    folder = workdir / "evaluation/x"
    folder.mkdir(parents=True)
    text = json.dumps({**measured(1.0, 2.0), **values})
    (folder / "metrics.json").write_text(text)
    with pytest.raises(InputError) as caught:
        read_run_summary(workdir)
    assert words in str(caught.value)


def test_bad_report_arguments_are_refused(tmp_path):
    assert "is not a run" in error_line(ldm("report", "--workdir", tmp_path))
    workdir = make_run(tmp_path / "run", trained=False)
    with pytest.raises(InputError, match="is a folder, wanted a file"):
        main(["--workdir", str(workdir), "--out", str(tmp_path)])
    with pytest.raises(InputError, match="is not a folder; try to make it first"):
        main(["--workdir", str(workdir), "--out", str(tmp_path / "no" / "x.html")])


def svg(text):
    return ElementTree.fromstring(text[: text.index("</svg>") + 6])


@pytest.mark.parametrize("logarithmic", [True, False])
def test_chart_is_well_formed_and_stays_inside_its_frame(logarithmic):
    steps = list(range(1, 5001))
    curve = Curve("loss & <more>", steps, [1e3 / step for step in steps])
    root = svg(chart([curve], logarithmic=logarithmic, **LOOK))
    lines = [e for e in root if e.tag == "polyline"]
    assert len(lines) == 2
    for line in lines:
        points = [tuple(map(float, p.split(","))) for p in line.get("points").split()]
        assert len(points) <= 401
        assert all(0 <= x <= 640 and 0 <= y <= 300 for x, y in points)
        assert points[0][1] < points[-1][1]  # the curve falls; y grows downwards
    for anchor in ("end", "middle"):  # of the values, of the steps
        texts = [e for e in root if e.tag == "text" and e.get("class") is None]
        labels = [e.text for e in texts if e.get("text-anchor") == anchor]
        assert len(labels) > 2 and len(set(labels)) == len(labels)


def test_chart_is_empty_only_without_drawable_values():
    nan = Curve("loss", [1, 2], [float("nan"), float("inf")])
    assert chart([nan], logarithmic=False, **LOOK) == ""
    negative = Curve("loss", [1, 2], [-1.0, 0.0])
    assert chart([negative], logarithmic=True, **LOOK) == ""
    for values in ([0.5], [2.0, 2.0]):
        flat = Curve("loss", list(range(len(values))), values)
        for logarithmic in (True, False):
            assert re.search("points=", chart([flat], logarithmic=logarithmic, **LOOK))


def test_guidance_curve_joins_scores_of_one_checkpoint_only():
    points = [(1.0, 0.5), (2.0, 0.2), (3.0, 0.9)]
    one = [measured(*point) for point in points]
    other = [measured(*point, checkpoint="o" * 64) for point in points]
    assert _sweep(one).count("<polyline") == 3  # FID; precision and recall
    assert _sweep([*one, *other]).count("<polyline") == 6
    # Two scores of one checkpoint and one of another make no curve.
    assert _sweep([*one[:2], other[2]]) == ""


def test_best_scores_are_kept_for_each_protocol(tmp_path):
    workdir = make_run(tmp_path / "run")
    adm = {**measured(1.0, 12.0), "protocol": {"name": "adm", "network": "inception"}}
    found = [measured(1.0, 0.5), measured(2.0, 0.3), adm]
    summary = read_run_summary(workdir)._replace(metrics=found)
    assert best_scores(summary) == {
        "dataset-classifier, 500 samples": 0.3,
        "adm, 500 samples": 12.0,
    }
