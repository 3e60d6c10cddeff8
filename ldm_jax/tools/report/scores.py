"""Scores of a run on its report: a table, sweeps, and curves over training."""

import json
import math
from typing import Any

from ldm_jax.tools.report.charts import Curve, chart
from ldm_jax.tools.report.html import escaped, figure, number, section, table
from ldm_jax.tools.report.run_summary import RunSummary, StageSummary

SCORE_NAMES = {
    "fid": "FID",
    "sfid": "sFID",
    "kid": "KID",
    "inception_score": "IS",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
}
QUALITY_NAMES = {
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "rfid": "rFID",
}
SWEPT = {
    "guidance_scale": "guidance scale",
    "steps": "steps",
    "ema_length": "EMA length",
}
"""Settings that may have several values in a run's evaluations."""
MIN_SWEEP = 3
"""Values of a setting that make a curve."""
SWEEP_CHARTS = {("fid",): "FID", ("precision", "recall"): "Precision and recall"}


def num_samples(one: dict[str, Any]) -> int:
    """Return the number of samples of an evaluation."""
    return int(one["seeds"].split("-")[1]) + 1


def best_scores(summary: RunSummary) -> dict[str, float]:
    """Return the lowest FID of each protocol and number of samples."""
    best: dict[str, float] = {}
    for one in summary.metrics:
        kind = f"{one['protocol']['name']}, {num_samples(one):,} samples"
        best[kind] = min(best.get(kind, math.inf), one["scores"]["fid"])
    return best


def scores_section(summary: RunSummary) -> str:
    """Write the scores of all evaluations, or "" where there are none."""
    quality = _image_quality(summary)
    if not summary.metrics:
        return section("Scores", quality) if quality else ""
    names = [
        name
        for name in SCORE_NAMES
        if any(one["scores"].get(name) is not None for one in summary.metrics)
    ]
    head = [
        "protocol",
        "samples",
        "sampler",
        "guidance",
        *(SCORE_NAMES[n] for n in names),
    ]
    rows: list[list[str]] = []
    with_held_out: set[str] = set()
    for one in summary.metrics:
        settings, protocol = one["settings"], one["protocol"]["name"]
        held_out = one.get("held_out_scores")
        if held_out and protocol not in with_held_out:
            cells = [number(held_out.get(n)) for n in names]
            real = f"{one['num_held_out']:,} held-out real images"
            rows.append([protocol, real, "", "", *cells])
            with_held_out.add(protocol)
        scale = ", ".join(f"{v:g}" for v in settings["guidance_scale"])
        how = f"{settings['sampler']}, {settings['steps']} steps"
        if (length := settings.get("ema_length")) is not None:
            how = f"{settings['sampler']} {settings['steps']}, EMA {length:g}"
        cells = [number(one["scores"].get(n)) for n in names]
        rows.append([protocol, f"{num_samples(one):,}", how, scale, *cells])
    protocols = dict.fromkeys(row[0] for row in rows)
    reported = ""
    if len(protocols) == 1:  # named once, so that the table fits the page
        reported = f"<p>By the protocol {escaped(rows[0][0])}.</p>"
        head, rows = head[1:], [row[1:] for row in rows]
    return section(
        "Scores",
        reported
        + table(head, rows)
        + "<p>Rows of different protocols are not comparable, nor distances of "
        "different numbers of images: those of fewer images are larger. Held-out real "
        "images are for reference.</p>" + _sweep(summary.metrics) + quality,
    )


def _image_quality(summary: RunSummary) -> str:
    """Write the image quality of the first stage's reconstructions."""
    rows = [
        [
            one["protocol"]["name"],
            f"{quality['num_images']:,} held-out images",
            *(number(quality.get(name)) for name in QUALITY_NAMES),
        ]
        for one in summary.reconstructions
        for quality in [one["reconstructions"]]
    ]
    return table(["", "reconstructions", *QUALITY_NAMES.values()], rows) if rows else ""


def _sweep(metrics: list[dict[str, Any]]) -> str:
    """Plot scores against each setting with several values, all else equal."""
    figures: list[str] = []
    for what, x_name in SWEPT.items():
        groups: dict[str, list[dict[str, Any]]] = {}
        for one in metrics:
            if _swept_value(one, what) is not None:
                groups.setdefault(_rest(one, what), []).append(one)
        sweeps = [
            sorted(group, key=lambda one: _swept_value(one, what))
            for group in groups.values()
            if len({_swept_value(one, what) for one in group}) >= MIN_SWEEP
        ]
        for scores, title in SWEEP_CHARTS.items():
            curves = [
                Curve(
                    f"{SCORE_NAMES[name]}, {_other_settings(sweep[0], what)}",
                    [_swept_value(one, what) for one in sweep],
                    [one["scores"][name] for one in sweep],
                )
                for sweep in sweeps
                for name in scores
            ]
            title = f"{title} against {x_name}"
            svg = chart(
                curves,
                title=title,
                x_name=x_name,
                logarithmic=False,
                smooth=False,
                dots=True,
            )
            if svg:
                figures.append(figure(svg, title))
    return f'<div class="pair">{"".join(figures)}</div>' if figures else ""


def _swept_value(one: dict[str, Any], what: str) -> Any:
    """Return the value of a setting; None where it has none, or several."""
    value = one["settings"].get(what)
    if isinstance(value, list):
        return value[0] if len(value) == 1 else None
    return value


def _other_settings(one: dict[str, Any], what: str) -> str:
    """Name protocol and settings of an evaluation, without the swept one."""
    settings = one["settings"]
    rest = ", ".join(
        f"{SWEPT[name]} {_listed(settings[name])}"
        for name in SWEPT
        if name != what and settings.get(name) is not None
    )
    name, sampler = one["protocol"]["name"], settings["sampler"]
    return f"{name}: {sampler}, {rest}, {num_samples(one):,} samples"


def _rest(one: dict[str, Any], what: str) -> str:
    """Return what all points of a curve have in common."""
    settings = {k: v for k, v in one["settings"].items() if k != what}
    # An average of another length is another set of weights, of the same step.
    made_with = {} if what == "ema_length" else one["made_with"]
    facts = (one["protocol"], one["network"], one["real"]["data"], one["seeds"])
    return json.dumps([settings, made_with, *facts], sort_keys=True)


def _listed(value: Any) -> str:
    values = value if isinstance(value, list) else [value]
    return ", ".join(f"{one:g}" for one in values)


def score_curves(stage: StageSummary) -> str:
    """Plot the scores of averaged weights over training, or return ""."""
    records = [record for record in stage.records if "fid" in record]
    hows = dict.fromkeys(record["how"] for record in records)
    curves = [_score_curve(how, "fid", records, how=how) for how in hows]
    curves.append(_score_curve("held-out real images", "held_out_fid", records))
    title = "FID of the averaged weights over training"
    svg = chart(
        curves,
        title=title,
        x_name="steps",
        logarithmic=True,
        smooth=False,
        dots=True,
    )
    return figure(svg, title) if svg else ""


def _score_curve(
    name: str, key: str, records: list[dict[str, Any]], *, how: str | None = None
) -> Curve:
    own = [r for r in records if key in r and how in (None, r["how"])]
    return Curve(name, [r["step"] for r in own], [r[key] for r in own])
