"""The native layout of codes of 2, 3 and 4 bits."""

from __future__ import annotations

import torch

from qserve.kernels.grouped_weight import GroupedWeight
from qserve.kernels.native_weight import NativeWeight
from qserve.kernels.panels import PanelFormat, PanelSource, pack_panels

FORMATS = {2: PanelFormat.INT2, 3: PanelFormat.INT3, 4: PanelFormat.INT4}


def pack(weight: GroupedWeight, bias: torch.Tensor | None) -> NativeWeight:
    """The weight in panels; outer scales are multiplied into those of the groups."""
    source = PanelSource(
        codes=weight.codes,
        scales=weight.combined_scales(),
        zero_points=weight.zero_points,
        bias=bias,
        input_order=weight.input_order,
    )
    return pack_panels(FORMATS[weight.bits], source, weight.group_size)
