"""Scales and zero points of a group as one 32-bit word: an asynchronous copy moves no less."""

from __future__ import annotations

import torch


def to_half(scales: torch.Tensor) -> torch.Tensor:
    """``scales`` as they are if bfloat16, rounded to float16 otherwise.

    Raises ``ValueError`` for scales outside the range of float16.
    """
    if scales.dtype is torch.bfloat16:
        return scales
    half = scales.to(torch.float16)
    if not bool(torch.isfinite(half).all()) or bool(((half == 0) & (scales != 0)).any()):
        magnitudes = scales.abs()
        raise ValueError(
            f"scales from {magnitudes.min():g} to {magnitudes.max():g} do not fit float16: "
            "store them as bfloat16"
        )
    return half


def pack_parameters(scales: torch.Tensor, zero_points: torch.Tensor) -> torch.Tensor:
    """int32 ``[num_groups, out_features]``: bits 0-15 the scale, from bit 16 on the zero point.

    scales, zero_points: ``[out_features, num_groups]``, 16-bit floats and integers. Groups are
    rows, since a thread block reads one group of many outputs at a time.
    """
    bits = scales.contiguous().view(torch.int16).to(torch.int32) & 0xFFFF
    return (bits | zero_points.to(torch.int32) << 16).T.contiguous()
