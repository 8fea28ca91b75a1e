"""A limit on the divergence: while the result is beyond it, its worst layers get more."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from qserve.quant.calibration import gather_calibration
from qserve.quant.decoder import Decoder
from qserve.quant.evaluate import Evaluation
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.quant.mixture import Candidate, Choices, Mixer, take_steps
from qserve.quant.options import QuantizeOptions
from qserve.quant.overrides import FLOAT_BITS, Override
from qserve.quant.pipeline import quantize
from qserve.quant.plan import make_plan
from qserve.quant.progress import ProgressCallback
from qserve.quant.report import QuantizationReport
from qserve.quant.sensitivity import StageKey

MAX_RETRIES = 3

MARGIN = 0.9
"""Share of the limit that a retry aims at: estimates and what comes of them differ a little."""

Judge = Callable[[Path], Evaluation]


def quantize_within(
    source: Checkpoint,
    out: Path,
    options: QuantizeOptions,
    judge: Judge,
    progress: ProgressCallback,
    work: Path | None = None,
) -> tuple[QuantizationReport, Evaluation]:
    """``quantize``, and again with more bits or smaller groups while the KL is above ``max_kl``.

    judge: compares the checkpoint in a folder with the float model, on text that quantization does
    not see. The result may still be above the limit, when nothing is left that the format could
    hold or after ``MAX_RETRIES``; the report says what was tried. Raises like ``quantize``.
    """
    assert options.max_kl is not None
    report = quantize(source, out, options, progress, work)
    evaluation = judge(out)
    escalation: Escalation | None = None
    retries: list[str] = []
    while _kl(evaluation) > options.max_kl and len(retries) < MAX_RETRIES:
        if escalation is None:
            escalation = Escalation(Decoder(source), options, progress)
        overrides = escalation.raise_(MARGIN * options.max_kl / _kl(evaluation))
        if not overrides:
            break
        retries.append(
            f"KL {_kl(evaluation):.4g} above {options.max_kl:g}: more bits or smaller groups for "
            f"{len(overrides)} sets of layers"
        )
        _empty(out)
        changed = replace(options, overrides=(*options.overrides, *overrides))
        report = quantize(source, out, changed, progress, work)
        evaluation = judge(out)
    report = replace(report, retries=tuple(retries), kl=_kl(evaluation))
    report.write(out)
    return report, evaluation


class Escalation:
    """What to give more, from what the options ask for on: most divergence for the bytes first."""

    def __init__(
        self, decoder: Decoder, options: QuantizeOptions, progress: ProgressCallback
    ) -> None:
        """Measures the layers on the calibration text; one that an override names stays as it is.

        Raises like ``gather_calibration``.
        """
        self._mixer = Mixer(decoder, options, make_plan(decoder, options))
        windows = gather_calibration(decoder, options).windows
        self._candidates = self._mixer.estimated(self._mixer.measure(windows, progress))
        self._why = f"raised to keep the KL below {options.max_kl:g}"
        self._usual = self._mixer.usual(self._candidates)
        self._chosen: Choices = dict(self._usual)

    def raise_(self, share: float) -> tuple[Override, ...]:
        """Overrides that leave ``share`` of the divergence by estimate, those before included.

        None when nothing can be changed any more, and when that leaves all layers in 16 bits.
        """
        before = dict(self._chosen)
        aim = share * sum(one.kl for one in before.values())
        self._chosen = take_steps(before, self._candidates, aim)
        if self._chosen == before or all(one.spec is None for one in self._chosen.values()):
            return ()
        changed = [key for key, one in self._chosen.items() if one != self._usual[key]]
        return tuple(self._override(key, self._chosen[key]) for key in changed)

    def _override(self, key: StageKey, choice: Candidate) -> Override:
        names = "|".join(map(re.escape, self._mixer.names(key)))
        spec = choice.spec
        pattern = f"^(?:{names})$"
        if spec is None:
            return Override(pattern, FLOAT_BITS, why=self._why)
        return Override(pattern, spec.levels.bits, spec.group_size, self._why)


def _kl(evaluation: Evaluation) -> float:
    assert evaluation.kl is not None
    return evaluation.kl


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
