"""The report as Markdown: a job summary of a CI run."""

from __future__ import annotations

from collections.abc import Sequence

from qserve.quant.recipe.report import RecipeReport, headline

NUM_WORST_LAYERS = 5


def render_markdown(report: RecipeReport) -> str:
    """A heading with the verdict, figures, gates, checks and the layers that lost most."""
    lines = [
        f"## {report.recipe}: {report.verdict}",
        "",
        f"`{report.model}` to `{report.output}`",
        "",
    ]
    lines += _table(("", ""), headline(report))
    if report.gates:
        rows = [
            (gate.name, gate.asked, gate.says, "passed" if gate.passed else "**failed**")
            for gate in report.gates
        ]
        lines += ["", *_table(("gate", "limit", "found", ""), rows)]
    if report.checks:
        checks = [
            (one.name, one.says.replace("|", "\\|"), "passed" if one.passed else "**failed**")
            for one in report.checks
        ]
        lines += ["", *_table(("check", "found", ""), checks)]
    layers = sorted(report.quantization.layers, key=lambda layer: -layer.error)[:NUM_WORST_LAYERS]
    worst = [(layer.name, f"{layer.error:.3g}", f"{layer.rounded_error:.3g}") for layer in layers]
    heading = ("layers that lost most", "relative error", "of rounding to nearest")
    return "\n".join([*lines, "", *_table(heading, worst)]) + "\n"


def _table(heading: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    rule = tuple("---" for _ in heading)
    return ["| " + " | ".join(cells) + " |" for cells in (heading, rule, *rows)]
