"""Limits on a result, and whether it keeps them."""

from __future__ import annotations

from dataclasses import dataclass

from qserve.quant.evaluate import Evaluation
from qserve.quant.recipe.schema import GatesSection


@dataclass(frozen=True, slots=True)
class GateResult:
    """One limit and what was found. value: in the unit of the limit."""

    name: str
    limit: float
    value: float
    passed: bool

    def __str__(self) -> str:
        sign = ">=" if self.name.startswith("min_") else "<="
        verdict = "passed" if self.passed else "FAILED"
        return f"{self.name}: {self.value:.6g} {sign} {self.limit:.6g} {verdict}"


def check_gates(
    gates: GatesSection, evaluation: Evaluation | None, num_bytes: int
) -> tuple[GateResult, ...]:
    """Every limit that is set, in the order of the schema. A figure that is NaN passes none.

    num_bytes: size of the weights.
    """
    found: dict[str, float] = {"max_size": float(num_bytes)}
    if evaluation is not None:
        assert evaluation.kl is not None and evaluation.top1 is not None
        assert evaluation.base_perplexity is not None
        found["max_kl"] = evaluation.kl
        found["min_top1"] = evaluation.top1
        found["max_ppl_increase"] = evaluation.perplexity / evaluation.base_perplexity - 1
    results = []
    for name in GatesSection.model_fields:
        limit = getattr(gates, name)
        if limit is not None:
            value = found[name]
            passed = value >= limit if name.startswith("min_") else value <= limit
            results.append(GateResult(name, float(limit), value, passed))
    return tuple(results)
