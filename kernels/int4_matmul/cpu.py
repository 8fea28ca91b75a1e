"""The native 4-bit matmul: the panel layout and the call."""

from __future__ import annotations

import torch

from qserve.kernels.activations import Activations
from qserve.kernels.grouped_weight import GroupedWeight
from qserve.kernels.native_weight import NativeWeight

KIND = "Int4Weight"
GROUP_MULTIPLE = 32


def pack(weight: GroupedWeight) -> NativeWeight:
    """The weight in panels of 16 outputs, see kernels/csrc/matmul_kernels.h."""
    scales = weight.scales.float().contiguous()
    wide = not torch.equal(scales.half().float(), scales)
    native = NativeWeight(KIND, (weight.out_features, weight.in_features, weight.group_size, wide))
    codes, zero_points = weight.codes.contiguous(), weight.zero_points.contiguous()
    native.pack(codes.data_ptr(), scales.data_ptr(), zero_points.data_ptr())
    return native


def multiply(
    native: NativeWeight, x: torch.Tensor, out: torch.Tensor, activations: Activations
) -> None:
    """Writes the product with rows ``x`` to ``out``; both were checked."""
    native.run(
        x.data_ptr(),
        x.stride()[0],
        x.shape[0],
        out.data_ptr(),
        out.stride()[0],
        activations is Activations.INT8,
    )
