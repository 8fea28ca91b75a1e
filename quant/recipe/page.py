"""The report as one HTML page that needs nothing else: no script, no font, no network."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from itertools import cycle

from qserve.quant.recipe.charts import Point, Series, dot_chart
from qserve.quant.recipe.report import RecipeReport, headline
from qserve.quant.report import LayerReport

NUMBER = re.compile(r"\.(\d+)\.")
STYLES = ("one", "two", "three", "four", "five", "six", "seven")
CSS = """
:root { color-scheme: light dark; --line: #8884; --mute: #777; --good: #1a7f37; --bad: #cf222e; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin-top: 2rem; }
p.sub { color: var(--mute); margin-top: .2rem; overflow-wrap: anywhere; }
.verdict { font-weight: 600; } .good { color: var(--good); } .bad { color: var(--bad); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
td, th { text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line); }
td.n, th.n { text-align: right; } td.k { color: var(--mute); width: 18rem; }
svg { width: 100%; height: auto; } svg text { font-size: 11px; fill: var(--mute); }
.grid { stroke: var(--line); stroke-width: 1; } .legend span { margin-right: 1.2rem; }
.one { fill: #0969da; color: #0969da; } .two { fill: #bf8700; color: #bf8700; }
.three { fill: #1a7f37; color: #1a7f37; } .four { fill: #cf222e; color: #cf222e; }
.five { fill: #8250df; color: #8250df; } .six { fill: #1b7c83; color: #1b7c83; }
.seven { fill: #bc4c00; color: #bc4c00; }
details { margin-top: 1.5rem; } summary { cursor: pointer; }
"""


def render_page(report: RecipeReport) -> str:
    """The whole page."""
    good = "good" if report.published else "bad"
    layers = report.quantization.layers
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(report.recipe)}</title><style>{CSS}</style></head><body>",
        f'<h1>{escape(report.recipe)} <span class="verdict {good}">{report.verdict}</span></h1>',
        f'<p class="sub">{escape(report.model)} to {escape(report.output)}</p>',
        "<table>",
        *(f'<tr><td class="k">{escape(k)}<td>{escape(v)}' for k, v in headline(report)),
        "</table>",
        _gates(report),
        _checks(report),
        "<h2>Output error of every layer, relative to its output</h2>",
        _layer_chart(layers),
        _block_chart(report.quantization.block_errors),
        _layer_table(layers),
        _skipped(report),
        "</body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _gates(report: RecipeReport) -> str:
    if not report.gates:
        return ""
    rows = [
        f'<tr><td>{escape(gate.name)}<td class="n">{gate.asked}<td class="n">{gate.says}'
        f'<td class="{"good" if gate.passed else "bad"}">{"passed" if gate.passed else "failed"}'
        for gate in report.gates
    ]
    heading = '<tr><th>gate<th class="n">limit<th class="n">found<th>'
    return "\n".join(["<h2>Gates</h2><table>", heading, *rows, "</table>"])


def _checks(report: RecipeReport) -> str:
    if not report.checks:
        return ""
    rows = [
        f"<tr><td>{escape(one.name)}<td>{escape(one.says)}"
        f'<td class="{"good" if one.passed else "bad"}">{"passed" if one.passed else "failed"}'
        for one in report.checks
    ]
    return "\n".join(["<h2>Checks</h2><table>", "<tr><th>check<th>found<th>", *rows, "</table>"])


def _place(name: str) -> tuple[int, str]:
    """The block of a layer, and what kind of layer of the block it is: its name without the number
    of an expert."""
    match = NUMBER.search(name)
    return (int(match[1]), NUMBER.sub(".*.", name[match.end() :])) if match else (0, name)


def _layer_chart(layers: Sequence[LayerReport]) -> str:
    """Blocks from left to right, a colour for each kind of layer."""
    blocks = sorted({_place(layer.name)[0] for layer in layers})
    kinds: dict[str, list[Point]] = {}
    for layer in layers:
        block, kind = _place(layer.name)
        point = Point(blocks.index(block), layer.error, _note(layer))
        kinds.setdefault(kind, []).append(point)
    series = [
        Series(kind, style, points)
        for (kind, points), style in zip(kinds.items(), cycle(STYLES), strict=False)
    ]
    legend = "".join(f'<span class="{s.style}">&#9679; {escape(s.label)}</span>' for s in series)
    chart = dot_chart(series, [str(block) for block in blocks], "relative output error")
    return f'{chart}<p class="legend">{legend}</p>' if chart else ""


def _note(layer: LayerReport) -> str:
    return f"{layer.name}: {layer.error:.3g} (rounding to nearest: {layer.rounded_error:.3g})"


def _block_chart(errors: Sequence[float]) -> str:
    points = [Point(i, error, f"block {i}: {error:.3g}") for i, error in enumerate(errors)]
    places = [str(index) for index in range(len(errors))]
    chart = dot_chart([Series("block", "one", points)], places, "relative block error")
    heading = "<h2>Error of every block, relative to what it adds</h2>"
    return f"{heading}{chart}" if chart else ""


def _layer_table(layers: Sequence[LayerReport]) -> str:
    rows = [
        f'<tr><td>{escape(layer.name)}<td class="n">{layer.error:.3e}'
        f'<td class="n">{layer.rounded_error:.3e}<td class="n">{100 * layer.clipped_share:.2f} %'
        f"<td>{escape(layer.rounding)}"
        for layer in sorted(layers, key=lambda layer: -layer.error)
    ]
    heading = (
        '<tr><th>layer<th class="n">error<th class="n">rounding to nearest'
        '<th class="n">clipped<th>rounding'
    )
    summary = f"<summary>All {len(rows)} layers, worst first</summary>"
    return "\n".join([f"<details>{summary}<table>", heading, *rows, "</table></details>"])


def _skipped(report: RecipeReport) -> str:
    rows = [
        f"<tr><td>{escape(layer.name)}<td>{escape(layer.reason)}"
        for layer in report.quantization.skipped
    ]
    if not rows:
        return ""
    return "\n".join(["<h2>Left in 16 bits</h2><table>", *rows, "</table>"])
