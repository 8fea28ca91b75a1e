"""What each method is made of: its levels, its groups, which steps choose the codes, its format."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

import torch

from qserve.kernels.activations import MAX_FLOAT8, Activations
from qserve.quant.formats.bitsandbytes import CODEBOOKS
from qserve.quant.formats.registry import OutputFormat
from qserve.quant.grid import ChooseGrid, LevelSet, Zero, grid_over_all
from qserve.quant.half_quadratic import solve_grid
from qserve.quant.options import GROUP_SIZES, Method, QuantizeOptions, Rounding

WHOLE_ROW = -1
"""The group size of one scale for each output."""

ROWS = (WHOLE_ROW,)
INT8 = LevelSet(8, Zero.CENTERED, scale_dtype=torch.float32)


class Transform(Enum):
    """What is done to the inputs of a stage, and undone in the layer before it."""

    NONE = "none"

    SCALE = "scale"
    """Scales that make the weights easier to round."""

    SMOOTH = "smooth"
    """Scales that share the difficulty of rounding between weights and activations."""


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
    transform: Transform = Transform.SCALE
    rounding: Rounding = Rounding.FEEDBACK
    activations: Activations | None = None
    choose_grid: ChooseGrid = grid_over_all


def profile_of(options: QuantizeOptions) -> Profile:
    """The profile that the options ask for."""
    profile = _BUILDERS[options.method](options)
    if options.output is not None:
        profile = replace(profile, output=options.output)
    return replace(profile, rounding=options.rounding)


def _awq(options: QuantizeOptions) -> Profile:
    return Profile(LevelSet(options.code_bits), GROUP_SIZES, OutputFormat.AWQ)


def _gptq(options: QuantizeOptions) -> Profile:
    levels = LevelSet(options.code_bits, Zero.MIDDLE)
    return Profile(levels, (*GROUP_SIZES, WHOLE_ROW), OutputFormat.GPTQ)


def _int4(options: QuantizeOptions) -> Profile:
    return replace(_gptq(options), output=OutputFormat.COMPRESSED_TENSORS)


def _rtn(options: QuantizeOptions) -> Profile:
    return replace(_awq(options), calibrated=False, transform=Transform.NONE)


def _hqq(options: QuantizeOptions) -> Profile:
    output = OutputFormat.AWQ if options.code_bits == 4 else OutputFormat.COMPRESSED_TENSORS
    return replace(_rtn(options), output=output, choose_grid=solve_grid)


def _qoq(_: QuantizeOptions) -> Profile:
    return Profile(
        LevelSet(scale_dtype=torch.float32, progressive=True),
        GROUP_SIZES,
        OutputFormat.QOQ,
        transform=Transform.SMOOTH,
        activations=Activations.INT8_TOKEN,
    )


def _int8(_: QuantizeOptions) -> Profile:
    sizes = (*ROWS, *GROUP_SIZES)
    return Profile(INT8, sizes, OutputFormat.COMPRESSED_TENSORS, transform=Transform.NONE)


def _llm_int8(_: QuantizeOptions) -> Profile:
    return Profile(
        INT8, ROWS, OutputFormat.BITSANDBYTES, calibrated=False, transform=Transform.NONE
    )


def _smoothquant(_: QuantizeOptions) -> Profile:
    return Profile(
        INT8,
        ROWS,
        OutputFormat.COMPRESSED_TENSORS,
        transform=Transform.SMOOTH,
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
        transform=Transform.NONE,
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
