"""The last comparison of engines in docs/benchmarks, as a table and as a chart."""

from __future__ import annotations

from collections.abc import Sequence

from qserve.cli.bar_chart import Group, draw_bars

FIGURES = {
    "prefill512_tok_s": "prefill, 512 tokens",
    "decode_b1_tok_s": "decode, 1 sequence",
    "decode_b1_at512_tok_s": "... after 512 tokens",
    "decode_b1_at1024_tok_s": "... after 1024 tokens",
    "decode_b4_tok_s": "decode, 4 sequences",
    "decode_b8_tok_s": "decode, 8 sequences",
    "decode_b16_tok_s": "decode, 16 sequences",
}
"""The rates, in tokens a second, in the order in which they are shown."""

OTHERS = {
    "load_s": "load, seconds",
    "first_token_s": "load, to the first token, seconds",
    "peak_rss_mib": "peak memory, MiB",
    "decode_b1_read_share": "share of the memory's rate, 1 sequence",
}

Row = dict[str, str]


def engine_table(rows: Sequence[Row]) -> str:
    """Markdown of the rows of one run of benchmarks/engines.py: a line for each figure, and how
    many times better qserve is than each of the others."""
    engines, cells = _pivot(rows)
    lines = [
        f"| tokens a second, medians | {' | '.join(engines)} |",
        f"|---|{'---:|' * len(engines)}",
    ]
    for figure, name in {**FIGURES, **OTHERS}.items():
        found = [_cell(cells.get((figure, engine))) for engine in engines]
        if any(found):
            lines.append(f"| {name} | {' | '.join(found)} |")
    return "\n".join(lines)


def engine_chart(rows: Sequence[Row]) -> str:
    """The rates of the same rows as an SVG."""
    engines, cells = _pivot(rows)
    groups = [
        Group(
            name,
            [
                float(cells[figure, engine]["median"]) if (figure, engine) in cells else None
                for engine in engines
            ],
        )
        for figure, name in FIGURES.items()
    ]
    first = rows[0]
    title = f"Tokens a second, {first['model']}, {first['threads']} threads of {first['cpu']}"
    return draw_bars(title, engines, groups)


def _pivot(rows: Sequence[Row]) -> tuple[list[str], dict[tuple[str, str], Row]]:
    engines = list(dict.fromkeys(row["engine"] for row in rows))
    return engines, {(row["figure"], row["engine"]): row for row in rows}


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    value = float(row["median"])
    shown = f"{value:.0f}" if value >= 100 else f"{value:.3g}"
    ratio = row["qserve_is_better_by"]
    return f"{shown} ({float(ratio):.2f} x)" if ratio else shown
