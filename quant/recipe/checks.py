"""Whether a result can be used: what its files hold, who loads it, whether it writes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qserve.quant.checking import check_checkpoint
from qserve.quant.continuation import continue_greedily
from qserve.quant.decoder import Decoder
from qserve.quant.engine_rules import Verdict, judge_for
from qserve.quant.errors import CheckpointError
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.quant.recipe.schema import ChecksSection
from qserve.quant.windows import load_tokenizer, tokenize

PROMPT = "The most important thing about the sea is"
NUM_TOKENS = 8


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One check. says: what was found, of a passed one too."""

    name: str
    passed: bool
    says: str

    def __str__(self) -> str:
        return f"{self.name}: {self.says} {'passed' if self.passed else 'FAILED'}"


def run_checks(section: ChecksSection, folder: Path) -> tuple[CheckResult, ...]:
    """Every check that is asked for, in the order of the schema, of the checkpoint in a folder."""
    return tuple(_results(section, folder))


def _results(section: ChecksSection, folder: Path) -> Iterator[CheckResult]:
    if section.inspect:
        yield _inspect(folder)
    for verdict in judge_for(Checkpoint(folder), section.loads_in):
        yield _loads(verdict)
    if section.generate:
        yield _generate(folder)


def _inspect(folder: Path) -> CheckResult:
    try:
        _, findings = check_checkpoint(folder)
    except CheckpointError as error:
        return CheckResult("inspect", False, str(error))
    told = "; ".join(f"{found.where}: {found.problem}" for found in findings)
    return CheckResult("inspect", not findings, told or "nothing is wrong")


def _loads(verdict: Verdict) -> CheckResult:
    told = "; ".join([*verdict.refusals, *verdict.notes]) or "no rule against it"
    name = f"loads in {verdict.engine}"
    return CheckResult(name, not verdict.refusals, f"{told} ({verdict.version})")


def _generate(folder: Path) -> CheckResult:
    try:
        prompt = tokenize(folder, PROMPT)
        written = continue_greedily(Decoder(Checkpoint(folder)), prompt, NUM_TOKENS)
        text = load_tokenizer(folder).decode(written)
    except CheckpointError as error:
        return CheckResult("generate", False, str(error))
    return CheckResult("generate", True, repr(f"{PROMPT}{text}"))
