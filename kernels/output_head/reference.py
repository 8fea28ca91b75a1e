"""The definition of the largest logits in plain PyTorch."""

from __future__ import annotations

import torch

from qserve.kernels.activations import Activations
from qserve.kernels.packed_weight import PackedWeight, multiply


def topk_head(
    x: torch.Tensor, weight: PackedWeight, k: int, activations: Activations
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and values ``[M, k]`` of the largest outputs of each row, largest first."""
    logits = multiply(x, weight, activations=activations)
    # A stable sort keeps equals in the order of their ids; NaN sorts as the largest.
    values, ids = logits.float().sort(dim=1, descending=True, stable=True)
    return ids[:, :k].contiguous(), values[:, :k].contiguous()
