"""The definition of the 4-bit matmul in plain PyTorch."""

from __future__ import annotations

from dataclasses import replace

import torch

from qserve.kernels.grouped_weight import GroupedWeight
from qserve.kernels.packed_weight import PackedWeight
from qserve.kernels.reference_product import ReferenceProduct


def prepare(
    weight: GroupedWeight, device: torch.device, bias: torch.Tensor | None = None
) -> PackedWeight:
    """The product with the floats that the codes stand for."""
    stored = replace(weight, input_order=None).dequantize()
    return ReferenceProduct(stored.to(device), bias, weight.input_order).packed()
