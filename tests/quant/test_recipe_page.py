"""The HTML report: what its charts show."""

from __future__ import annotations

from qserve.quant.recipe.charts import Point, Series, dot_chart
from qserve.quant.recipe.gates import GateResult
from qserve.quant.recipe.page import render_page
from qserve.quant.recipe.report import RecipeReport
from qserve.quant.report import LayerReport, QuantizationReport, SizeReport


def report_of(names: list[str]) -> RecipeReport:
    layers = tuple(
        LayerReport(
            name=name,
            in_features=64,
            out_features=64,
            rounding="nearest",
            bits=4,
            group_size=32,
            reason="",
            scale=None,
            error=0.01,
            rounded_error=0.02,
            clipped_share=0.0,
        )
        for name in names
    )
    quantization = QuantizationReport(
        model="m",
        architecture="a",
        method="awq",
        effort="full",
        bits=4,
        group_size=-1,
        head="16",
        seed=0,
        calibration=None,
        tuning=None,
        layers=layers,
        skipped=(),
        block_errors=(0.1, 0.2),
        bfloat16_tensors=(),
        sizes=SizeReport(4_000_000, 1_000_000, 4.5),
        seconds=1.0,
        peak_memory_bytes=1,
        versions={},
    )
    gates = (
        GateResult("max_size", 90e6, 1_000_000, True),
        GateResult("max_ppl_increase", 0.05, 0.0712, False),
        GateResult("min_top1", 0.85, 0.9, True),
    )
    return RecipeReport("r", "m", "out", False, quantization, None, gates, (), 1.0)


def test_experts_share_a_colour_and_each_has_a_point() -> None:
    names = [f"model.layers.{b}.mlp.experts.{e}.up_proj" for b in range(2) for e in range(9)]
    page = render_page(report_of([*names, "model.layers.0.self_attn.q_proj"]))
    assert page.count("<circle") == 19 + 2  # and one for each block
    legend = page.partition('class="legend"')[2].partition("</p>")[0]
    assert legend.count("<span") == 2 and "mlp.experts.*.up_proj" in legend
    assert "one scale a row" in page


def test_figures_of_gates_have_their_units() -> None:
    report = report_of(["model.layers.0.mlp.up_proj"])
    assert [str(gate) for gate in report.gates] == [
        "max_size: 1.0 MB, at most 90.0 MB passed",
        "max_ppl_increase: 7.12 %, at most 5 % FAILED",
        "min_top1: 90 %, at least 85 % passed",
    ]


def test_values_that_are_not_positive_are_no_points() -> None:
    points = [Point(0, 1e-3, "a"), Point(1, 0.0, "b"), Point(1, 2e-2, "c")]
    chart = dot_chart([Series("s", "one", points)], ["0", "1"], "error")
    assert chart.count("<circle") == 2 and "<title>b</title>" not in chart
    assert dot_chart([Series("s", "one", [Point(0, 0.0, "a")])], ["0"], "error") == ""
