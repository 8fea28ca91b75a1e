"""What each method is made of: its levels, its groups, which steps choose the codes, its format."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from qserve.kernels.activations import MAX_FLOAT8, Activations
from qserve.quant.errors import OptionError
from qserve.quant.formats.bitsandbytes import CODEBOOKS
from qserve.quant.formats.registry import OutputFormat
from qserve.quant.grid import ChooseGrid, LevelSet, Zero, grid_over_all
from qserve.quant.half_quadratic import solve_grid
from qserve.quant.options import GROUP_SIZES, Effort, Method, QuantizeOptions
from qserve.quant.steps import Range, Rounding, Steps, Transform

WHOLE_ROW = -1
"""The group size of one scale for each output."""

ROWS = (WHOLE_ROW,)
ORDERED = (OutputFormat.GPTQ, OutputFormat.GPTQ_V2)
"""Formats that hold groups of inputs in any order."""

UNSCALED = Steps(Transform.NONE)
INT8 = LevelSet(8, Zero.CENTERED, scale_dtype=torch.float32)


PUBLISHED = {
    Method.AWQ: Steps(Transform.PUBLISHED_SCALE, Range.SHRUNK, Rounding.NEAREST),
    Method.GPTQ: Steps(Transform.NONE, Range.FULL, Rounding.PUBLISHED_FEEDBACK),
    Method.INT4: Steps(Transform.NONE, Range.FULL, Rounding.PUBLISHED_FEEDBACK),
    Method.SMOOTHQUANT: Steps(Transform.PUBLISHED_SMOOTH, Range.FULL, Rounding.NEAREST),
    Method.QOQ: Steps(Transform.PUBLISHED_SMOOTH, Range.SHRUNK, Rounding.NEAREST),
}
"""The steps of the methods that other tools run with text."""


@dataclass(frozen=True, slots=True)
class Profile:
    """A method, taken apart.

    group_sizes: what may be chosen from, the usual ones first. calibrated: whether text is read;
    without it ``choose_grid`` looks at the weights of each group, and each weight is rounded alone.
    activations: what the result is run with, None for 16 bits.
    """

    levels: LevelSet
    group_sizes: tuple[int, ...]
    output: OutputFormat
    calibrated: bool = True
    steps: Steps = Steps()
    activations: Activations | None = None
    choose_grid: ChooseGrid = grid_over_all


def profile_of(options: QuantizeOptions) -> Profile:
    """The profile that the options ask for.

    Raises ``OptionError`` for an activation order that the method or the format does not have.
    """
    profile = _BUILDERS[options.method](options)
    if options.output is not None:
        profile = replace(profile, output=options.output)
    if options.activation_order:
        _check_order(options.method, profile)
    steps = profile.steps
    if options.effort is Effort.FAST:
        steps = replace(steps, rounding=Rounding.NEAREST)
    elif options.effort is Effort.PLAIN:
        profile = replace(profile, calibrated=options.method in PUBLISHED)
        steps = PUBLISHED.get(options.method, steps)
    steps = replace(steps, damping=options.damping, activation_order=options.activation_order)
    return replace(profile, steps=steps)


def _check_order(method: Method, profile: Profile) -> None:
    if not profile.calibrated:
        raise OptionError(f"activation order: {method.value} reads no text that would tell it")
    if profile.output not in ORDERED:
        raise OptionError(
            f"activation order: {profile.output.value} does not hold it, "
            f"{' and '.join(output.value for output in ORDERED)} do: choose one, or leave it out"
        )


def _awq(options: QuantizeOptions) -> Profile:
    return Profile(LevelSet(options.code_bits), GROUP_SIZES, OutputFormat.AWQ)


def _gptq(options: QuantizeOptions) -> Profile:
    levels = LevelSet(options.code_bits, Zero.MIDDLE)
    return Profile(levels, (*GROUP_SIZES, WHOLE_ROW), OutputFormat.GPTQ)


def _int4(options: QuantizeOptions) -> Profile:
    return replace(_gptq(options), output=OutputFormat.COMPRESSED_TENSORS)


def _rtn(options: QuantizeOptions) -> Profile:
    return replace(_awq(options), calibrated=False)


def _hqq(options: QuantizeOptions) -> Profile:
    output = OutputFormat.AWQ if options.code_bits == 4 else OutputFormat.COMPRESSED_TENSORS
    return replace(_rtn(options), output=output, choose_grid=solve_grid)


def _qoq(_: QuantizeOptions) -> Profile:
    return Profile(
        LevelSet(scale_dtype=torch.float32, progressive=True),
        GROUP_SIZES,
        OutputFormat.QOQ,
        steps=Steps(Transform.SMOOTH),
        activations=Activations.INT8_TOKEN,
    )


def _int8(_: QuantizeOptions) -> Profile:
    sizes = (*ROWS, *GROUP_SIZES)
    return Profile(INT8, sizes, OutputFormat.COMPRESSED_TENSORS, steps=UNSCALED)


def _llm_int8(_: QuantizeOptions) -> Profile:
    return Profile(INT8, ROWS, OutputFormat.BITSANDBYTES, calibrated=False)


def _smoothquant(_: QuantizeOptions) -> Profile:
    return Profile(
        INT8,
        ROWS,
        OutputFormat.COMPRESSED_TENSORS,
        steps=Steps(Transform.SMOOTH),
        activations=Activations.INT8_TOKEN,
    )


def _codebook(options: QuantizeOptions) -> Profile:
    table = tuple(CODEBOOKS[options.method.value].sort().values.tolist())
    levels = LevelSet(codebook=table, scale_dtype=torch.float32, nested=True)
    return Profile(levels, (64, 128, 32), OutputFormat.BITSANDBYTES)


def _float8(options: QuantizeOptions) -> Profile:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    table = codes[codes.isfinite()].unique() / MAX_FLOAT8  # sorted, and one zero
    dynamic = options.method is Method.FLOAT8
    return Profile(
        LevelSet(8, codebook=tuple(table.tolist()), scale_dtype=torch.float32),
        ROWS,
        OutputFormat.COMPRESSED_TENSORS,
        steps=UNSCALED,
        activations=Activations.FLOAT8_TOKEN if dynamic else None,
    )


_BUILDERS = {
    Method.AWQ: _awq,
    Method.GPTQ: _gptq,
    Method.INT4: _int4,
    Method.QOQ: _qoq,
    Method.HQQ: _hqq,
    Method.RTN: _rtn,
    Method.INT8: _int8,
    Method.LLM_INT8: _llm_int8,
    Method.SMOOTHQUANT: _smoothquant,
    Method.NF4: _codebook,
    Method.FP4: _codebook,
    Method.FLOAT8: _float8,
    Method.FLOAT8_WEIGHT: _float8,
}
