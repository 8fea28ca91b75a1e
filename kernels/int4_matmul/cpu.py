"""The native 4-bit matmul: the panel layout."""

from __future__ import annotations

import torch

from qserve.kernels.activations import ACTIVATION_GROUP
from qserve.kernels.grouped_weight import GroupedWeight
from qserve.kernels.native_weight import NativeWeight


def suits(weight: GroupedWeight, bias: torch.Tensor | None) -> bool:
    """Whether the panels hold such a weight."""
    return (
        weight.group_size % ACTIVATION_GROUP == 0
        and weight.input_order is None
        and weight.channel_scales is None
        and bias is None
    )


def pack(weight: GroupedWeight) -> NativeWeight:
    """The weight in panels of 16 outputs, see kernels/csrc/matmul_kernels.h."""
    scales = weight.scales.float().contiguous()
    wide = not torch.equal(scales.half().float(), scales)
    sizes = (weight.out_features, weight.in_features, weight.group_size, wide)
    native = NativeWeight("Int4Weight", sizes)
    codes, zero_points = weight.codes.contiguous(), weight.zero_points.contiguous()
    native.pack(codes.data_ptr(), scales.data_ptr(), zero_points.data_ptr())
    return native
