"""The native 8-bit matmul: the panel layout and the call."""

from __future__ import annotations

import torch

from qserve.kernels.activations import Activations
from qserve.kernels.native_weight import NativeWeight

KIND = "Int8Weight"
GROUP_MULTIPLE = 32


def pack(codes: torch.Tensor, scales: torch.Tensor, group_size: int) -> NativeWeight:
    """The weight in panels of 16 outputs, see kernels/csrc/matmul_kernels.h."""
    scales = scales.float().contiguous()
    wide = not torch.equal(scales.half().float(), scales)
    native = NativeWeight(KIND, (codes.shape[0], codes.shape[1], group_size, wide))
    codes = codes.contiguous()
    native.pack(codes.data_ptr(), scales.data_ptr())
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
