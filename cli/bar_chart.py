"""Bar charts as SVG: plain text, no library, readable on light and on dark pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

BAR, GAP, GROUP_GAP, HEAD = 14, 3, 14, 52  # pixels, from the top down
LABEL_WIDTH, BAR_WIDTH, VALUE_WIDTH = 170, 420, 130
# Told apart without colour vision (Okabe and Ito 2008), with enough contrast on white and on black.
COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00")
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#1f2328}.title{font-weight:600;font-size:14px}"
    "@media(prefers-color-scheme:dark){text{fill:#e6edf3}}"
)


@dataclass(frozen=True, slots=True)
class Group:
    """Bars that are compared: their common name, and a value for each series, None for no bar."""

    name: str
    values: Sequence[float | None]


def draw_bars(title: str, series: Sequence[str], groups: Sequence[Group]) -> str:
    """An SVG of horizontal bars. In each group the longest has the full width: groups may have
    different units.

    series: what the bars of a group are, in order; at most five. Raises ``ValueError`` for more,
    and for a group with another number of values.
    """
    if len(series) > len(COLORS):
        raise ValueError(f"{len(series)} series, there are colours for {len(COLORS)}")
    parts = [_legend(title, series)]
    top = HEAD
    for group in groups:
        if len(group.values) != len(series):
            raise ValueError(f"{group.name} has {len(group.values)} values for {len(series)} bars")
        parts.append(_bars(group, top))
        top += len(series) * (BAR + GAP) + GROUP_GAP
    width = LABEL_WIDTH + BAR_WIDTH + VALUE_WIDTH
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {top}" width="{width}" '
        f'height="{top}" role="img" aria-label="{escape(title)}">\n<style>{STYLE}</style>'
    )
    return "\n".join([head, *parts, "</svg>\n"])


def _legend(title: str, series: Sequence[str]) -> str:
    lines = [f'<text class="title" x="0" y="16">{escape(title)}</text>']
    step = (LABEL_WIDTH + BAR_WIDTH + VALUE_WIDTH) // len(COLORS)
    for number, (name, color) in enumerate(zip(series, COLORS, strict=False)):
        x = number * step
        lines.append(f'<rect x="{x}" y="27" width="12" height="12" fill="{color}"/>')
        lines.append(f'<text x="{x + 17}" y="37">{escape(name)}</text>')
    return "\n".join(lines)


def _bars(group: Group, top: int) -> str:
    known = [value for value in group.values if value is not None]
    longest = max(known, default=0.0) or 1.0
    middle = top + len(group.values) * (BAR + GAP) // 2 + 3
    lines = [f'<text x="0" y="{middle}">{escape(group.name)}</text>']
    for number, value in enumerate(group.values):
        if value is None:
            continue
        y = top + number * (BAR + GAP)
        length = max(1, round(BAR_WIDTH * value / longest))
        place = f'x="{LABEL_WIDTH}" y="{y}" width="{length}" height="{BAR}"'
        lines.append(f'<rect {place} fill="{COLORS[number]}"/>')
        shown = f"{value:.0f}" if value >= 100 else f"{value:.3g}"
        lines.append(f'<text x="{LABEL_WIDTH + length + 6}" y="{y + 11}">{shown}</text>')
    return "\n".join(lines)
