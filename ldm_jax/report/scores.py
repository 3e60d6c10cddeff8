"""How good a run is, told on its page: a table, sweeps, and curves over training."""

from typing import Any

from ldm_jax.report.charts import Curve, chart
from ldm_jax.report.parts import escaped, figure, number, section, table
from ldm_jax.report.story import StageStory, Story

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
SWEPT = {
    "guidance_scale": "guidance scale",
    "steps": "steps",
    "ema_length": "EMA length",
}
"""What may be measured for several values."""
LEAST_OF_A_SWEEP = 3


def scores_section(story: Story) -> str:
    """Write what evaluations found of a run, or "" where there was none."""
    if not story.metrics:
        return ""
    names = [
        name
        for name in SCORE_NAMES
        if any(one["scores"].get(name) is not None for one in story.metrics)
    ]
    head = [
        "protocol",
        "samples",
        "sampler",
        "guidance",
        *(SCORE_NAMES[n] for n in names),
    ]
    rows: list[list[str]] = []
    told: set[str] = set()
    for one in story.metrics:
        settings, protocol = one["settings"], one["protocol"]["name"]
        held_out = one.get("held_out_scores")
        if held_out and protocol not in told:
            cells = [number(held_out.get(n)) for n in names]
            real = f"{one['num_held_out']:,} held-out real images"
            rows.append([protocol, real, "", "", *cells])
            told.add(protocol)
        count = int(one["seeds"].split("-")[1]) + 1
        scale = ", ".join(f"{v:g}" for v in settings["guidance_scale"])
        how = f"{settings['sampler']}, {settings['steps']} steps"
        if (length := settings.get("ema_length")) is not None:
            how = f"{settings['sampler']} {settings['steps']}, EMA {length:g}"
        cells = [number(one["scores"].get(n)) for n in names]
        rows.append([protocol, f"{count:,}", how, scale, *cells])
    protocols = dict.fromkeys(row[0] for row in rows)
    told_once = ""
    if len(protocols) == 1:  # said once, and the table fits the page
        told_once = f"<p>By the protocol {escaped(rows[0][0])}.</p>"
        head, rows = head[1:], [row[1:] for row in rows]
    return section(
        "How good is it?",
        told_once
        + table(head, rows)
        + "<p>Rows of different protocols cannot be compared, nor distances of "
        "different numbers of images: fewer are further. Held-out real images stand "
        "for scale.</p>" + _sweep(story.metrics),
    )


def _sweep(metrics: list[dict[str, Any]]) -> str:
    """Draw FID against what was measured for several values, all else being equal."""
    figures: list[str] = []
    for what, x_name in SWEPT.items():
        groups: dict[str, list[tuple[float, float]]] = {}
        for one in metrics:
            settings = one["settings"]
            value = settings.get(what)
            if isinstance(value, list):
                value = value[0] if len(value) == 1 else None
            if value is None:
                continue
            rest = ", ".join(
                f"{SWEPT[name]} {_listed(settings[name])}"
                for name in SWEPT
                if name != what and settings.get(name) is not None
            )
            name = f"{one['protocol']['name']}: {settings['sampler']}, {rest}"
            key = f"{name}, seeds {one['seeds']}"
            groups.setdefault(key, []).append((value, one["scores"]["fid"]))
        curves = [
            Curve(name, *map(list, zip(*sorted(points), strict=True)))
            for name, points in groups.items()
            if len({x for x, _ in points}) >= LEAST_OF_A_SWEEP
        ]
        title = f"FID against {x_name}"
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


def _listed(value: Any) -> str:
    values = value if isinstance(value, list) else [value]
    return ", ".join(f"{one:g}" for one in values)


def score_curves(stage: StageStory) -> str:
    """Draw the scores of averaged weights, step by step, or return ""."""
    told = [record for record in stage.records if "fid" in record]
    ways = dict.fromkeys(record["how"] for record in told)
    curves = [_score_curve(how, "fid", told, how=how) for how in ways]
    curves.append(_score_curve("held-out real images", "held_out_fid", told))
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
