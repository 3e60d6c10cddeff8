"""Curves as SVG elements, in the colours of the page."""

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 66.0, 22.0, 14.0, 40.0
MAX_POINTS = 400
"""Points of a curve in a chart; of more, every n-th is kept."""
SMOOTHING = 0.03
"""Share of a curve that the running mean covers."""
TICKS = 5


class Curve(NamedTuple):
    """A curve of a chart."""

    name: str
    """Name in the legend."""
    x: Sequence[float]
    """Rising positions."""
    y: Sequence[float]
    """Values."""


def chart(
    curves: Sequence[Curve],
    *,
    title: str,
    x_name: str,
    logarithmic: bool,
    smooth: bool,
    dots: bool = False,
) -> str:
    """Plot curves in one chart.

    Args:
      curves: Values that are not finite are left out, and so are those that are not
        above 0 where the axis is logarithmic.
      title: Title for screen readers.
      x_name: Label of the x axis.
      logarithmic: Whether the y axis is logarithmic.
      smooth: Whether each curve is thin, with a thick running mean.
      dots: Whether each point is marked.

    Returns:
      An SVG element and its legend, or "" where no curve has a point.
    """
    kept = [_cleaned(curve, logarithmic=logarithmic) for curve in curves]
    kept = [curve for curve in kept if curve.x]
    if not kept:
        return ""
    xs = [x for curve in kept for x in curve.x]
    ys = [y for curve in kept for y in curve.y]
    across = _Axis(min(xs), max(xs), LEFT, WIDTH - RIGHT, logarithmic=False)
    up = _Axis(min(ys), max(ys), HEIGHT - BOTTOM, TOP, logarithmic=logarithmic)
    parts = [_grid(across, up, x_name)]
    for i, curve in enumerate(kept):
        colour = f"var(--curve-{i % 4})"
        if smooth:
            parts.append(_line(curve, across, up, colour, "thin"))
            curve = curve._replace(y=_running_mean(curve.y))
        parts.append(_line(curve, across, up, colour, "thick"))
        if dots:
            parts += [
                f'<circle cx="{across.place(x):.1f}" cy="{up.place(y):.1f}" r="3.5" '
                f'fill="{colour}"/>'
                for x, y in zip(curve.x, curve.y, strict=True)
            ]
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" class="chart">'
        f"<title>{html.escape(title)}</title>{''.join(parts)}</svg>"
        f"{_legend([curve.name for curve in kept])}"
    )


class _Axis:
    """Maps values to positions in the chart."""

    def __init__(
        self, low: float, high: float, start: float, end: float, *, logarithmic: bool
    ) -> None:
        """Map `low` to `high` onto `start` to `end`."""
        self.logarithmic = logarithmic
        low, high = (self._scaled(value) for value in (low, high))
        room = (high - low) * (0.05 if logarithmic else 0.0) or (
            0.0 if high > low else max(abs(high), 1.0) * 0.1
        )
        self.low, self.high = low - room, high + room
        self.start, self.end = start, end

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.logarithmic else value

    def place(self, value: float) -> float:
        """Return the position of a value."""
        share = (self._scaled(value) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Return round values within the axis."""
        if not self.logarithmic:
            return _round_values(self.low, self.high)
        powers = range(math.floor(self.low), math.ceil(self.high) + 1)
        for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
            values = [10.0**power * factor for power in powers for factor in factors]
            inside = [v for v in values if self.low <= math.log10(v) <= self.high]
            if len(inside) >= 3:
                return inside[:: 1 + len(inside) // (2 * TICKS)]
        return _round_values(10.0**self.low, 10.0**self.high)


def _round_values(low: float, high: float) -> list[float]:
    raw = (high - low) / TICKS
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * f for f in (1, 2, 5, 10) if power * f >= raw)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _cleaned(curve: Curve, *, logarithmic: bool) -> Curve:
    points = [
        (float(x), float(y))
        for x, y in zip(curve.x, curve.y, strict=True)
        if math.isfinite(y) and (y > 0.0 or not logarithmic)
    ]
    stride = max(1, math.ceil(len(points) / MAX_POINTS))
    thinned = points[::stride]
    if points and thinned[-1] != points[-1]:
        thinned.append(points[-1])
    return Curve(curve.name, [x for x, _ in thinned], [y for _, y in thinned])


def _running_mean(values: Sequence[float]) -> list[float]:
    half = max(1, round(SMOOTHING * len(values)))
    means: list[float] = []
    for i in range(len(values)):
        part = values[max(0, i - half) : i + half + 1]
        means.append(sum(part) / len(part))
    return means


def _line(curve: Curve, across: _Axis, up: _Axis, colour: str, kind: str) -> str:
    points = " ".join(
        f"{across.place(x):.1f},{up.place(y):.1f}"
        for x, y in zip(curve.x, curve.y, strict=True)
    )
    return f'<polyline class="{kind}" stroke="{colour}" points="{points}"/>'


def _grid(across: _Axis, up: _Axis, x_name: str) -> str:
    parts: list[str] = []
    for value in up.ticks():
        y = up.place(value)
        parts.append(
            f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" '
            f'y2="{y:.1f}"/><text x="{LEFT - 8}" y="{y + 4:.1f}" '
            f'text-anchor="end">{_short(value)}</text>'
        )
    for value in across.ticks():
        x = across.place(value)
        parts.append(
            f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">'
            f"{_short(value)}</text>"
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text x="{middle:.0f}" y="{HEIGHT - 2}" text-anchor="middle" '
        f'class="axis">{html.escape(x_name)}</text>'
    )
    return "".join(parts)


def _legend(names: list[str]) -> str:
    """Write the names of the curves below the chart, in the page's own text size."""
    entries = "".join(
        f'<span><i style="background: var(--curve-{i % 4})"></i>'
        f"{html.escape(name.replace('_', ' '))}</span>"
        for i, name in enumerate(names)
    )
    return f'<div class="legend">{entries}</div>'


def _short(value: float) -> str:
    if value and abs(value) >= 1000:
        thousands = value / 1000
        return f"{thousands:g}k" if abs(value) < 1e6 else f"{value / 1e6:g}M"
    return f"{value:.3g}"
