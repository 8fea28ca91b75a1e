"""The definition of the largest logits in plain PyTorch."""

from __future__ import annotations

import torch

from qserve.kernels.activations import Activations
from qserve.kernels.dense_matmul import DenseWeight, dense_matmul
from qserve.kernels.int4_matmul import Int4Weight, int4_matmul
from qserve.kernels.int8_matmul import Int8Weight, int8_matmul


def topk_head(
    x: torch.Tensor, weight: Int4Weight | Int8Weight | DenseWeight, k: int, activations: Activations
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and values ``[M, k]`` of the largest outputs of each row, largest first."""
    if isinstance(weight, Int4Weight):
        logits = int4_matmul(x, weight, activations=activations)
    elif isinstance(weight, Int8Weight):
        logits = int8_matmul(x, weight, activations=activations)
    else:
        logits = dense_matmul(x, weight)
    # A stable sort keeps equals in the order of their ids; NaN sorts as the largest.
    values, ids = logits.float().sort(dim=1, descending=True, stable=True)
    return ids[:, :k].contiguous(), values[:, :k].contiguous()
