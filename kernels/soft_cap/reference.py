"""The definition of the soft cap in plain PyTorch."""

from __future__ import annotations

import torch


def soft_cap(x: torch.Tensor, cap: float, out: torch.Tensor) -> None:
    """Writes ``cap * tanh(x / cap)`` to ``out``."""
    out.copy_(cap * (x.float() / cap).tanh())
