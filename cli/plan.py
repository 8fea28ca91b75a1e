"""`qserve plan`: what a quantization will cost and give, before it is begun."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from qserve.cli.cache import cache_folder
from qserve.cli.console import print_table, say
from qserve.cli.quantize_options import quantize_options, read_options
from qserve.cli.threads import threads_option, use_threads
from qserve.quant.quantities import format_bytes, format_seconds

if TYPE_CHECKING:
    from qserve.quant.estimate import Estimate
    from qserve.quant.options import QuantizeOptions

BESIDE_A_RECIPE = ("model", "recipe", "output", "threads", "as_json")
"""What may be given together with a recipe, which says all the rest."""

MOST_LISTED = 24
"""Layers left in 16 bits that are listed one by one."""


@click.command(short_help="Say what a quantization will cost and give.")
@click.argument("model", required=False)
@click.option("--recipe", type=click.Path(path_type=Path), help="Plan what this recipe asks for.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Check this folder and its disk too."
)
@quantize_options
@threads_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
@click.pass_context
def command(
    context: click.Context,
    /,
    model: str | None,
    recipe: Path | None,
    output: Path | None,
    **choices: Any,
) -> None:
    """Say what `qserve quantize MODEL` with the same options will take and give.

    Only headers are read: this takes a second whatever the size of the model. What cannot work is
    refused as `quantize` would refuse it.
    """
    given = [
        name
        for name in context.params
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        and name not in BESIDE_A_RECIPE
    ]
    if recipe is not None and given:
        raise click.UsageError(f"--recipe says everything: leave out {', '.join(given)}")
    if recipe is None and model is None:
        raise click.UsageError("give MODEL, or --recipe")
    found = _estimate(model, recipe, output, choices)
    if choices["as_json"]:
        click.echo(json.dumps(asdict(found), indent=2))
    else:
        _print(found)


def _estimate(
    model: str | None, recipe: Path | None, output: Path | None, choices: dict[str, Any]
) -> Estimate:
    # Imported here so that a wrong option or `--help` is answered before torch has loaded.

    from qserve.quant.decoder import Decoder
    from qserve.quant.estimate import estimate
    from qserve.quant.output import check_output
    from qserve.quant.source import resolve_model

    use_threads(choices["threads"])
    options, planned = _read(recipe, choices) if recipe is not None else (None, None)
    options = options or read_options(choices)
    if options.is_limited:
        say("what a limit leads to is found by measuring: this plan is of a run without it")
    source = resolve_model(model or str(planned), cache=cache_folder(os.environ), notice=say)
    found = estimate(Decoder(source), options)
    if output is not None:
        check_output(output, force=True, protect=[source.folder])
        if output.is_dir() and any(output.iterdir()):
            say(f"{output} is not empty: `qserve quantize` replaces it with --force alone")
        _warn_of_space(output, found)
    return found


def _read(recipe: Path, choices: dict[str, Any]) -> tuple[QuantizeOptions, str]:
    """The options and the model of a recipe."""
    from qserve.quant.recipe.loading import load_recipe
    from qserve.quant.recipe.running import Job

    job = Job(load_recipe(recipe), recipe.stem, recipe.absolute().parent)
    return job.options(), job.model


def _warn_of_space(output: Path, found: Estimate) -> None:
    parent = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    free = shutil.disk_usage(parent).free
    if free < found.disk_bytes:
        say(f"{parent} has {format_bytes(free)} free: too little for this run")


def _list_skipped(found: Estimate) -> list[tuple[str, str]]:
    """The layers and the reasons; of many, those that differ by their numbers alone as one."""
    if len(found.skipped) <= MOST_LISTED:
        return [(layer.name, layer.reason) for layer in found.skipped]
    kinds = Counter((_without_numbers(layer.name), layer.reason) for layer in found.skipped)
    return [(f"{name} ({count} times)", reason) for (name, reason), count in kinds.items()]


def _without_numbers(name: str) -> str:
    """A name with its blocks and experts left open."""
    return re.sub(r"\.\d+\.", ".*.", name)


def _print(found: Estimate) -> None:
    group = "one scale a row" if found.group_size < 0 else f"groups of {found.group_size}"
    rows = [
        ("model", f"{found.model}, {found.architecture}, {found.num_blocks} blocks"),
        ("size before", format_bytes(found.source_bytes)),
        ("size after", format_bytes(found.quantized_bytes)),
        ("bits per weight, quantized layers", f"{found.bits_per_weight:.3f}"),
        ("quantized layers", f"{found.num_quantized_layers}, {group}"),
        ("layers left in 16 bits", len(found.skipped)),
        ("time, about", format_seconds(found.seconds)),
        ("peak memory, about", format_bytes(found.memory_bytes)),
        ("disk while it runs", format_bytes(found.disk_bytes)),
    ]
    print_table(f"{found.method.upper()}, {found.bits} bits, as {found.format}", ("", ""), rows)
    if found.skipped:
        print_table("left in 16 bits", ("layer", "why"), _list_skipped(found))
    if found.refused_group_sizes:
        refused = [
            (str(size), ", ".join(dict.fromkeys(map(_without_numbers, names))))
            for size, names in found.refused_group_sizes.items()
        ]
        print_table(
            "group sizes that do not fit", ("size", "does not divide the inputs of"), refused
        )
    engines = [
        (
            f"{verdict.engine} {verdict.version}",
            "no" if verdict.refusals else "yes",
            "; ".join([*verdict.refusals, *verdict.notes]) or "-",
        )
        for verdict in found.engines
    ]
    print_table("will it load", ("engine", "loads", "why, and what to know"), engines)
