"""How good a run is, told on its page: a table, sweeps, and curves over training."""

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
LIKE = {
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
"""What may be measured for several values."""
LEAST_OF_A_SWEEP = 3
DRAWN_OF_A_SWEEP = {("fid",): "FID", ("precision", "recall"): "Precision and recall"}


def num_samples(one: dict[str, Any]) -> int:
    """Return how many samples an evaluation is of."""
    return int(one["seeds"].split("-")[1]) + 1


def best_by_way(summary: RunSummary) -> dict[str, float]:
    """Return the least FID of each protocol and number of samples: others differ."""
    best: dict[str, float] = {}
    for one in summary.metrics:
        way = f"{one['protocol']['name']}, {num_samples(one):,} samples"
        best[way] = min(best.get(way, math.inf), one["scores"]["fid"])
    return best


def scores_section(summary: RunSummary) -> str:
    """Write what evaluations found of a run, or "" where there was none."""
    quality = _image_quality(summary)
    if not summary.metrics:
        return section("How good is it?", quality) if quality else ""
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
    details: set[str] = set()
    for one in summary.metrics:
        settings, protocol = one["settings"], one["protocol"]["name"]
        held_out = one.get("held_out_scores")
        if held_out and protocol not in details:
            cells = [number(held_out.get(n)) for n in names]
            real = f"{one['num_held_out']:,} held-out real images"
            rows.append([protocol, real, "", "", *cells])
            details.add(protocol)
        scale = ", ".join(f"{v:g}" for v in settings["guidance_scale"])
        how = f"{settings['sampler']}, {settings['steps']} steps"
        if (length := settings.get("ema_length")) is not None:
            how = f"{settings['sampler']} {settings['steps']}, EMA {length:g}"
        cells = [number(one["scores"].get(n)) for n in names]
        rows.append([protocol, f"{num_samples(one):,}", how, scale, *cells])
    protocols = dict.fromkeys(row[0] for row in rows)
    reported = ""
    if len(protocols) == 1:  # said once, and the table fits the page
        reported = f"<p>By the protocol {escaped(rows[0][0])}.</p>"
        head, rows = head[1:], [row[1:] for row in rows]
    return section(
        "How good is it?",
        reported
        + table(head, rows)
        + "<p>Rows of different protocols cannot be compared, nor distances of "
        "different numbers of images: fewer are further. Held-out real images stand "
        "for scale.</p>" + _sweep(summary.metrics) + quality,
    )


def _image_quality(summary: RunSummary) -> str:
    """Write how like their originals the first stage's reconstructions are."""
    rows = [
        [
            one["protocol"]["name"],
            f"{quality['num_images']:,} held-out images",
            *(number(quality.get(name)) for name in LIKE),
        ]
        for one in summary.reconstructions
        for quality in [one["reconstructions"]]
    ]
    return table(["", "reconstructions", *LIKE.values()], rows) if rows else ""


def _sweep(metrics: list[dict[str, Any]]) -> str:
    """Draw scores against what was measured for several values, all else equal."""
    figures: list[str] = []
    for what, x_name in SWEPT.items():
        groups: dict[str, list[dict[str, Any]]] = {}
        for one in metrics:
            if _swept_value(one, what) is not None:
                groups.setdefault(_rest(one, what), []).append(one)
        sweeps = [
            sorted(group, key=lambda one: _swept_value(one, what))
            for group in groups.values()
            if len({_swept_value(one, what) for one in group}) >= LEAST_OF_A_SWEEP
        ]
        for scores, title in DRAWN_OF_A_SWEEP.items():
            curves = [
                Curve(
                    f"{SCORE_NAMES[name]}, {_way(sweep[0], what)}",
                    [_swept_value(one, what) for one in sweep],
                    [one["scores"][name] for one in sweep],
                )
                for sweep in sweeps
                for name in scores
            ]
            title = f"{title} against {x_name}"
            drawn = chart(
                curves,
                title=title,
                x_name=x_name,
                logarithmic=False,
                smooth=False,
                dots=True,
            )
            if drawn:
                figures.append(figure(drawn, title))
    return f'<div class="pair">{"".join(figures)}</div>' if figures else ""


def _swept_value(one: dict[str, Any], what: str) -> Any:
    """Return the value of what may be swept; None where it has none, or several."""
    value = one["settings"].get(what)
    if isinstance(value, list):
        return value[0] if len(value) == 1 else None
    return value


def _way(one: dict[str, Any], what: str) -> str:
    """Say how samples were made and measured, but for what is swept."""
    settings = one["settings"]
    rest = ", ".join(
        f"{SWEPT[name]} {_listed(settings[name])}"
        for name in SWEPT
        if name != what and settings.get(name) is not None
    )
    name, sampler = one["protocol"]["name"], settings["sampler"]
    return f"{name}: {sampler}, {rest}, {num_samples(one):,} samples"


def _rest(one: dict[str, Any], what: str) -> str:
    """Collect all that two points of a curve have in common."""
    settings = {k: v for k, v in one["settings"].items() if k != what}
    # An average of another length is another set of weights, of the same step.
    made_with = {} if what == "ema_length" else one["made_with"]
    facts = (one["protocol"], one["network"], one["real"]["data"], one["seeds"])
    return json.dumps([settings, made_with, *facts], sort_keys=True)


def _listed(value: Any) -> str:
    values = value if isinstance(value, list) else [value]
    return ", ".join(f"{one:g}" for one in values)


def score_curves(stage: StageSummary) -> str:
    """Draw the scores of averaged weights, step by step, or return ""."""
    details = [record for record in stage.records if "fid" in record]
    ways = dict.fromkeys(record["how"] for record in details)
    curves = [_score_curve(how, "fid", details, how=how) for how in ways]
    curves.append(_score_curve("held-out real images", "held_out_fid", details))
    title = "FID of the averaged weights over training"
    drawn = chart(
        curves,
        title=title,
        x_name="steps",
        logarithmic=True,
        smooth=False,
        dots=True,
    )
    return figure(drawn, title) if drawn else ""


def _score_curve(
    name: str, key: str, records: list[dict[str, Any]], *, how: str | None = None
) -> Curve:
    own = [r for r in records if key in r and how in (None, r["how"])]
    return Curve(name, [r["step"] for r in own], [r[key] for r in own])
