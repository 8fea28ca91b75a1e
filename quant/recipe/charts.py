"""Charts over the blocks of a model, as inline SVG in the colours of the page around it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 960, 260
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 16, 28


@dataclass(frozen=True, slots=True)
class Point:
    """A value of a block. place: of the block among those shown. note: seen when pointing at it."""

    place: int
    value: float
    note: str


@dataclass(frozen=True, slots=True)
class Series:
    """Points of one kind. style: the CSS class that colours them."""

    label: str
    style: str
    points: Sequence[Point]


def dot_chart(series: Sequence[Series], places: Sequence[str], unit: str) -> str:
    """Points over the blocks on a logarithmic axis. Values that are not positive are left out.

    places: the names of the blocks that are shown. unit: of the vertical axis.
    Returns an ``<svg>`` element; '' when there is nothing to show.
    """
    positive = [point.value for line in series for point in line.points if point.value > 0]
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
    parts.append(f'<text x="{LEFT - 8}" y="{HEIGHT - 8}" text-anchor="end">block</text>')
    every = max(1, len(places) // 16)
    for index, place in enumerate(places):
        if index % every == 0:
            x = LEFT + (index + 0.5) * step
            parts.append(
                f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{escape(place)}</text>'
            )
    for line in series:
        for point in line.points:
            if point.value > 0:
                x, y = LEFT + (point.place + 0.5) * step, y_at(point.value)
                parts.append(
                    f'<circle class="{line.style}" cx="{x:.1f}" cy="{y:.1f}" r="3.5">'
                    f"<title>{escape(point.note)}</title></circle>"
                )
    return "\n".join([*parts, "</svg>"])
