"""The definition of the products of a mixture of experts in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qserve.kernels.activations import Activations
from qserve.kernels.packed_weight import PackedWeight, multiply


def expert_matmul(
    x: torch.Tensor,
    experts: Sequence[PackedWeight],
    expert_ids: torch.Tensor,
    out: torch.Tensor,
    activations: Activations,
) -> None:
    """Writes the products of rows with the weights of their experts to ``out``."""
    num_rows, top_k = expert_ids.shape
    known = (expert_ids >= 0) & (expert_ids < len(experts))
    if not bool(known.all()):
        raise ValueError(f"an expert id is not below {len(experts)}, the number of experts, or < 0")
    rows = x[:, None].expand(num_rows, top_k, x.shape[-1]) if x.dim() == 2 else x
    for index, weight in enumerate(experts):
        chosen = expert_ids == index
        out[chosen] = multiply(rows[chosen], weight, activations=activations)


def combine_experts(y: torch.Tensor, weights: torch.Tensor, out: torch.Tensor) -> None:
    """Writes the weighted sums over the experts to ``out``."""
    out.copy_((y.float() * weights[..., None]).sum(1))


def route_tokens(
    logits: torch.Tensor, renormalize: bool, ids: torch.Tensor, weights: torch.Tensor
) -> None:
    """Writes the most likely experts of each row to ``ids`` and their weights to ``weights``."""
    wide = logits.float()
    order = wide.sort(dim=1, descending=True, stable=True).indices[:, : ids.shape[1]]
    chosen = wide.softmax(1).gather(1, order)
    ids.copy_(order)
    weights.copy_(chosen / chosen.sum(1, keepdim=True) if renormalize else chosen)
