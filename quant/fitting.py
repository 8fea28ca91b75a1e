"""A quantized weight as one that another format can hold: the same codes where it can, else rounded
again to the nearest."""

from __future__ import annotations

from dataclasses import replace

import torch

from qserve.kernels.grouped_weight import GroupedWeight
from qserve.quant.errors import CheckpointError
from qserve.quant.formats.bitsandbytes import NF4
from qserve.quant.formats.layer_format import QuantizedWeight
from qserve.quant.formats.registry import OutputFormat
from qserve.quant.formats.writer import Coding, LayerScheme, Writer, scheme_of
from qserve.quant.grid import LevelSet, Rounded, Zero, grid_over_all, nearest_levels

GROUP_SIZES = (128, 64, 32)
"""What engines have kernels for, coarsest first."""

NF4_BLOCK = 64


def fit(
    name: str, weight: QuantizedWeight, writer: Writer, output: OutputFormat
) -> QuantizedWeight:
    """The weight itself when the format holds it, else the nearest that it holds.

    Raises ``CheckpointError`` when the format cannot hold a layer of this shape at all.
    """
    weight = fold_outer_scales(weight) if output is not OutputFormat.QOQ else weight
    scheme = scheme_of(weight)
    if writer.refusal(scheme) is None:
        return weight
    rounded = round_again(weight, *_nearest_scheme(scheme, output))
    refusal = writer.refusal(scheme_of(rounded))
    if refusal is not None:
        raise CheckpointError(f"{name} cannot become {output.value}: {refusal}")
    return rounded


def fold_outer_scales(weight: QuantizedWeight) -> QuantizedWeight:
    """The weight with the scales of its rows (QoQ) multiplied into those of its groups."""
    if not isinstance(weight, GroupedWeight) or weight.channel_scales is None:
        return weight
    scales = weight.scales.float() * weight.channel_scales[:, None]
    return replace(weight, scales=scales, channel_scales=None)


def split_groups(weight: QuantizedWeight, group_size: int) -> QuantizedWeight:
    """The same weight in smaller groups, whose scales repeat. The sizes must divide."""
    if not isinstance(weight, GroupedWeight) or weight.group_size == group_size:
        return weight
    repeats = weight.group_size // group_size
    return replace(
        weight,
        scales=weight.scales.repeat_interleave(repeats, 1),
        zero_points=weight.zero_points.repeat_interleave(repeats, 1),
        group_size=group_size,
    )


def round_again(weight: QuantizedWeight, levels: LevelSet, group_size: int) -> QuantizedWeight:
    """The nearest weight with other levels, each group spanning its values."""
    groups = weight.dequantize().unflatten(1, (-1, group_size))
    grid = grid_over_all(groups, levels).settled()
    return Rounded(nearest_levels(groups, grid), grid).pack()


def _nearest_scheme(scheme: LayerScheme, output: OutputFormat) -> tuple[LevelSet, int]:
    """Levels and group size that lose least among those that the format holds."""
    is_integer = scheme.coding is Coding.INTEGER
    sizes = (scheme.group_size, *GROUP_SIZES) if is_integer else GROUP_SIZES
    group_size = next((size for size in sizes if scheme.in_features % size == 0), None)
    if group_size is None:
        raise CheckpointError(
            f"a layer with {scheme.in_features} inputs has no groups of {GROUP_SIZES}: it cannot "
            f"become {output.value}"
        )
    if output is OutputFormat.AWQ:
        return LevelSet(4), group_size
    if output is OutputFormat.BITSANDBYTES:
        if scheme.bits == 8:
            return LevelSet(8, Zero.CENTERED, scale_dtype=torch.float32), scheme.in_features
        table = tuple(NF4.tolist())
        levels = LevelSet(4, codebook=table, scale_dtype=torch.float32, nested=True)
        return levels, min(group_size, NF4_BLOCK)
    is_free = output is OutputFormat.GPTQ_V2 and not scheme.symmetric
    zero = Zero.FREE if is_free else Zero.MIDDLE
    return LevelSet(scheme.bits, zero), scheme.in_features if scheme.bits == 8 else group_size
