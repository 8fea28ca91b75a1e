"""The definition of the root-mean-square norm in plain PyTorch."""

from __future__ import annotations

import torch


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None,
    weight_offset: float,
    out: torch.Tensor,
) -> None:
    """Writes the norm of ``x``, or of ``residual + x`` which replaces ``residual``, to ``out``."""
    if residual is not None:
        residual.add_(x)
        x = residual
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(1, keepdim=True) + eps)
    out.copy_(wide * scale * (weight_offset + weight.float()))
