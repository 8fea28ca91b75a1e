"""`qserve bench`: how fast the engine and the kernels are, and what this machine could do."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from qserve.cli.console import print_table
from qserve.cli.engine_options import engine_options, find_folder, read_engine_options
from qserve.cli.quantities import format_bytes

if TYPE_CHECKING:
    from qserve.serve.engine_benchmark import EngineFigures


@click.group(no_args_is_help=True)
def command() -> None:
    """Measure the engine on a model, or the kernels one by one, on this machine."""


@command.command()
@click.argument("model")
@engine_options
@click.option(
    "--repeat",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    help="Rounds of everything but loading; medians are over all of them.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def engine(model: str, repeat: int, as_json: bool, **options: Any) -> None:
    """Measure the engine on MODEL (a folder, a hub id or a GGUF file).

    Tokens a second of prompts and of decode steps, alone and in batches: medians of warm steps,
    scheduling and sampling included.
    """
    import torch

    from qserve.serve.engine_benchmark import engine_config, measure_engine

    torch.set_num_threads(1)  # the native kernels have threads of their own
    figures = measure_engine(
        find_folder(model), engine_config(**read_engine_options(options)), repeat
    )
    if as_json:
        json.dump(summarize(figures), sys.stdout)
        sys.stdout.write("\n")
    else:
        print_table("engine", ("figure", "value"), list(describe(figures).items()))


def summarize(figures: EngineFigures) -> dict[str, float]:
    """The figures by name, to the digits that mean something."""
    return {
        name: round(value, 1 if name.endswith("_tok_s") else 3)
        for name, value in asdict(figures).items()
    }


def describe(figures: EngineFigures) -> dict[str, str]:
    """What the table says of each figure."""
    rounded = summarize(figures)
    bandwidth = f"{rounded.pop('read_gb_s'):.1f} GB/s"
    share = f"{rounded.pop('decode_b1_read_share'):.0%} of {bandwidth} that this machine reads"
    weights = format_bytes(rounded.pop("weight_bytes"))
    return {name: f"{value:g}" for name, value in rounded.items()} | {
        "weights read in a step": weights,
        "of it, decoding one request": share,
    }
