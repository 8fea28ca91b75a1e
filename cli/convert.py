"""`qserve convert`: a quantized checkpoint in another format."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qserve.cli.cache import cache_folder
from qserve.cli.console import print_table, progress, say
from qserve.cli.termination import terminated_like_interrupted
from qserve.cli.threads import threads_option, use_threads

if TYPE_CHECKING:
    from qserve.quant.conversion import ConversionReport

# `conversion.TARGETS`, written out so that `--help` is answered before torch has loaded.
TARGETS = ("awq", "gptq", "gptq-v2", "compressed-tensors", "bitsandbytes", "bf16", "fp16")


@click.command(short_help="Write a quantized checkpoint in another format.")
@click.argument("model")
@click.option("--to", "target", required=True, type=click.Choice(TARGETS), help="The format.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--dry-run", is_flag=True, help="Say what would change, and write nothing.")
@threads_option
@click.option("--force", is_flag=True, help="Replace a model folder that is already there.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def command(
    model: str,
    target: str,
    output: Path | None,
    dry_run: bool,
    threads: int | None,
    force: bool,
    as_json: bool,
) -> None:
    """Write the quantized MODEL in another format, or dequantized.

    Codes move over unchanged where the other format holds them. Where it does not, weights are
    rounded again to the nearest: how far they move is measured and said before anything is
    written. MODEL is a checkpoint folder or a hub id.
    """
    if (output is None) is not dry_run:
        raise click.UsageError("give --output, or --dry-run to write nothing")
    use_threads(threads)
    with terminated_like_interrupted():
        _convert(model, target, output, force, as_json)


def _convert(model: str, target: str, output: Path | None, force: bool, as_json: bool) -> None:
    # Imported here so that a wrong option or `--help` is answered before torch has loaded.
    from qserve.quant.conversion import Conversion
    from qserve.quant.output import check_output, publish
    from qserve.quant.pipeline import PROGRAM
    from qserve.quant.source import resolve_model

    if output is not None:
        check_output(output, force, protect=[path for path in [Path(model)] if path.exists()])
    source = resolve_model(model, cache=cache_folder(os.environ), notice=say)
    conversion = Conversion(source, target, PROGRAM)
    with progress("measuring", conversion.num_layers) as advance:
        report = conversion.measure(advance)
    if not as_json:
        _print_report(report)
    if output is not None:
        with (
            publish(output, force, protect=[source.folder]) as folder,
            progress("converting", conversion.num_layers) as advance,
        ):
            conversion.write(folder, report, advance)
        say(f"written to {output}")
    if as_json:
        click.echo(json.dumps(_summarize(report, output), indent=2))


def _summarize(report: ConversionReport, output: Path | None) -> dict[str, Any]:
    return {
        "output": None if output is None else str(output),
        "source_format": report.source,
        "target_format": report.target,
        "num_layers": len(report.layers),
        "lossless": report.is_lossless,
        "num_changed_layers": report.num_changed,
        "relative_error": report.error,
        "drops_activations": report.drops_activations,
        "drops_cache_scales": report.drops_cache_scales,
        "layers": [
            {
                "name": layer.name,
                "scheme": None if layer.scheme is None else str(layer.scheme),
                "relative_error": layer.error,
            }
            for layer in report.layers
        ],
    }


def _print_report(report: ConversionReport) -> None:
    outcome = "lossless: every weight stays what it is, to the last bit"
    if not report.is_lossless:
        outcome = f"lossy: {report.num_changed} of {len(report.layers)} layers change"
    rows: list[tuple[str, object]] = [
        ("from", report.source),
        ("to", report.target),
        ("quantized layers", len(report.layers)),
        ("outcome", outcome),
    ]
    if not report.is_lossless:
        worst = max(report.layers, key=lambda layer: layer.error)
        rows.append(("error of the weights, relative to their norm", f"{report.error:.2e}"))
        rows.append(("largest error of a layer", f"{worst.error:.2e} ({worst.name})"))
    if report.drops_activations:
        rows.append(("activations", "8 bits in the source; the result leaves them in 16"))
    if report.drops_cache_scales:
        rows.append(("scales of keys and values", "left out: the result cannot state them"))
    print_table("conversion", ("", ""), rows)
