"""The native matmul with float weights: the panel layout."""

from __future__ import annotations

import torch

from qserve.kernels.native_weight import NativeWeight

TYPES = (torch.float32, torch.float16, torch.bfloat16)
"""In the order of the extension's FloatType."""


def pack(weight: torch.Tensor) -> NativeWeight:
    """The weight in panels of 16 outputs, ``[panel][k][16]``, in its own dtype."""
    sizes = (weight.shape[0], weight.shape[1], TYPES.index(weight.dtype))
    native = NativeWeight("DenseWeight", sizes)
    weight = weight.contiguous()
    native.pack(weight.data_ptr())
    return native
