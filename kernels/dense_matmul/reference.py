"""The definition of the matmul with float weights in plain PyTorch."""

from __future__ import annotations

import torch


def dense_matmul(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """Writes ``x @ weight.T`` to ``out``, computed in float32."""
    out.copy_(x.float() @ weight.float().T)
