"""What a quantization can be asked for on the command line: `quantize` and `plan` share it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from qserve.quant.options import Effort, QuantizeOptions

Command = Callable[..., Any]

BUILT_IN = "builtin"
METHODS = (
    *("awq", "gptq", "int4", "int8", "smoothquant", "qoq", "nf4", "fp4", "fp8", "fp8-weight"),
    *("llm-int8", "hqq", "rtn"),
)
FORMATS = ("awq", "gptq", "gptq-v2", "compressed-tensors", "bitsandbytes")


def read_size(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    """Bytes, of ``120MB``, ``4.5GB`` or ``2GiB``."""
    from qserve.quant.quantities import parse_size

    try:
        return None if value is None else parse_size(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def read_widths(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, ...]:
    """Whole numbers with commas in between."""
    try:
        return () if value is None else tuple(map(int, value.split(",")))
    except ValueError:
        raise click.BadParameter(f"{value!r}: expected widths such as 4,8,16") from None


def method_flag(name: str, text: str) -> Callable[[Command], Command]:
    """The option ``--name``, which stands for ``--method name``."""
    return click.option(f"--{name}", _flag_of(name), is_flag=True, help=text)


def _flag_of(name: str) -> str:
    """Under which a command is told whether the flag of a method was given."""
    return f"method_{name}"


OPTIONS = (
    method_flag("awq", "Activation-aware 4 bits, stored as AWQ (the default)."),
    method_flag("gptq", "The same steps on symmetric codes, stored as GPTQ."),
    method_flag("int4", "The same symmetric codes, stored as compressed-tensors."),
    method_flag("int8", "8-bit weights, one scale a row."),
    method_flag("smoothquant", "8-bit weights and activations (W8A8)."),
    method_flag("nf4", "bitsandbytes' 4-bit levels, with double quantization."),
    method_flag("fp8", "8-bit floats, weights and activations."),
    method_flag("rtn", "Round to nearest: no text, no search; stored as AWQ."),
    click.option(
        "--method", type=click.Choice(METHODS), help="Any method by its name, those above included."
    ),
    click.option(
        "--format",
        "output_format",
        type=click.Choice(FORMATS),
        help="Format to write. Default: the method's own.",
    ),
    click.option("--bits", type=int, default=None, help="Width of a weight."),
    click.option(
        "--group-size",
        type=int,
        help="Inputs that share a scale, -1 for a row. "
        "Default: the coarsest that fits every layer.",
    ),
    click.option(
        "--fast", is_flag=True, help="Stop after scales and ranges: codes are the nearest."
    ),
    click.option(
        "--plain",
        is_flag=True,
        help="The method as it was published and as other tools run it, to compare with.",
    ),
    click.option(
        "--damping",
        type=click.FloatRange(0, 1, min_open=True),
        default=0.01,
        show_default=True,
        help="Share of its mean diagonal that error feedback adds to the Gram matrix of a layer's "
        "inputs; ten times as much where that is not enough.",
    ),
    click.option(
        "--act-order",
        is_flag=True,
        help="Groups of inputs by falling importance (desc_act), for GPTQ's formats.",
    ),
    click.option(
        "--head",
        type=click.Choice(["16", "int8"]),
        default="16",
        show_default=True,
        help="The output head in 16 bits, or in 8 (compressed-tensors, GPTQ).",
    ),
    click.option(
        "--calibration",
        default=BUILT_IN,
        show_default=True,
        metavar="FILE|hub:OWNER/NAME[:SPLIT[:COLUMN]]|builtin|self",
        help="Text to look at: a file of text or of conversations, a data set of the hub, the text "
        "in the package, or what the model itself writes.",
    ),
    click.option(
        "--assistant-only",
        is_flag=True,
        help="Of conversations only what the assistant says counts; the rest is context.",
    ),
    click.option(
        "--samples",
        type=click.IntRange(1),
        default=32,
        show_default=True,
        help="Windows of calibration text.",
    ),
    click.option(
        "--seq-len",
        type=click.IntRange(2),
        default=512,
        show_default=True,
        help="Tokens of a window.",
    ),
    click.option(
        "--kv-cache",
        type=click.Choice(["fp8", "int8"]),
        help="Find scales for keys and values of 8 bits, one a head, and store them; needs the "
        "format compressed-tensors.",
    ),
    click.option(
        "--tune",
        type=click.FloatRange(0, min_open=True),
        metavar="MINUTES",
        help="Let scales and norms learn so long from text that the steps before did not use; the "
        "codes stay. Takes a text file of --calibration.",
    ),
    click.option(
        "--tune-steps",
        type=click.IntRange(1),
        help="Tune for so many steps at most, which gives the same result again.",
    ),
    click.option(
        "--override",
        "overrides",
        multiple=True,
        metavar="REGEX=bits:8,group:32",
        help="Another width or group size for layers whose name matches; REGEX=16 leaves them in "
        "16 bits. May be repeated, the later counts.",
    ),
    click.option(
        "--avg-bits",
        type=click.FloatRange(0, min_open=True),
        help="Choose bits and groups for every layer, so that a weight takes so many bits on "
        "average, scales included.",
    ),
    click.option(
        "--max-size",
        callback=read_size,
        metavar="SIZE",
        help="The same, so that the weight files take at most 120MB, 4.5GB, 2GiB.",
    ),
    click.option(
        "--widths",
        callback=read_widths,
        metavar="4,8,16",
        help="Bits to choose from for --avg-bits and --max-size. Default: all that the format "
        "holds, and 16.",
    ),
    click.option(
        "--max-kl",
        type=click.FloatRange(0, min_open=True),
        help="Judge the result on Python's help topics, and give the worst layers more bits or "
        "smaller groups while its KL from the float model is above.",
    ),
    click.option(
        "--ignore",
        multiple=True,
        metavar="REGEX",
        help="Leave layers whose name matches in 16 bits; may be repeated.",
    ),
    click.option(
        "--seed",
        type=int,
        default=0,
        show_default=True,
        help="Seed of self-written calibration text.",
    ),
)
"""The options, in the order of `--help`."""


def quantize_options(command: Command) -> Command:
    """A command that takes all of them; ``read_options`` understands what it is given."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def read_options(choices: dict[str, Any]) -> QuantizeOptions:
    """The options as the quantizer takes them. Raises ``OptionError``, ``click.UsageError``."""
    from qserve.quant.formats.registry import OutputFormat
    from qserve.quant.options import (
        Head,
        KvCache,
        Method,
        QuantizeOptions,
        TuneOptions,
        read_source,
    )
    from qserve.quant.overrides import parse_override

    limits = choices["tune"], choices["tune_steps"]
    return QuantizeOptions(
        method=Method(_read_method(choices)),
        bits=choices["bits"],
        group_size=choices["group_size"],
        output=OutputFormat(choices["output_format"]) if choices["output_format"] else None,
        effort=_read_effort(choices),
        damping=choices["damping"],
        activation_order=choices["act_order"],
        head=Head(choices["head"]),
        calibration=read_source(choices["calibration"], Path()),
        assistant_only=choices["assistant_only"],
        num_samples=choices["samples"],
        seq_len=choices["seq_len"],
        overrides=tuple(map(parse_override, choices["overrides"])),
        avg_bits=choices["avg_bits"],
        max_size=choices["max_size"],
        widths=choices["widths"],
        max_kl=choices["max_kl"],
        ignore=choices["ignore"],
        seed=choices["seed"],
        kv_cache=None if choices["kv_cache"] is None else KvCache(choices["kv_cache"]),
        tune=TuneOptions(*limits) if any(limits) else None,
    )


def _read_effort(choices: dict[str, Any]) -> Effort:
    from qserve.quant.options import Effort

    if choices["plain"] and choices["fast"]:
        raise click.UsageError("--plain and --fast contradict each other: give one")
    if choices["plain"]:
        return Effort.PLAIN
    return Effort.FAST if choices["fast"] else Effort.FULL


def _read_method(choices: dict[str, Any]) -> str:
    """The method that was named, by its flag or by ``--method``."""
    given = {name: f"--{name}" for name in METHODS if choices.get(_flag_of(name))}
    if choices["method"] is not None:
        given.setdefault(choices["method"], f"--method {choices['method']}")
    if len(given) > 1:
        raise click.UsageError(f"{' and '.join(given.values())} contradict each other: give one")
    return next(iter(given), METHODS[0])
