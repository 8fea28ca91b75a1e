"""The memory layout of 8-bit floats that the Triton kernel reads."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import torch

from qserve.kernels.float8_weight import Float8Weight
from qserve.kernels.tiled_matmul.launch import BLOCK

STEP = 32
"""Inputs of the shortest product; no block of scales may be narrower."""

_NEGATIVE_ZERO = -128


@dataclass(frozen=True, slots=True)
class TiledFloat8:
    """A float8 weight ``[out_features, in_features]``.

    values: ``[out_features, ceil(in_features / 128) * 128]`` of the dtype of the target.
    parameters: float32 ``[num_groups, out_features]``, or None for one scale an output.
    channel_scales: float32 ``[out_features]``, those scales, or None. group_size: 32, 64, a
    multiple of 128, or 0 without parameters.
    """

    values: torch.Tensor
    parameters: torch.Tensor | None
    channel_scales: torch.Tensor | None
    group_size: int


def suits_tiles(weight: Float8Weight) -> bool:
    """Whether ``pack_float8`` takes the blocks of ``weight``."""
    columns = weight.block[1]
    return columns >= weight.in_features or columns % STEP == 0


def pack_float8(weight: Float8Weight, dtype: torch.dtype) -> TiledFloat8:
    """``weight`` as the tiles of a target with ``dtype`` read it, on the device that holds it.

    dtype: float8_e4m3fn, float8_e4m3fnuz, whose values are half as large with the same bits, or
    int8 for the bits. Raises ``ValueError`` for blocks whose inputs are no multiple of 32.
    """
    rows, columns = weight.block
    bits = weight.values.view(torch.int8)
    scales = weight.scales.float().repeat_interleave(rows, 0)[: weight.out_features]
    if dtype is torch.float8_e4m3fnuz:
        bits = torch.where(bits == _NEGATIVE_ZERO, 0, bits)  # would mean NaN
        scales = scales * 2
    padding = -weight.in_features % BLOCK
    values = torch.nn.functional.pad(bits, (0, padding)).view(dtype)
    if columns >= weight.in_features:
        return TiledFloat8(values, None, scales[:, 0].contiguous(), 0)
    if columns % STEP:
        raise ValueError(
            f"blocks of {columns} inputs do not suit the tiles: expected a multiple of {STEP}, or "
            "the whole row"
        )
    group_size = gcd(columns, BLOCK)
    group_size = columns if group_size == BLOCK else group_size
    parameters = scales.repeat_interleave(columns // group_size, 1).T.contiguous()
    missing = (weight.in_features + padding) // group_size - parameters.shape[0]
    parameters = torch.nn.functional.pad(parameters, (0, 0, 0, max(0, missing)))
    return TiledFloat8(values, parameters, None, group_size)
