"""The definition of the float8 matmul in plain PyTorch."""

from __future__ import annotations

import torch

from qserve.kernels.float8_weight import Float8Weight
from qserve.kernels.packed_weight import PackedWeight
from qserve.kernels.reference_product import ReferenceProduct


def prepare(
    weight: Float8Weight, device: torch.device, bias: torch.Tensor | None = None
) -> PackedWeight:
    """The product with the floats that the values stand for."""
    return ReferenceProduct(weight.dequantize().to(device), bias).packed()
