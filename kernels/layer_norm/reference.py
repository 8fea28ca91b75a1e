"""The definition of layer norm in plain PyTorch."""

from __future__ import annotations

import torch


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Writes the norm of ``x``, or of ``residual + x`` which replaces ``residual``, to ``out``."""
    if residual is not None:
        residual.add_(x)
        x = residual
    wide = x.float()
    centred = wide - wide.mean(1, keepdim=True)
    scale = torch.rsqrt(centred.square().mean(1, keepdim=True) + eps)
    normed = centred * scale * weight.float()
    out.copy_(normed if bias is None else normed + bias.float())
