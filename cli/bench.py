"""`qserve bench`: how fast the engine and the kernels are, and what this machine could do."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from qserve.cli.console import print_table, progress
from qserve.cli.engine_options import engine_options, find_folder, read_engine_options
from qserve.cli.threads import threads_option
from qserve.quant.quantities import format_bytes

if TYPE_CHECKING:
    import torch
    from _typeshed import DataclassInstance

    from qserve.kernels.benchmark import Measurement
    from qserve.kernels.machine_bounds import MachineBounds
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


@command.command()
@click.option("--op", "ops", multiple=True, help="Only this op; may be repeated.")
@click.option("--shape", default="", help="Only shapes whose description contains this.")
@threads_option
@click.option("--isa", help="Instruction set of the native kernels. Default: the best there is.")
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), help="Default: a GPU if there is one."
)
@click.option(
    "--seconds",
    type=click.FloatRange(0),
    default=0.2,
    show_default=True,
    help="Time for each case.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def kernels(ops: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Measure every op on the shapes of a real model, beside what this machine can do.

    Times are the 20th, 50th and 80th percentile, rates those of the 50th. The share is of the
    shortest time that the rates of reading and multiplying allow, which are measured first; it is
    above 1 where caches hold what is read.
    """
    import torch

    from qserve.kernels.benchmark import find_cases, measure_case
    from qserve.kernels.machine_bounds import measure_bounds

    device = torch.device(options["device"] or ("cuda" if torch.cuda.is_available() else "cpu"))
    _prepare_device(device, options["threads"], options["isa"])
    try:
        cases = find_cases(device, ops, options["shape"])
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--op") from None
    if not cases:
        raise click.BadParameter(f"no shape contains {options['shape']!r}", param_hint="--shape")
    bounds = measure_bounds(device)
    with progress("measuring", len(cases)) as advance:
        found: list[Measurement] = []
        for case in cases:
            advance(len(found), f"{case.op} {case.shape}")
            found.append(measure_case(case, device, bounds, options["seconds"]))
    machine = describe_device(device)
    if as_json:
        rows = [_rounded(measurement) for measurement in found]
        json.dump({"machine": machine, "bounds": _rounded(bounds), "rows": rows}, sys.stdout)
        sys.stdout.write("\n")
    else:
        _print_kernels(machine, bounds, found)


def describe_device(device: torch.device) -> dict[str, str | int]:
    """What the figures were measured on: processor, instruction set and threads, or the GPU."""
    import torch

    from qserve.cli.doctor import machine
    from qserve.kernels import native

    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device)}
    if not native.available():
        return {"device": machine()["processor"], "isa": "none", "threads": torch.get_num_threads()}
    return {
        "device": machine()["processor"],
        "isa": native.isa(),
        "threads": native.num_threads(),
    }


def _prepare_device(device: torch.device, threads: int | None, isa: str | None) -> None:
    """Raises ``click.UsageError`` for a GPU or an instruction set that is not there."""
    import torch

    from qserve.kernels import native

    if device.type == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("--device cuda: PyTorch finds no GPU here, see `qserve doctor`")
    if not native.available():
        if isa:
            raise click.UsageError(f"--isa {isa}: {native.failure()}")
        torch.set_num_threads(threads or torch.get_num_threads())
        return
    known = native.supported_isas()
    if isa and isa not in known:
        raise click.BadParameter(f"{isa}: this machine has {', '.join(known)}", param_hint="--isa")
    native.select_isa(isa or native.isa())
    native.set_num_threads(threads or native.num_threads())
    torch.set_num_threads(1)  # the native kernels have threads of their own


def _rounded(figures: DataclassInstance) -> dict[str, Any]:
    return {
        name: round(value, 3 if name == "share" else 1) if isinstance(value, float) else value
        for name, value in asdict(figures).items()
    }


def _print_kernels(
    machine: dict[str, str | int], bounds: MachineBounds, found: list[Measurement]
) -> None:
    columns = ("op", "shape", "backend", "p20 us", "p50 us", "p80 us", "GB/s", "GMAC/s", "share")
    rows = [tuple(_rounded(measurement).values()) for measurement in found]
    print_table("kernels", columns, rows)
    rates = _rounded(bounds)
    click.echo(
        f"{', '.join(f'{name} {value}' for name, value in machine.items())}: at best "
        f"{rates['read_gb_s']} GB/s read, {rates['int8_gmac_s']} GMAC/s int8, "
        f"{rates['float_gmac_s']} GMAC/s float"
    )
