"""Charts as inline SVG that follows the colours of the page around it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 960, 260
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 16, 28


@dataclass(frozen=True, slots=True)
class Series:
    """One line of points of a chart: a value for each place on the horizontal axis; None is a gap.

    style: the CSS class that colours it. notes: what a reader sees when pointing at a value.
    """

    label: str
    style: str
    values: Sequence[float | None]
    notes: Sequence[str]


def dot_chart(series: Sequence[Series], places: Sequence[str], unit: str) -> str:
    """Points over ``places`` on a logarithmic axis. Values that are not positive are left out.

    unit: of the vertical axis. Returns an ``<svg>`` element; '' when there is nothing to show.
    """
    positive = [v for line in series for v in line.values if v is not None and v > 0]
    if not positive:
        return ""
    low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
    high = max(high, low + 1)

    def y_at(value: float) -> float:
        share = (math.log10(value) - low) / (high - low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    step = (WIDTH - LEFT - RIGHT) / max(1, len(places))
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(unit)}">']
    for power in range(low, high + 1):
        y = y_at(10.0**power)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">1e{power}</text>')
    every = max(1, len(places) // 16)
    for index, place in enumerate(places):
        if index % every == 0:
            x = LEFT + (index + 0.5) * step
            parts.append(
                f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{escape(place)}</text>'
            )
    for line in series:
        for index, value in enumerate(line.values):
            if value is not None and value > 0:
                x = LEFT + (index + 0.5) * step
                parts.append(
                    f'<circle class="{line.style}" cx="{x:.1f}" cy="{y_at(value):.1f}" r="3.5">'
                    f"<title>{escape(line.notes[index])}</title></circle>"
                )
    return "\n".join([*parts, "</svg>"])
