"""Limits on a result, and whether it keeps them."""

from __future__ import annotations

from dataclasses import dataclass

from qserve.quant.evaluate import Evaluation
from qserve.quant.quantities import format_bytes
from qserve.quant.recipe.schema import GatesSection


def format_share(share: float) -> str:
    """Per cent."""
    return f"{100 * share:.4g} %"


SHOWN = {"max_size": format_bytes, "min_top1": format_share, "max_ppl_increase": format_share}
"""How the figures of a gate are written, where not as plain numbers."""


@dataclass(frozen=True, slots=True)
class GateResult:
    """One limit and what was found: bytes for ``max_size``, shares for ``min_top1`` and
    ``max_ppl_increase``, nats for ``max_kl``."""

    name: str
    limit: float
    value: float
    passed: bool

    @property
    def asked(self) -> str:
        """The limit, as a person reads it."""
        return f"at {'least' if self.name.startswith('min_') else 'most'} {self._show(self.limit)}"

    @property
    def says(self) -> str:
        """What was found."""
        return self._show(self.value)

    def _show(self, value: float) -> str:
        return SHOWN.get(self.name, "{:.4g}".format)(value)

    def __str__(self) -> str:
        return f"{self.name}: {self.says}, {self.asked} {'passed' if self.passed else 'FAILED'}"


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
