"""The native layout of 8-bit codes."""

from __future__ import annotations

import torch

from qserve.kernels.grouped_weight import GroupedWeight
from qserve.kernels.native_weight import NativeWeight
from qserve.kernels.panels import PanelFormat, PanelSource, pack_panels


def pack(weight: GroupedWeight, bias: torch.Tensor | None) -> NativeWeight:
    """The weight in panels, without zero points where all are 128; outer scales are multiplied into
    those of the groups."""
    source = PanelSource(
        codes=weight.codes,
        scales=weight.combined_scales(),
        zero_points=weight.zero_points,
        bias=bias,
        input_order=weight.input_order,
    )
    format = PanelFormat.INT8 if weight.is_symmetric else PanelFormat.INT8_ZEROS
    return pack_panels(format, source, weight.group_size)
