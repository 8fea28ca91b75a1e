"""The memory layout of 8-bit weights that the Triton kernel reads."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import torch

from qserve.kernels.grouped_weight import GroupedWeight
from qserve.kernels.tiled_matmul.launch import BLOCK
from qserve.kernels.tiled_matmul.parameters import pack_parameters, to_half

STEP = 32
"""Inputs of the shortest product; no group may be smaller."""

_SIGN = 128


@dataclass(frozen=True, slots=True)
class TiledInt8:
    """An 8-bit weight ``[out_features, in_features]``.

    codes: int8 ``[out_features, ceil(in_features / 128) * 128]``, codes less 128.
    parameters: int32 ``[num_groups, out_features]``: bits 0-15 the scale, bits 16-31 the zero point
        less 128 as a bfloat16; None for one scale an output without zero points.
    channel_scales: float32 ``[out_features]``, those scales or the outer ones, or None.
    scale_dtype: what bits 0-15 are. group_size: 32, 64, a multiple of 128, or 0 without parameters.
    """

    codes: torch.Tensor
    parameters: torch.Tensor | None
    channel_scales: torch.Tensor | None
    scale_dtype: torch.dtype
    group_size: int
    asymmetric: bool


def suits_tiles(weight: GroupedWeight) -> bool:
    """Whether ``pack_int8`` takes the groups of ``weight``."""
    whole_rows = weight.group_size == weight.in_features and weight.is_symmetric
    return whole_rows or weight.group_size % STEP == 0


def pack_int8(weight: GroupedWeight) -> TiledInt8:
    """``weight`` as the tiles read it, on the device that holds it.

    Groups that are neither 32, 64 nor a multiple of 128 are written as several smaller ones with
    the same scale. Raises ``ValueError`` for a width other than 8 bits, for groups that are no
    multiple of 32, and for scales of groups outside the range of float16.
    """
    if weight.bits != 8:
        raise ValueError(f"the weight has {weight.bits} bits, expected 8")
    padding = -weight.in_features % BLOCK
    codes = torch.nn.functional.pad((weight.codes ^ _SIGN).view(torch.int8), (0, padding))
    if weight.group_size == weight.in_features and weight.is_symmetric:
        channels = weight.scales[:, 0].float()
        if weight.channel_scales is not None:
            channels = channels * weight.channel_scales
        return TiledInt8(codes, None, channels, torch.float32, 0, False)
    group_size = gcd(weight.group_size, BLOCK)
    if group_size < STEP:
        raise ValueError(
            f"groups of {weight.group_size} inputs do not suit the tiles: expected a multiple of "
            f"{STEP}, or the whole row"
        )
    if group_size == BLOCK:
        group_size = weight.group_size
    scales = to_half(weight.scales)
    zeros = (weight.zero_points.to(torch.int32) - _SIGN).to(torch.bfloat16).view(torch.int16)
    parameters = pack_parameters(scales, zeros)
    parameters = parameters.repeat_interleave(weight.group_size // group_size, dim=0)
    parameters = torch.nn.functional.pad(parameters, (0, 0, 0, padding // group_size))
    return TiledInt8(
        codes=codes,
        parameters=parameters,
        channel_scales=weight.channel_scales,
        scale_dtype=scales.dtype,
        group_size=group_size,
        asymmetric=not weight.is_symmetric,
    )
