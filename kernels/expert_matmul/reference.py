"""The definition of the products of a mixture of experts in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qserve.kernels.activations import Activations, round_activations


def expert_matmul(
    x: torch.Tensor,
    experts: Sequence[torch.Tensor],
    expert_ids: torch.Tensor,
    out: torch.Tensor,
    activations: Activations,
) -> None:
    """Writes the products of rows with their experts' dequantized weights to ``out``."""
    num_rows, top_k = expert_ids.shape
    if expert_ids.numel() and not 0 <= int(expert_ids.min()) <= int(expert_ids.max()) < len(
        experts
    ):
        raise ValueError(f"an expert id is outside of 0..{len(experts) - 1}, expected it inside")
    rows = x[:, None].expand(num_rows, top_k, x.shape[-1]) if x.dim() == 2 else x
    for index, weight in enumerate(experts):
        chosen = expert_ids == index
        a = round_activations(rows[chosen], activations)
        out[chosen] = (a @ weight.float().T).to(out.dtype)


def combine_experts(y: torch.Tensor, weights: torch.Tensor, out: torch.Tensor) -> None:
    """Writes the weighted sums over the experts to ``out``."""
    out.copy_((y.float() * weights[..., None]).sum(1))


def route_tokens(
    logits: torch.Tensor, renormalize: bool, ids: torch.Tensor, weights: torch.Tensor
) -> None:
    """Writes the most likely experts of each row to ``ids`` and their weights to ``weights``."""
    top_k = ids.shape[1]
    probabilities, order = logits.float().softmax(1).sort(dim=1, descending=True, stable=True)
    chosen = probabilities[:, :top_k]
    ids.copy_(order[:, :top_k])
    weights.copy_(chosen / chosen.sum(1, keepdim=True) if renormalize else chosen)
