"""The native layout of 8-bit floats."""

from __future__ import annotations

import torch

from qserve.kernels.float8_weight import Float8Weight
from qserve.kernels.native_weight import NativeWeight
from qserve.kernels.panels import PanelFormat, PanelSource, pack_panels, suits_panels


def suits(weight: Float8Weight) -> bool:
    """Whether panels can hold the weight: its blocks are wide enough, and no value is NaN."""
    codes = weight.values.view(torch.uint8)
    group_size = min(weight.block[1], weight.in_features)
    return suits_panels(group_size, weight.in_features) and not bool((codes & 127 == 127).any())


def pack(weight: Float8Weight, bias: torch.Tensor | None) -> NativeWeight:
    """The weight in panels, with a scale for each output and block of inputs."""
    rows, columns = weight.block
    scales = weight.scales.float().repeat_interleave(rows, 0)[: weight.out_features]
    source = PanelSource(weight.values, scales, bias=bias)
    return pack_panels(PanelFormat.FLOAT8, source, min(columns, weight.in_features))
