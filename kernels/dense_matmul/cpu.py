"""The native matmul with float weights: the panel layout."""

from __future__ import annotations

import torch

from qserve.kernels.native_weight import NativeWeight

TYPES = (torch.float32, torch.float16, torch.bfloat16)
"""In the order of the extension's FloatType."""


def pack(weight: torch.Tensor, bias: torch.Tensor | None) -> NativeWeight:
    """The weight in panels of 16 outputs, ``[panel][k][16]``, in its own dtype."""
    sizes = (weight.shape[0], weight.shape[1], TYPES.index(weight.dtype), bias is not None)
    native = NativeWeight("DenseWeight", sizes)
    weight = weight.contiguous()
    addend = None if bias is None else bias.float().contiguous()
    native.pack(weight.data_ptr(), 0 if addend is None else addend.data_ptr())
    return native
