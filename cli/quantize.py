"""`qserve quantize`: a float model in, a quantized checkpoint out."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qserve.cli.cache import cache_folder
from qserve.cli.console import print_table, say
from qserve.cli.phase_display import describe_step, phase_display
from qserve.cli.quantize_options import quantize_options, read_options
from qserve.cli.resumption import telling_what_is_kept
from qserve.cli.smoke import try_quantization
from qserve.cli.termination import terminated_like_interrupted
from qserve.cli.threads import threads_option, use_threads
from qserve.quant.quantities import format_bytes, format_seconds

JUDGING_WINDOWS = 16, 256
"""Windows of the text that ``--max-kl`` judges on, and their tokens."""

if TYPE_CHECKING:
    from qserve.quant.evaluate import Evaluation
    from qserve.quant.formats.checkpoint import Checkpoint
    from qserve.quant.options import QuantizeOptions
    from qserve.quant.output import Draft
    from qserve.quant.progress import ProgressCallback
    from qserve.quant.report import QuantizationReport, SizeReport


@click.command(short_help="Quantize a model and write a checkpoint.")
@click.argument("model")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Folder to write. Needed but for --smoke.",
)
@quantize_options
@threads_option
@click.option(
    "--smoke", is_flag=True, help="Try one block, saved, read and run, and write nothing else."
)
@click.option("--force", is_flag=True, help="Replace a model folder that is already there.")
@click.option("--restart", is_flag=True, help="Begin anew instead of going on with a stopped run.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def command(model: str, output: Path | None, smoke: bool, **options: Any) -> None:
    """Quantize MODEL, by default to 4 bits in AutoAWQ's format, which most engines load.

    MODEL is a folder of safetensors, a .gguf file or a hub id (owner/name). The result appears
    under --output when it is complete and not before. A run that was stopped or killed goes on
    after its last finished block when the same command is given again.
    """
    if smoke:
        try_quantization(model, options)
        return
    if output is None:
        raise click.UsageError("Missing option '-o' / '--output'.")
    with terminated_like_interrupted():
        report = _quantize(model, output, options)
    summary = summarize(report, output)
    if options["as_json"]:
        click.echo(json.dumps(summary, indent=2))
    else:
        _print_summary(summary, report)


def _quantize(model: str, output: Path, choices: dict[str, Any]) -> QuantizationReport:
    # Imported here so that a wrong option or `--help` is answered before torch has loaded.

    from qserve.quant.decoder import Decoder
    from qserve.quant.errors import CheckpointError
    from qserve.quant.output import check_output, publish_resumable
    from qserve.quant.pipeline import quantize
    from qserve.quant.plan import make_plan
    from qserve.quant.progress import Phase
    from qserve.quant.run_state import run_key
    from qserve.quant.source import resolve_model

    options = read_options(choices)
    force, restart = choices["force"], choices["restart"]
    read = [path for path in (Path(model), options.calibration) if isinstance(path, Path)]
    check_output(output, force, protect=[path for path in read if path.exists()])
    use_threads(choices["threads"])
    source = resolve_model(model, cache=cache_folder(os.environ), notice=say)
    if source.method is not None:
        raise CheckpointError(
            f"{model} is already quantized ({source.method}): give the float model it came from"
        )
    decoder = Decoder(source)
    plan = make_plan(decoder, options)
    if options.group_size is None and not options.is_limited:
        say(f"{_groups(plan.group_size)}: the coarsest that the method has and every layer fits")
    for note in plan.notes:
        say(note)
    protect = [source.folder, *(path for path in read if path.exists())]
    key = run_key(source, options)
    steps = decoder.num_blocks
    first = (Phase.MEASURE, 2 * steps) if options.is_limited else (Phase.QUANTIZE, steps)
    with (
        telling_what_is_kept(output, key, restart),
        publish_resumable(output, key, force, protect=protect, restart=restart) as draft,
        phase_display(*first, describe_step) as follow,
    ):
        if options.max_kl is None:
            return quantize(source, draft.result, options, follow, draft.work)
        return _quantize_within(source, draft, options, follow)


def _quantize_within(
    source: Checkpoint, draft: Draft, options: QuantizeOptions, follow: ProgressCallback
) -> QuantizationReport:
    """Quantize and judge until the limit is kept. Raises ``GateError`` when it is not."""
    from qserve.quant.errors import GateError
    from qserve.quant.evaluate import evaluate
    from qserve.quant.formats.checkpoint import Checkpoint
    from qserve.quant.quality_limit import quantize_within
    from qserve.quant.windows import python_topics

    def judge(folder: Path) -> Evaluation:
        windows, length = JUDGING_WINDOWS
        return evaluate(Checkpoint(folder), source, python_topics(), windows, length, follow)

    report, _ = quantize_within(source, draft.result, options, judge, follow, draft.work)
    for retry in report.retries:
        say(retry)
    assert report.kl is not None and options.max_kl is not None
    if report.kl > options.max_kl:
        raise GateError(
            f"the KL from the float model is {report.kl:.4g}, above {options.max_kl:g}, after "
            f"{len(report.retries)} retries: nothing is written; allow more, start from more bits "
            "(--bits), or take a format that holds more"
        )
    return report


def summarize(report: QuantizationReport, output: Path) -> dict[str, Any]:
    """What `--json` prints: the report without its layers, and where everything is."""
    from qserve.quant.report import FILE_NAME

    details = ("layers", "skipped", "block_errors", "bfloat16_tensors")
    kept = {key: value for key, value in report.to_dict().items() if key not in details}
    return {
        "output": str(output),
        "report": str(output / FILE_NAME),
        "num_quantized_layers": len(report.layers),
        "num_skipped_layers": len(report.skipped),
        "num_layers_short_of_text": report.num_short_of_text,
        **kept,
    }


def _print_summary(summary: dict[str, Any], report: QuantizationReport) -> None:
    sizes = report.sizes
    num_differing = sum(bool(layer.reason) for layer in report.layers)
    differing = f"; {num_differing} by a choice of their own" if num_differing else ""
    rows = [
        ("written to", summary["output"]),
        ("size before", format_bytes(sizes.source_bytes)),
        ("size after", _describe_size(sizes)),
        ("bits per weight, quantized layers", f"{sizes.bits_per_weight:.3f}"),
        ("quantized layers", f"{len(report.layers)}, {_groups(report.group_size)}{differing}"),
        ("layers left in 16 bits", len(report.skipped)),
        *_describe_experts(report),
        *([] if report.tuning is None else [("tuning", str(report.tuning))]),
        ("calibration", str(report.calibration or "no text was read")),
        ("time", format_seconds(report.seconds)),
        ("peak memory", format_bytes(report.peak_memory_bytes)),
        ("report", summary["report"]),
    ]
    print_table(f"{report.method.upper()}, {report.bits} bits", ("", ""), rows)


def _describe_size(sizes: SizeReport) -> str:
    """The size of the weights, and how it compares with what they were."""
    before, after = sizes.source_bytes, sizes.quantized_bytes
    larger = after > before  # a small model whose tied head was stored on its own
    ratio = (
        f"{after / before:.2f} times larger" if larger else f"{before / after:.2f} times smaller"
    )
    return f"{format_bytes(after)} ({ratio})"


def _describe_experts(report: QuantizationReport) -> list[tuple[str, str]]:
    """How many layers saw too few tokens, if any did."""
    if not report.num_short_of_text:
        return []
    few = f"{report.num_short_of_text}: other tokens that came near told the rest; more text helps"
    return [("layers of experts short of text", few)]


def _groups(group_size: int) -> str:
    return "one scale a row" if group_size < 0 else f"groups of {group_size}"
