"""The weight of a linear layer of any format: which matmul multiplies with it."""

from __future__ import annotations

import torch

from qserve.kernels import codebook_matmul, dense_matmul, float8_matmul, int4_matmul, int8_matmul
from qserve.kernels.codebook_weight import CodebookWeight
from qserve.kernels.float8_weight import Float8Weight
from qserve.kernels.grouped_weight import GroupedWeight
from qserve.kernels.packed_weight import PackedWeight

NeutralWeight = GroupedWeight | CodebookWeight | Float8Weight | torch.Tensor
"""What a checkpoint gives for a linear layer; a plain tensor is a float weight ``[N, K]``."""

CPU = torch.device("cpu")


def prepare_linear(
    weight: NeutralWeight, device: torch.device = CPU, *, bias: torch.Tensor | None = None
) -> PackedWeight:
    """``weight`` repacked by the matmul of its format, for ``packed_weight.multiply``.

    bias: ``[N]`` or None. Raises what ``prepare`` of that matmul raises.
    """
    if isinstance(weight, GroupedWeight):
        if weight.bits == 8:
            return int8_matmul.prepare(weight, device, bias=bias)
        return int4_matmul.prepare(weight, device, bias=bias)
    if isinstance(weight, CodebookWeight):
        return codebook_matmul.prepare(weight, device, bias=bias)
    if isinstance(weight, Float8Weight):
        return float8_matmul.prepare(weight, device, bias=bias)
    return dense_matmul.prepare(weight, device, bias=bias)


def shape_of(weight: NeutralWeight) -> tuple[int, int]:
    """The outputs and inputs of a layer with this weight."""
    if isinstance(weight, torch.Tensor):
        return weight.shape[0], weight.shape[1]
    return weight.out_features, weight.in_features
