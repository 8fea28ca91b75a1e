"""`qserve inspect`: what a checkpoint holds."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qserve.cli.cache import cache_folder
from qserve.cli.checkpoint_verdict import judge
from qserve.cli.console import print_table, say
from qserve.quant.quantities import format_bytes

if TYPE_CHECKING:
    from qserve.quant.inspection import Inspection, Layer

BITS_DIGITS = 3  # the share of scales and zero points shows in the second digit


def summary(inspection: Inspection) -> dict[str, Any]:
    """What `--json` prints, without the layers."""
    quantized = inspection.quantized_bits_per_weight
    return {
        "path": str(inspection.path),
        "architecture": inspection.architecture,
        "format": inspection.format,
        "num_parameters": inspection.num_parameters,
        "num_bytes": inspection.num_bytes,
        "bits_per_weight_quantized_layers": None
        if quantized is None
        else round(quantized, BITS_DIGITS),
        "bits_per_weight_model": round(inspection.bits_per_parameter, BITS_DIGITS),
        "kv_cache": inspection.kv_cache,
        "kv_bytes_per_token": inspection.kv_bytes_per_token,
    }


def _layer_object(layer: Layer) -> dict[str, Any]:
    return asdict(layer) | {"bits": round(layer.bits, BITS_DIGITS)}


def _inspect(model: str) -> Inspection:
    # Imported here so that a wrong option or `--help` is answered before torch has loaded.
    from qserve.quant.gguf_inspection import inspect_gguf
    from qserve.quant.inspection import inspect_checkpoint
    from qserve.quant.source import is_gguf, resolve_model

    if is_gguf(model):
        return inspect_gguf(Path(model))
    return inspect_checkpoint(resolve_model(model, cache=cache_folder(os.environ), notice=say))


def _print_summary(inspection: Inspection) -> None:
    quantized = inspection.quantized_bits_per_weight
    kv_bytes = inspection.kv_bytes_per_token
    rows = [
        ("path", inspection.path),
        ("architecture", inspection.architecture),
        ("format", inspection.format),
        ("parameters", f"{inspection.num_parameters:,}"),
        ("size of the tensors", format_bytes(inspection.num_bytes)),
        ("bits per weight, quantized layers", "-" if quantized is None else f"{quantized:.3f}"),
        ("bits per weight, whole model", f"{inspection.bits_per_parameter:.3f}"),
        ("scales for the KV cache", inspection.kv_cache or "-"),
        ("KV cache per token (16 bit)", "-" if kv_bytes is None else format_bytes(kv_bytes)),
    ]
    print_table("model", ("", ""), rows)


def _is_matrix(layer: Layer) -> bool:
    return sum(size > 1 for size in layer.shape) > 1


def _print_layers(layers: tuple[Layer, ...]) -> None:
    """Matrices row by row; what has one dimension alone, norms, biases and scales of keys and
    values, in one line at the end."""
    matrices = [layer for layer in layers if _is_matrix(layer)]
    rows = [
        (
            layer.name,
            " x ".join(map(str, layer.shape)),
            layer.format,
            round(layer.bits, BITS_DIGITS),
            layer.group_size or "-",
            layer.num_bytes,
        )
        for layer in matrices
    ]
    print_table("layers", ("name", "shape", "format", "bits", "group size", "bytes"), rows)
    others = [layer for layer in layers if not _is_matrix(layer)]
    if others:
        num_bytes = sum(layer.num_bytes for layer in others)
        click.echo(f"and {len(others)} vectors (norms and the like): {num_bytes:,} bytes")


@click.command(short_help="Say what a checkpoint holds: layers, bits, sizes.")
@click.argument("model")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
@click.option("--check", is_flag=True, help="Read every tensor and tell what is wrong.")
@click.option(
    "--repair",
    "mended",
    type=click.Path(path_type=Path),
    metavar="OUT",
    help="Check, and write a mended copy.",
)
@click.option(
    "--for",
    "engines",
    metavar="ENGINES",
    help="Say whether it will load in these, such as vllm,transformers,sglang.",
)
def command(
    model: str, as_json: bool, check: bool, mended: Path | None, engines: str | None
) -> None:
    """Say what MODEL holds: architecture, format, bits, sizes, layer by layer.

    MODEL is a checkpoint folder, a .gguf file or a hub id. Only headers are read, so this takes
    a moment whatever the size of the model. With --check, --repair or --for it says instead
    whether the checkpoint is in order; the exit code is 3 when it is not.
    """
    if check or mended is not None or engines is not None:
        judge(model, engines, mended, as_json)
        return
    inspection = _inspect(model)
    if as_json:
        layers = [_layer_object(layer) for layer in inspection.layers]
        click.echo(json.dumps(summary(inspection) | {"layers": layers}, indent=2))
    else:
        _print_summary(inspection)
        _print_layers(inspection.layers)
