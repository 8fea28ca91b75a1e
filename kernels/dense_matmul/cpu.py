"""The native matmul with float weights: the panel layout and the call."""

from __future__ import annotations

import torch

from qserve.kernels.native_weight import NativeWeight

KIND = "DenseWeight"
TYPES = (torch.float32, torch.float16, torch.bfloat16)
"""In the order of the extension's FloatType."""


def pack(weight: torch.Tensor) -> NativeWeight:
    """The weight in panels of 16 outputs, ``[panel][k][16]``, in its own dtype."""
    sizes = (weight.shape[0], weight.shape[1], TYPES.index(weight.dtype))
    native = NativeWeight(KIND, sizes)
    weight = weight.contiguous()
    native.pack(weight.data_ptr())
    return native


def multiply(native: NativeWeight, x: torch.Tensor, out: torch.Tensor) -> None:
    """Writes the product with rows ``x`` to ``out``; both were checked."""
    native.run(x.data_ptr(), x.stride()[0], x.shape[0], out.data_ptr(), out.stride()[0])
