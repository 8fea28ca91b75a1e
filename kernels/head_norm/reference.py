"""The definition of the norm of heads in plain PyTorch."""

from __future__ import annotations

import torch


def head_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float, out: torch.Tensor
) -> None:
    """Writes ``x`` with each of its heads normed to ``out``."""
    heads = x.float().unflatten(1, (-1, weight.size(0)))
    scales = torch.rsqrt(heads.square().mean(2, keepdim=True) + eps)
    out.copy_((heads * scales * (weight_offset + weight.float())).flatten(1))
