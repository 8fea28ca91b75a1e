"""`qserve quantize`: a float model in, a quantized checkpoint out."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qserve.cli.cache import cache_folder
from qserve.cli.console import print_table, progress, say
from qserve.cli.quantities import format_bytes, format_seconds
from qserve.cli.termination import terminated_like_interrupted

if TYPE_CHECKING:
    from qserve.quant.options import QuantizeOptions
    from qserve.quant.report import QuantizationReport

BUILT_IN, SELF = "builtin", "self"
METHODS = (
    *("awq", "gptq", "int4", "int8", "smoothquant", "qoq", "nf4", "fp4", "fp8", "fp8-weight"),
    *("llm-int8", "hqq", "rtn"),
)
FORMATS = ("awq", "gptq", "gptq-v2", "compressed-tensors", "bitsandbytes")


def method_flag(name: str, text: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The option ``--name``, which stands for ``--method name``."""
    return click.option(f"--{name}", "flags", flag_value=name, help=text)


@click.command(short_help="Quantize a model and write a checkpoint.")
@click.argument("model")
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder to write."
)
@method_flag("awq", "Activation-aware 4 bits, stored as AWQ (the default).")
@method_flag("gptq", "The same steps on symmetric codes, stored as GPTQ.")
@method_flag("int4", "The same symmetric codes, stored as compressed-tensors.")
@method_flag("int8", "8-bit weights, one scale a row.")
@method_flag("smoothquant", "8-bit weights and activations (W8A8).")
@method_flag("nf4", "bitsandbytes' 4-bit levels, with double quantization.")
@method_flag("fp8", "8-bit floats, weights and activations.")
@method_flag("rtn", "Round to nearest: no text, no search; stored as AWQ.")
@click.option(
    "--method", type=click.Choice(METHODS), help="Any method by its name, those above included."
)
@click.option(
    "--format",
    "output_format",
    type=click.Choice(FORMATS),
    help="Format to write. Default: the method's own.",
)
@click.option("--bits", type=int, default=None, help="Width of a weight.")
@click.option(
    "--group-size",
    type=int,
    help="Inputs that share a scale, -1 for a row. Default: the coarsest that fits every layer.",
)
@click.option(
    "--rounding",
    type=click.Choice(["feedback", "nearest"]),
    default="feedback",
    show_default=True,
    help="feedback loses less; nearest is what the AWQ paper does, and faster.",
)
@click.option(
    "--calibration",
    default=BUILT_IN,
    show_default=True,
    metavar="FILE|builtin|self",
    help="Text to look at: a UTF-8 file, the one in the package, or what the model itself writes.",
)
@click.option(
    "--samples",
    type=click.IntRange(1),
    default=32,
    show_default=True,
    help="Windows of calibration text.",
)
@click.option(
    "--seq-len",
    type=click.IntRange(2),
    default=512,
    show_default=True,
    help="Tokens of a window.",
)
@click.option(
    "--override",
    "overrides",
    multiple=True,
    metavar="REGEX=bits:8,group:32",
    help="Another width or group size for layers whose name matches; REGEX=16 leaves them in 16 "
    "bits. May be repeated, the later counts.",
)
@click.option(
    "--ignore",
    multiple=True,
    metavar="REGEX",
    help="Leave layers whose name matches in 16 bits; may be repeated.",
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Seed of self-written calibration text."
)
@click.option("--threads", type=click.IntRange(1), help="CPU threads. Default: all cores.")
@click.option("--force", is_flag=True, help="Replace a model folder that is already there.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def command(model: str, output: Path, **options: Any) -> None:
    """Quantize MODEL, by default to 4 bits in AutoAWQ's format, which most engines load.

    MODEL is a folder of safetensors, a .gguf file or a hub id (owner/name). The result appears
    under --output when it is complete and not before.
    """
    with terminated_like_interrupted():
        report = _quantize(model, output, options)
    summary = summarize(report, output)
    if options["as_json"]:
        click.echo(json.dumps(summary, indent=2))
    else:
        _print_summary(summary, report)


def _quantize(model: str, output: Path, choices: dict[str, Any]) -> QuantizationReport:
    # Imported here so that a wrong option or `--help` is answered before torch has loaded.
    import torch

    from qserve.quant.decoder import Decoder
    from qserve.quant.errors import CheckpointError
    from qserve.quant.output import check_output, publish
    from qserve.quant.pipeline import quantize
    from qserve.quant.plan import make_plan
    from qserve.quant.source import resolve_model

    options = _read_options(choices)
    force = choices["force"]
    read = [path for path in (Path(model), options.calibration) if isinstance(path, Path)]
    check_output(output, force, protect=[path for path in read if path.exists()])
    if choices["threads"]:
        torch.set_num_threads(choices["threads"])
    source = resolve_model(model, cache=cache_folder(os.environ), notice=say)
    if source.method is not None:
        raise CheckpointError(
            f"{model} is already quantized ({source.method}): give the float model it came from"
        )
    decoder = Decoder(source)
    plan = make_plan(decoder, options)
    if options.group_size is None:
        say(f"{_groups(plan.group_size)}: the coarsest that the method has and every layer fits")
    for note in plan.notes:
        say(note)
    protect = [source.folder, *(path for path in read if path.exists())]
    with (
        publish(output, force, protect=protect) as folder,
        progress("quantizing", decoder.num_blocks) as advance,
    ):
        return quantize(
            source,
            folder,
            options,
            lambda step: advance(step.done, f"{format_seconds(step.seconds_left)} left"),
        )


def _read_options(choices: dict[str, Any]) -> QuantizeOptions:
    from qserve.quant.formats.registry import OutputFormat
    from qserve.quant.options import CalibrationSource, Method, QuantizeOptions, Rounding
    from qserve.quant.overrides import parse_override

    named = {BUILT_IN: CalibrationSource.BUILT_IN, SELF: CalibrationSource.SELF}
    calibration = choices["calibration"]
    return QuantizeOptions(
        method=Method(_read_method(choices)),
        bits=choices["bits"],
        group_size=choices["group_size"],
        output=OutputFormat(choices["output_format"]) if choices["output_format"] else None,
        rounding=Rounding(choices["rounding"]),
        calibration=named.get(calibration) or Path(calibration),
        num_samples=choices["samples"],
        seq_len=choices["seq_len"],
        overrides=tuple(map(parse_override, choices["overrides"])),
        ignore=choices["ignore"],
        seed=choices["seed"],
    )


def _read_method(choices: dict[str, Any]) -> str:
    """The method that was named, by its flag or by ``--method``."""
    flag, name = choices["flags"], choices["method"]
    if flag and name and flag != name:
        raise click.UsageError(f"--{flag} and --method {name} contradict each other: give one")
    method: str = name or flag or METHODS[0]
    return method


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
        **kept,
    }


def _print_summary(summary: dict[str, Any], report: QuantizationReport) -> None:
    sizes = report.sizes
    ratio = sizes.source_bytes / sizes.quantized_bytes
    num_differing = sum(bool(layer.reason) for layer in report.layers)
    differing = f"; {num_differing} by a choice of their own" if num_differing else ""
    rows = [
        ("written to", summary["output"]),
        ("size before", format_bytes(sizes.source_bytes)),
        ("size after", f"{format_bytes(sizes.quantized_bytes)} ({ratio:.2f} times smaller)"),
        ("bits per weight, quantized layers", f"{sizes.bits_per_weight:.3f}"),
        ("quantized layers", f"{len(report.layers)}, {_groups(report.group_size)}{differing}"),
        ("layers left in 16 bits", len(report.skipped)),
        ("time", format_seconds(report.seconds)),
        ("peak memory", format_bytes(report.peak_memory_bytes)),
        ("report", summary["report"]),
    ]
    print_table(f"{report.method.upper()}, {report.bits} bits", ("", ""), rows)


def _groups(group_size: int) -> str:
    return "one scale a row" if group_size < 0 else f"groups of {group_size}"
