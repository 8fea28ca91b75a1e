"""Running a recipe: quantize, judge, hold against the gates, check, publish."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from qserve.quant.evaluate import Evaluation, evaluate
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.quant.options import QuantizeOptions, TuneOptions, read_source
from qserve.quant.output import Discarded, publish_resumable
from qserve.quant.overrides import Override
from qserve.quant.pipeline import quantize
from qserve.quant.progress import Progress
from qserve.quant.quality_limit import quantize_within
from qserve.quant.recipe.checks import run_checks
from qserve.quant.recipe.gates import check_gates
from qserve.quant.recipe.lock import write_lock
from qserve.quant.recipe.report import RecipeReport
from qserve.quant.recipe.schema import (
    TOPICS,
    EvaluateSection,
    GatesSection,
    Recipe,
)
from qserve.quant.report import QuantizationReport
from qserve.quant.run_state import run_key
from qserve.quant.windows import python_topics, read_text


@dataclass(frozen=True, slots=True)
class Job:
    """A recipe and what its relative paths start from.

    name: of the recipe's file. folder: where that lies.
    """

    recipe: Recipe
    name: str
    folder: Path

    @property
    def output(self) -> Path:
        """The folder of the result."""
        return self.folder / self.recipe.output.folder

    @property
    def model(self) -> str:
        """The model: a path beside the recipe where there is one, else as the recipe names it."""
        beside = self.folder / self.recipe.model
        return str(beside) if beside.exists() else self.recipe.model

    @property
    def texts(self) -> list[Path]:
        """The text files that are read."""
        read: list[object] = [read_source(self.recipe.calibration.text, self.folder)]
        if self.recipe.evaluate is not None and self.recipe.evaluate.text != TOPICS:
            read.append(self.folder / self.recipe.evaluate.text)
        return [path for path in read if isinstance(path, Path)]

    def options(self) -> QuantizeOptions:
        """The quantization that the recipe asks for. Raises ``OptionError``."""
        section, calibration = self.recipe.quantize, self.recipe.calibration
        tune = section.tune
        return QuantizeOptions(
            method=section.method,
            bits=section.bits,
            group_size=section.group_size,
            output=section.format,
            effort=section.effort,
            damping=section.damping,
            activation_order=section.act_order,
            head=section.head,
            calibration=read_source(calibration.text, self.folder),
            assistant_only=calibration.assistant_only,
            num_samples=calibration.samples,
            seq_len=calibration.seq_len,
            overrides=tuple(
                Override(one.layers, one.bits, one.group_size) for one in section.overrides
            ),
            avg_bits=section.avg_bits,
            max_size=section.max_size,
            max_kl=section.max_kl,
            widths=section.widths,
            ignore=section.ignore,
            seed=section.seed,
            kv_cache=section.kv_cache,
            tune=None if tune is None else TuneOptions(tune.minutes, tune.steps),
            max_shard_bytes=section.max_shard_size,
        )

    def judging_text(self, section: EvaluateSection) -> str:
        """The text that the result is judged on. Raises ``CalibrationError``."""
        return python_topics() if section.text == TOPICS else read_text(self.folder / section.text)


class _Failed(Discarded):
    """The result is not to be published."""

    def __init__(self, report: RecipeReport) -> None:
        super().__init__()
        self.report = report


def run_job(
    job: Job, source: Checkpoint, progress: Callable[[Progress], None], restart: bool = False
) -> RecipeReport:
    """Quantize ``source`` and publish the result, unless a gate or a check fails.

    Everything that can be refused is refused before the work: options, texts, the output folder.
    A quantization that was stopped goes on, unless told to ``restart``.
    Raises what ``quantize``, ``evaluate`` and ``publish`` raise.
    """
    started = time.perf_counter()
    recipe, options = job.recipe, job.options()
    text = job.judging_text(recipe.evaluate) if recipe.evaluate is not None else None
    protect = [source.folder, *job.texts]
    try:
        with publish_resumable(
            job.output,
            run_key(source, options),
            recipe.output.overwrite,
            protect=protect,
            restart=restart,
        ) as draft:
            folder = draft.result
            judge = None
            if recipe.evaluate is not None and text is not None:
                judge = _judge(source, text, recipe.evaluate, progress)
            evaluation: Evaluation | None
            if options.max_kl is not None and judge is not None:
                quantization, evaluation = quantize_within(
                    source, folder, options, judge, progress, draft.work
                )
            else:
                quantization = quantize(source, folder, options, progress, draft.work)
                evaluation = None if judge is None else judge(folder)
            report = _report(job, folder, quantization, evaluation)
            if report.failed:
                raise _Failed(report)
            write_lock(job.recipe, source, folder, quantization)
    except _Failed as failed:
        report = replace(failed.report, published=False)
    return replace(report, seconds=time.perf_counter() - started)


def _judge(
    source: Checkpoint,
    text: str,
    section: EvaluateSection,
    progress: Callable[[Progress], None],
) -> Callable[[Path], Evaluation]:
    """What compares the checkpoint in a folder with the float model."""

    def judge(folder: Path) -> Evaluation:
        model = Checkpoint(folder)
        return evaluate(model, source, text, section.windows, section.seq_len, progress)

    return judge


def _report(
    job: Job, folder: Path, quantization: QuantizationReport, evaluation: Evaluation | None
) -> RecipeReport:
    num_bytes = quantization.sizes.quantized_bytes
    return RecipeReport(
        recipe=job.name,
        model=job.recipe.model,
        output=job.recipe.output.folder,
        published=True,
        quantization=quantization,
        evaluation=evaluation,
        gates=check_gates(_gates(job.recipe), evaluation, num_bytes),
        checks=run_checks(job.recipe.checks, folder),
        seconds=0.0,
    )


def _gates(recipe: Recipe) -> GatesSection:
    """The gates, the limit that quantization works towards among them."""
    limit = recipe.quantize.max_kl
    if limit is None or recipe.gates.max_kl is not None:
        return recipe.gates
    return recipe.gates.model_copy(update={"max_kl": limit})
