"""What running a recipe gave: the figures behind every report."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from qserve.quant.evaluate import Evaluation
from qserve.quant.quantities import format_bytes, format_seconds
from qserve.quant.recipe.checks import CheckResult
from qserve.quant.recipe.gates import GateResult
from qserve.quant.report import QuantizationReport


@dataclass(frozen=True, slots=True)
class RecipeReport:
    """One run of a recipe.

    recipe: its file's name. output: the folder; it holds the result if ``published``, which a
    failed gate or check prevents.
    """

    recipe: str
    model: str
    output: str
    published: bool
    quantization: QuantizationReport
    evaluation: Evaluation | None
    gates: tuple[GateResult, ...]
    checks: tuple[CheckResult, ...]
    seconds: float

    @property
    def failed(self) -> tuple[GateResult | CheckResult, ...]:
        """The gates and checks that keep the result from being published."""
        results: tuple[GateResult | CheckResult, ...] = (*self.gates, *self.checks)
        return tuple(one for one in results if not one.passed)

    @property
    def verdict(self) -> str:
        """What became of the result, in a few words."""
        return "published" if self.published else "NOT published: a gate or check failed"

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values that JSON can hold: NaN becomes null."""
        plain: dict[str, Any] = _without_nan(asdict(self))
        return plain


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def headline(report: RecipeReport) -> list[tuple[str, str]]:
    """The figures that a person looks at first, as labels and values."""
    quantization, sizes = report.quantization, report.quantization.sizes
    size = quantization.group_size
    groups = "one scale a row" if size < 0 else f"groups of {size}"
    rows = [
        ("method", f"{quantization.method}, {quantization.bits} bits, {groups}"),
        ("size", f"{format_bytes(sizes.quantized_bytes)}, was {format_bytes(sizes.source_bytes)}"),
        ("bits per weight", f"{sizes.bits_per_weight:.3f}"),
        ("quantized layers", f"{len(quantization.layers)}, {len(quantization.skipped)} skipped"),
    ]
    if quantization.tuning is not None:
        rows.append(("tuning", str(quantization.tuning)))
    evaluation = report.evaluation
    if evaluation is not None:
        assert evaluation.kl is not None and evaluation.top1 is not None
        rows += [
            ("KL from the float model, nats", f"{evaluation.kl:.4f}"),
            ("same most likely token", f"{100 * evaluation.top1:.2f} %"),
            ("perplexity", f"{evaluation.perplexity:.2f}, was {evaluation.base_perplexity:.2f}"),
        ]
    rows += [
        ("time", format_seconds(report.seconds)),
        ("peak memory", format_bytes(quantization.peak_memory_bytes)),
    ]
    return rows
